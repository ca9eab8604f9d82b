"""Block cache on disk, shared by all mounts of a user.

    blocks/<file>/about      description of the file; its last line is the length, or empty
                  lock       byte 0: shared lock of every process that has the file open;
                             byte 1 + n: lock of the process that downloads block n
                  <n>        block n, followed by its checksum
                  .<n>.part  start of block n, followed by its checksum; evicted after some minutes

The directory is its own index, so no second record can disagree with it. A block is written to a
temporary file and renamed: a killed process leaves no partial block under a block's name. The
checksum detects later corruption; a process verifies it when it first reads the block. Recency is
the access time, which is set explicitly, because most file systems are mounted with `relatime`.

No method raises for disk errors. A block that cannot be read or written is downloaded again, and
the error is reported once. All classes are thread-safe.
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

#: Number of blocks of one file that can be verified at the same time.
_CONCURRENT_CHECKS = 8

#: The access time of a block is updated when it is older than this, seconds.
_TOUCH_S = 60.0

#: Wait at most this long for the lock of a file that another process is removing, seconds.
_OPEN_TIMEOUT_S = 2.0

#: Maximum number of blocks remembered as verified; the record is cleared beyond it.
_MAX_VERIFIED = 262_144

#: Maximum age of the cache's size on disk, seconds. File managers request the free space with
#: every directory, and a scan of a large cache takes a noticeable time.
_USAGE_TTL_S = 5.0


#: Stands for a cache directory that does not exist and cannot be created.
_NOWHERE = Path("/proc/self/no-cache")


class BlockCache:
    """Caches blocks of files on disk.

    Args:
        directory: created with mode 0700 when the first block is stored; None disables the cache.
        telemetry: receives counters and errors.
        clock: `now` provides access times, `monotonic` spaces scans.
        max_bytes: bound on the size of the cache; 0 caches nothing.
        min_free_bytes: minimum free space to leave on the disk.
    """

    def __init__(
        self,
        directory: Path | None,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        *,
        max_bytes: int,
        min_free_bytes: int,
    ) -> None:
        max_bytes = max_bytes if directory is not None else 0
        self.directory = directory or _NOWHERE
        #: Whether new blocks may be stored.
        self.is_on = max_bytes > 0
        #: Whether the file system has locks that end with their process.
        self.has_locks = self.is_on and can_lock_files(self.directory)
        self.fd_cache = FdCache()
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._evictor = Evictor(
            self.directory,
            clock,
            max_bytes=max_bytes,
            min_free_bytes=min_free_bytes,
            has_locks=self.has_locks,
        )
        self._verified: dict[tuple[str, int], tuple[int, int, int]] = {}  # read without _lock
        self._reported: set[str] = set()
        self._usage = (float("-inf"), 0)  # time of the scan on the monotonic clock, and bytes

    def open(self, key: str, description: str, length_bytes: int | None = None) -> "BlockFile":
        """Return the file of `key`. Its blocks are not evicted until it is closed.

        Args:
            key: identifies the content; another version of a file needs another key.
            description: text for users.
            length_bytes: length of the whole file, for users; None if unknown.
        """
        length = "" if length_bytes is None else str(length_bytes)
        about = f"{description}\n{length}".encode("utf-8", "surrogatepass")
        return BlockFile(self, hashlib.sha256(key.encode("utf-8", "surrogatepass")), about)

    def reserve_space(self, size_bytes: int) -> bool:
        """Make room for a block by eviction, and return whether it fits.

        Raises:
            OSError: the cache directory cannot be read.
        """
        if not self.is_on:
            return False
        with self._lock:
            is_reserved = self._evictor.reserve(size_bytes)
            reason = self._evictor.rejection
        if not is_reserved:
            self._telemetry.count("block_cache_write_rejections")
            self.report_once(errors.no_space(str(self.directory), f"no room for a block: {reason}"))
        return is_reserved

    def usage_bytes(self) -> int:
        """Return the disk usage of the cache, including other processes; at most 5 s old.

        Raises:
            OSError: the cache directory cannot be read.
        """
        with self._lock:
            scanned_at, size_bytes = self._usage
        now = self._clock.monotonic()
        if self.is_on and now - scanned_at >= _USAGE_TTL_S:
            size_bytes = sum(file.size_bytes for file in scan_cache(self.directory))
            with self._lock:
                self._usage = now, size_bytes
        return size_bytes

    def report_once(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        name = errors.errno_name(error)
        with self._lock:
            if name in self._reported:
                return
            self._reported.add(name)
        self._telemetry.record_error(str(self.directory), "cache", error)

    def is_verified(self, block: tuple[str, int], signature: tuple[int, int, int]) -> bool:
        """Return whether a block was verified and its file is unchanged since."""
        return self._verified.get(block) == signature

    def mark_verified(self, block: tuple[str, int], signature: tuple[int, int, int]) -> None:
        """Record that the checksum of a block matches."""
        with self._lock:
            if len(self._verified) >= _MAX_VERIFIED:
                self._verified.clear()
            self._verified[block] = signature

    def discard_corrupt(self, path: str) -> None:
        """Remove a corrupt block, and report it."""
        self._telemetry.count("block_cache_corruptions")
        with suppress(OSError):
            os.unlink(path)
        self.report_once(
            errors.corrupt(path, "a block on disk was altered; it is downloaded again")
        )

    def now_ns(self) -> int:
        """Return the time, nanoseconds since 1970."""
        return int(self._clock.now() * 1e9)


class BlockFile:
    """The cached blocks of one file, which are not evicted until it is closed."""

    def __init__(self, cache: BlockCache, digest: "hashlib._Hash", about: bytes) -> None:
        self._cache = cache
        self._name = digest.hexdigest()[:40]
        self._directory = str(cache.directory / self._name)
        self._about = about
        self._lock = threading.Lock()
        #: Held while a block is verified; each lock serves every nth block.
        self._checks = tuple(threading.Lock() for _ in range(_CONCURRENT_CHECKS))
        # Replaced under _lock after another process removed the directory. A thread that holds a
        # block's lock in the old file continues with that, so all of them stay open until `close`.
        self._locks: ByteRangeLocks | None = None
        self._open_locks: list[ByteRangeLocks] = []
        with self._lock:
            if os.path.isdir(self._directory):
                self._try_lock()

    def close(self) -> None:
        """Allow the eviction of the blocks. No other method may be called afterwards."""
        self._cache.fd_cache.drop(self._name)
        with self._lock:
            for locks in self._open_locks:
                locks.close()
            self._open_locks.clear()
            self._locks = None

    def has(self, index: int) -> bool:
        """Return whether block `index` is cached; it is verified when it is read."""
        return is_regular(self._path(index))

    def read(self, index: int, start: int, stop: int, length: int) -> bytes | None:
        """Return the bytes [start, stop) of block `index`; None if `read_into` fails."""
        data = bytearray(stop - start)
        is_read = self.read_into(index, start, memoryview(data), length)
        return bytes(data) if is_read else None

    def read_into(
        self,
        index: int,
        start: int,
        buffer: memoryview,
        length: int,
        blocking: BlockingSection = nullcontext,
    ) -> bool:
        """Fill `buffer` from block `index`; return whether it is cached and intact.

        Args:
            index: block index.
            start: offset within the block.
            buffer: not empty, and not longer than the rest of the block; its content is undefined
                if the method returns False.
            length: length of the whole block.
            blocking: entered while the disk is read.
        """
        try:
            fd = self._open_verified(index, length, blocking)
            if fd is None:
                return False
            return self._cache.fd_cache.read(fd, buffer, start, blocking)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._cache.report_once(error)
            return False

    def read_from_open_fd(
        self, index: int, start: int, buffer: memoryview, blocking: BlockingSection
    ) -> bool:
        """Do the same as `read_into`, but only for a block that was read within a second.

        This is the fast path: the block is neither opened nor verified again.
        """
        fd_cache = self._cache.fd_cache
        fd = fd_cache.recent((self._name, index))
        if fd is None:
            return False
        try:
            return fd.is_intact() and fd_cache.read(fd, buffer, start, blocking)
        except OSError:
            return False  # `read_into` will report it

    def put(self, index: int, data: bytes) -> bool:
        """Store a block; return whether it is on disk."""
        writer = self.begin_write(index, len(data))
        if writer is None:
            return False
        with closing(writer):
            try:
                writer.write(data)
            except OSError as error:
                self._cache.report_once(error)
                return False
            return self.commit(index, writer)

    def begin_write(self, index: int, length: int) -> BlockWriter | None:
        """Return a writer for block `index`, to be closed; None if it does not fit."""
        try:
            return self._begin(index) if self._cache.reserve_space(length + TRAILER_BYTES) else None
        except OSError as error:
            self._cache.report_once(error)
            return None

    def commit(self, index: int, writer: BlockWriter) -> bool:
        """Store a completely written block; return whether it is on disk."""
        try:
            try:
                self._commit(index, writer)
            except FileNotFoundError:  # another process removed the directory
                with closing(self._begin(index)) as second_writer:
                    second_writer.write(writer.read_back())
                    self._commit(index, second_writer)
        except OSError as error:
            self._cache.report_once(error)
            return False
        return True

    def commit_partial(self, index: int, writer: BlockWriter) -> None:
        """Store the start of block `index`, so that the next download can resume."""
        with suppress(OSError):  # the next download starts at the beginning
            writer.commit(self._partial_path(index), self._cache.now_ns())

    def has_partial(self, index: int) -> bool:
        """Return whether the start of block `index` is stored."""
        return is_regular(self._partial_path(index))

    def report(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        self._cache.report_once(error)

    def read_partial(self, index: int) -> bytes:
        """Return the stored start of block `index`, empty if there is none."""
        try:
            fd = open_regular(self._partial_path(index), os.O_RDONLY)
        except OSError:
            return b""
        try:
            size_bytes = os.fstat(fd).st_size - TRAILER_BYTES
            if is_intact(fd, self._name, index):
                return os.pread(fd, size_bytes, 0)
            os.unlink(self._partial_path(index))
            return b""
        except OSError:
            return b""
        finally:
            os.close(fd)

    def drop_partial(self, index: int) -> None:
        """Remove the stored start of block `index`."""
        with suppress(OSError):
            os.unlink(self._partial_path(index))

    def drop(self, index: int) -> None:
        """Remove a block."""
        with suppress(OSError):
            os.unlink(self._path(index))

    @contextmanager
    def lock_block(self, index: int, timeout_s: float) -> Iterator[bool]:
        """Lock block `index` against downloads by other processes.

        The body runs even if the lock is not free within `timeout_s` seconds, because a second
        download does no harm. The caller should check whether the block is cached by then.

        Yields:
            whether no other process is known to download the block.
        """
        byte, locks = 1 + index, self._locks
        is_locked, is_free = False, True
        try:
            if locks is not None:
                is_locked = is_free = locks.acquire(byte, timeout_s=timeout_s)
        except OSError as error:
            self._cache.report_once(error)
        try:
            yield is_free
        finally:
            if is_locked and locks is not None:
                with suppress(OSError):  # closed in the meantime, which also released the lock
                    locks.release(byte)

    def ensure_directory(self) -> None:
        """Create the directory and the lock file, so that other processes see the locks."""
        with self._lock:
            if self._locks is None:
                self._try_lock()

    def _open_verified(self, index: int, length: int, blocking: BlockingSection) -> CachedFd | None:
        """Return an open, verified block and update its access time; None if corrupt.

        Raises:
            OSError: the block is not cached, or cannot be opened.
        """
        key, fd_cache = (self._name, index), self._cache.fd_cache
        fd = fd_cache.get(key)
        status = None if fd is None else os.fstat(fd.fd)
        if fd is None or status is None or not status.st_nlink:
            # Not open yet, or removed; a removed block may have been stored again.
            fd = CachedFd(open_regular(self._path(index), os.O_RDONLY))
            status = os.fstat(fd.fd)
        if not self._verify(fd.fd, index, status, length, blocking):
            self._cache.discard_corrupt(self._path(index))
            return None
        fd.mark_intact(status)
        fd_cache.keep(key, fd)
        now_ns = self._cache.now_ns()
        if abs(now_ns - status.st_atime_ns) > _TOUCH_S * 1e9:
            os.utime(fd.fd, ns=(now_ns, status.st_mtime_ns))
        return fd

    def _verify(
        self, fd: int, index: int, status: os.stat_result, length: int, blocking: BlockingSection
    ) -> bool:
        """Return whether an open block is intact; concurrent readers share one check."""
        block = (self._name, index)
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._cache.is_verified(block, signature):
            return True
        with blocking(), self._checks[index % len(self._checks)]:
            if self._cache.is_verified(block, signature):
                return True
            # The owner of the parent directory could have put a file of another user there.
            is_ours = status.st_uid == os.getuid() and status.st_size == length + TRAILER_BYTES
            if not is_ours or not is_intact(fd, self._name, index):
                return False
            self._cache.mark_verified(block, signature)
            return True

    def _path(self, index: int) -> str:
        return f"{self._directory}/{index}"

    def _partial_path(self, index: int) -> str:
        return f"{self._directory}/.{index}.part"

    def _try_lock(self) -> None:
        """Create the directory and lock it if possible; the caller holds `_lock`."""
        if not self._cache.is_on and not os.path.isdir(self._directory):
            return
        try:
            if self._cache.has_locks:
                self._locks = self._open_lock()
                self._open_locks.append(self._locks)
            else:
                _make_private(self._directory)
        except OSError as error:
            self._cache.report_once(error)
        with suppress(OSError):
            write_about(self._directory, self._about)

    def _open_lock(self) -> ByteRangeLocks:
        while True:
            _make_private(self._directory)
            locks = ByteRangeLocks(_open_replacing(f"{self._directory}/lock"))
            try:
                is_locked = locks.acquire(0, is_shared=True, timeout_s=_OPEN_TIMEOUT_S)
                if is_locked and not locks.is_linked():  # another process removed the directory
                    locks.close()
                    continue
            except OSError as error:
                locks.close()
                raise errors.not_lockable(error) from None
            return locks

    def _begin(self, index: int) -> BlockWriter:
        try:
            return BlockWriter(self._directory, self._name, index)
        except FileNotFoundError:  # the first block, or another process removed the directory
            with self._lock:
                self._try_lock()
            return BlockWriter(self._directory, self._name, index)

    def _commit(self, index: int, writer: BlockWriter) -> None:
        status = writer.commit(self._path(index), self._cache.now_ns())
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        self._cache.mark_verified((self._name, index), signature)


def _open_replacing(path: str) -> int:
    """Open or create a lock file, removing a file of another type that has its name."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        return open_regular(path, flags)
    except OSError:
        # That file would prevent the eviction of the blocks in its directory.
        if is_regular(path) or not os.path.lexists(path):
            raise
        os.unlink(path)
        return open_regular(path, flags)


def _make_private(directory: str) -> None:
    """Create a directory and its parents with mode 0700."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_private(os.path.dirname(directory))
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
