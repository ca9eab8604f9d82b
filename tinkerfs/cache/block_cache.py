"""The block cache on disk: what was fetched once is read from there, by every mount of the user.

    blocks/<file>/about      what file it is, for people; on the last line its length, or nothing
                  lock       byte 0: shared by all that have it open; 1 + n: who fetches block n
                  <n>        block n, then a checksum of it
                  .<n>.part  the start of block n, then a checksum of that; goes after some minutes

The folder is its own index: a block is written beside and renamed, so a process that is killed
leaves no half block under a name, and no second record can disagree. What the disk does to a block
later its checksum tells, when it is first read by a process. Recency is the access time, set by
hand (most file systems are mounted `relatime`). Nothing here raises for what the disk does: a block
that cannot be read or kept is fetched again, and why is told once.

All classes are thread-safe.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

from tinkerfs import errors
from tinkerfs.cache.about import write_about
from tinkerfs.cache.block_writer import TRAILER_BYTES, BlockWriter, is_intact
from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.cache.directory import can_lock_files
from tinkerfs.cache.eviction import Evictor, scan_cache
from tinkerfs.cache.fd_cache import BlockingSection, CachedFd, FdCache
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.safe_open import is_regular, open_regular
from tinkerfs.telemetry import Telemetry

#: So many blocks of one file are checked at a time; the kernel asks for parts of one side by side.
_CHECKS_AT_ONCE = 8

#: The access time of a block is set again when it is this old, seconds.
_TOUCH_S = 60.0

#: How long somebody who opens a file waits for one who is removing it, seconds.
_OPEN_PATIENCE_S = 2.0

#: Blocks known to be sound; beyond, all are looked at again.
_MAX_VERIFIED = 262_144

#: How old the sum of all blocks may be, seconds.
_COUNT_S = 5.0


#: Nothing is there, and nothing can be made.
_NOWHERE = Path("/proc/self/no-cache")


class BlockCache:
    """Blocks of files, on disk.

    Args:
        folder: where; made, for this user alone, when something is first kept. None keeps nothing.
        telemetry: told of what goes wrong, and counts.
        clock: `now` dates uses, `monotonic` spaces attempts.
        limit_bytes: bound on all blocks together; 0 keeps nothing.
        floor_bytes: what stays free on the disk.
    """

    def __init__(
        self,
        folder: Path | None,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        *,
        max_bytes: int,
        min_free_bytes: int,
    ) -> None:
        max_bytes = max_bytes if folder is not None else 0
        self.folder = folder or _NOWHERE
        #: Whether a new block may be kept, and whether locks on it hold and end as they should.
        self.is_on = max_bytes > 0
        self.has_locks = self.is_on and can_lock_files(self.folder)
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        bounds = {"limit_bytes": max_bytes, "floor_bytes": min_free_bytes}
        self._sweeper = Evictor(self.folder, clock, has_locks=self.has_locks, **bounds)
        self.descriptors = FdCache()
        self._verified: dict[tuple[str, int], tuple[int, int, int]] = {}  # looked into without
        self._told: set[str] = set()
        self._counted = (float("-inf"), 0)  # when, on the monotonic clock, and the bytes

    def open(self, key: str, about: str, length_bytes: int | None = None) -> "BlockFile":
        """Return the file of `key`, whatever of it is kept; nothing of it goes until it is closed.

        Args:
            key: another one is another file, for ever.
            about: what people are told that it is.
            length_bytes: of the whole file, for people too; None where nobody knows.
        """
        length = "" if length_bytes is None else str(length_bytes)
        told = f"{about}\n{length}".encode("utf-8", "surrogatepass")
        return BlockFile(self, hashlib.sha256(key.encode("utf-8", "surrogatepass")), told)

    def reserve_space(self, size_bytes: int) -> bool:
        """Make room for a block, and return whether there is some.

        Raises:
            OSError: the folder cannot be read.
        """
        if not self.is_on:
            return False
        with self._lock:
            is_admitted = self._sweeper.admit(size_bytes)
            reason = self._sweeper.refusal
        if not is_admitted:
            self._telemetry.count("cache_blocks_refused")
            self.report_once(errors.no_space(str(self.folder), f"no room for a block: {reason}"))
        return is_admitted

    def kept_bytes(self) -> int:
        """Return what all blocks take on disk, whoever keeps them; at most 5 s old.

        File managers ask for the free space with every folder, and 25,600 files take 0.15 s.

        Raises:
            OSError: the folder cannot be read.
        """
        with self._lock:
            counted_at, size_bytes = self._counted
        now = self._clock.monotonic()
        if self.is_on and now - counted_at >= _COUNT_S:
            size_bytes = sum(kept.size_bytes for kept in scan_cache(self.folder))
            with self._lock:
                self._counted = now, size_bytes
        return size_bytes

    def report_once(self, error: OSError) -> None:
        """Tell once that something went wrong that costs only time."""
        name = errors.errno_name(error)
        with self._lock:
            if name in self._told:
                return
            self._told.add(name)
        self._telemetry.record_error(str(self.folder), "cache", error)

    def is_verified(self, block: tuple[str, int], signature: tuple[int, int, int]) -> bool:
        """Tell whether a block was found sound, and is the same file still."""
        return self._verified.get(block) == signature

    def mark_verified(self, block: tuple[str, int], signature: tuple[int, int, int]) -> None:
        """Take note that a block is sound."""
        with self._lock:
            if len(self._verified) >= _MAX_VERIFIED:
                self._verified.clear()
            self._verified[block] = signature

    def discard_corrupt(self, path: str) -> None:
        """Remove a block that is not what was written, and tell."""
        self._telemetry.count("cache_blocks_bad")
        with suppress(OSError):
            os.unlink(path)
        self.report_once(errors.corrupt(path, "a block on disk was altered; it is fetched again"))

    def now_ns(self) -> int:
        """Return the time, nanoseconds since 1970."""
        return int(self._clock.now() * 1e9)


class BlockFile:
    """The blocks of one file. Made by `BlockCache.open`; after `close` they may go."""

    def __init__(self, cache: BlockCache, digest: "hashlib._Hash", about: bytes) -> None:
        self._cache = cache
        self._name = digest.hexdigest()[:40]
        self._folder = str(cache.folder / self._name)
        self._about = about
        self._lock = threading.Lock()
        #: Held by who checks a block, one of them for every so many blocks.
        self._checks = tuple(threading.Lock() for _ in range(_CHECKS_AT_ONCE))
        # Replaced under _lock where somebody removed the folder; who is claiming a block by the old
        # ones goes on with those, so all of them stay open until the end.
        self._locks: ByteRangeLocks | None = None
        self._held: list[ByteRangeLocks] = []
        with self._lock:
            if os.path.isdir(self._folder):
                self._try_lock()

    def close(self) -> None:
        """Let its blocks go when others need room. No other method may be called afterwards."""
        self._cache.descriptors.drop(self._name)
        with self._lock:
            for locks in self._held:
                locks.close()
            self._held.clear()
            self._locks = None

    def has(self, index: int) -> bool:
        """Tell whether block `index` is there; whether it is sound turns out when it is read."""
        return is_regular(self._path(index))

    def read(self, index: int, start: int, stop: int, length: int) -> bytes | None:
        """Return the bytes [start, stop) of block `index`; as `read_into`, None for False."""
        data = bytearray(stop - start)
        is_there = self.read_into(index, start, memoryview(data), length)
        return bytes(data) if is_there else None

    def read_into(
        self,
        index: int,
        start: int,
        buffer: memoryview,
        length: int,
        waiting: BlockingSection = nullcontext,
    ) -> bool:
        """Fill `buffer` from block `index`; return whether that is there, and sound.

        Args:
            index: which block.
            start: within the block.
            buffer: of bytes, not empty, and no longer than what follows `start`; holds anything
                where the block cannot be had.
            length: of the whole block.
            waiting: entered while the disk is waited for.
        """
        try:
            descriptor = self._open_verified(index, length, waiting)
            if descriptor is None:
                return False
            return self._cache.descriptors.read(descriptor, buffer, start, waiting)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._cache.report_once(error)
            return False

    def read_from_open_fd(
        self, index: int, start: int, buffer: memoryview, waiting: BlockingSection
    ) -> bool:
        """As `read_into`, with a block alone that was read within a second: in half the time."""
        descriptors = self._cache.descriptors
        descriptor = descriptors.recent((self._name, index))
        if descriptor is None:
            return False
        try:
            return descriptor.is_intact() and descriptors.read(descriptor, buffer, start, waiting)
        except OSError:
            return False  # `read_into` will tell

    def put(self, index: int, data: bytes) -> bool:
        """Keep a block; return whether it is on disk now."""
        draft = self.begin_write(index, len(data))
        if draft is None:
            return False
        with closing(draft):
            try:
                draft.write(data)
            except OSError as error:
                self._cache.report_once(error)
                return False
            return self.commit(index, draft)

    def begin_write(self, index: int, length: int) -> BlockWriter | None:
        """Begin to keep block `index` as it comes, None where there is no room; to be closed."""
        try:
            return self._begin(index) if self._cache.reserve_space(length + TRAILER_BYTES) else None
        except OSError as error:
            self._cache.report_once(error)
            return None

    def commit(self, index: int, draft: BlockWriter) -> bool:
        """Keep a draft that is whole as block `index`; return whether it is on disk now."""
        try:
            try:
                self._commit(index, draft)
            except FileNotFoundError:  # somebody removed the folder meanwhile
                with closing(self._begin(index)) as another:
                    another.write(draft.read_back())
                    self._commit(index, another)
        except OSError as error:
            self._cache.report_once(error)
            return False
        return True

    def commit_partial(self, index: int, draft: BlockWriter) -> None:
        """Keep what came of block `index`, which broke off, for who claims the block next."""
        with suppress(OSError):  # it costs a little more to fetch, no more
            draft.commit(self._part_path(index), self._cache.now_ns())

    def has_partial(self, index: int) -> bool:
        """Tell whether the start of block `index` was kept."""
        return is_regular(self._part_path(index))

    def tell(self, error: OSError) -> None:
        """As of `BlockCache`."""
        self._cache.report_once(error)

    def read_partial(self, index: int) -> bytes:
        """Return the start of block `index` that was kept, empty for none."""
        try:
            fd = open_regular(self._part_path(index), os.O_RDONLY)
        except OSError:
            return b""
        try:
            size_bytes = os.fstat(fd).st_size - TRAILER_BYTES
            is_good = is_intact(fd, self._name, index)
            if is_good:
                return os.pread(fd, size_bytes, 0)
            os.unlink(self._part_path(index))
            return b""
        except OSError:
            return b""
        finally:
            os.close(fd)

    def drop_partial(self, index: int) -> None:
        """Forget the start of block `index`."""
        with suppress(OSError):
            os.unlink(self._part_path(index))

    def drop(self, index: int) -> None:
        """Remove a block."""
        with suppress(OSError):
            os.unlink(self._path(index))

    @contextmanager
    def lock_block(self, index: int, timeout_s: float) -> Iterator[bool]:
        """Be the only one, of all processes, to fetch block `index`.

        Whoever waited should look whether the block is there now. After `patience_s` seconds the
        body runs anyhow: two fetches are no harm.

        Yields:
            whether nobody else is known to fetch it; so it is where there are no locks.
        """
        byte, locks = 1 + index, self._locks
        is_held, is_free = False, True
        try:
            if locks is not None:
                is_held = is_free = locks.acquire(byte, timeout_s=timeout_s)
        except OSError as error:
            self._cache.report_once(error)
        try:
            yield is_free
        finally:
            if is_held and locks is not None:
                with suppress(OSError):  # closed meanwhile: it is free then
                    locks.release(byte)

    def ensure_directory(self) -> None:
        """Make its folder and lock, so that other processes see what is fetched."""
        with self._lock:
            if self._locks is None:
                self._try_lock()

    def _open_verified(self, index: int, length: int, waiting: BlockingSection) -> CachedFd | None:
        """Return a block, open, found sound and said to be used; None where it is not sound.

        Raises:
            OSError: there is none, or it cannot be opened.
        """
        key, kept = (self._name, index), self._cache.descriptors
        descriptor = kept.get(key)
        status = None if descriptor is None else os.fstat(descriptor.fd)
        if descriptor is None or status is None or not status.st_nlink:
            # None yet, or it was removed since, and another may be in its place.
            descriptor = CachedFd(open_regular(self._path(index), os.O_RDONLY))
            status = os.fstat(descriptor.fd)
        if not self._is_sound(descriptor.fd, index, status, length, waiting):
            self._cache.discard_corrupt(self._path(index))
            return None
        descriptor.mark_intact(status)
        kept.keep(key, descriptor)
        now_ns = self._cache.now_ns()
        if abs(now_ns - status.st_atime_ns) > _TOUCH_S * 1e9:
            os.utime(descriptor.fd, ns=(now_ns, status.st_mtime_ns))
        return descriptor

    def _is_sound(
        self, fd: int, index: int, status: os.stat_result, length: int, waiting: BlockingSection
    ) -> bool:
        """Tell whether an open block is sound, looking at all of it once however many ask."""
        block = (self._name, index)
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._cache.is_verified(block, signature):
            return True
        with waiting(), self._checks[index % len(self._checks)]:
            if self._cache.is_verified(block, signature):
                return True
            # Of another user: put there by the owner of a directory that ours lies in.
            is_ours = status.st_uid == os.getuid() and status.st_size == length + TRAILER_BYTES
            if not is_ours or not is_intact(fd, self._name, index):
                return False
            self._cache.mark_verified(block, signature)
            return True

    def _path(self, index: int) -> str:
        return f"{self._folder}/{index}"

    def _part_path(self, index: int) -> str:
        return f"{self._folder}/.{index}.part"

    def _try_lock(self) -> None:
        """Make the folder, and hold it open, if possible; the caller holds the lock."""
        if not self._cache.is_on and not os.path.isdir(self._folder):
            return
        try:
            if self._cache.has_locks:
                self._locks = self._open_lock()
                self._held.append(self._locks)
            else:
                _make_private(self._folder)
        except OSError as error:
            self._cache.report_once(error)
        with suppress(OSError):
            write_about(self._folder, self._about)

    def _open_lock(self) -> ByteRangeLocks:
        while True:
            _make_private(self._folder)
            locks = ByteRangeLocks(_open_replacing(f"{self._folder}/lock"))
            try:
                is_held = locks.acquire(0, is_shared=True, timeout_s=_OPEN_PATIENCE_S)
                if is_held and not locks.is_linked():  # who removed the file has just let go of it
                    locks.close()
                    continue
            except OSError as error:
                locks.close()
                raise errors.not_lockable(error) from None
            return locks

    def _begin(self, index: int) -> BlockWriter:
        try:
            return BlockWriter(self._folder, self._name, index)
        except FileNotFoundError:  # the first block, or somebody removed the folder
            with self._lock:
                self._try_lock()
            return BlockWriter(self._folder, self._name, index)

    def _commit(self, index: int, draft: BlockWriter) -> None:
        status = draft.commit(self._path(index), self._cache.now_ns())
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        self._cache.mark_verified((self._name, index), signature)


def _open_replacing(path: str) -> int:
    """Open a lock file for reading and writing, made if absent; remove what is not a file first."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        return open_regular(path, flags)
    except OSError:
        # Left there, it would keep the blocks beside it from being evicted for good.
        if is_regular(path) or not os.path.lexists(path):
            raise
        os.unlink(path)
        return open_regular(path, flags)


def _make_private(folder: str) -> None:
    """Make a folder, and those above it, for this user alone."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_private(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
