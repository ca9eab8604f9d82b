"""What the block cache may take on disk, and which blocks go when it is too much.

Every process that uses the folder keeps count of what it adds, and looks at all of it again when
that is a 32nd of the bound: so processes that know nothing of each other stay within it. Least
recently used goes first, but nothing of a file that any process has open (byte 0 of its lock).
Where files cannot be locked what is open may go too: its reader fetches it again.
"""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.clock import Clock
from tinkerfs.safe_open import open_regular

#: A draft that is so old was left by a process that was killed, seconds.
_DRAFT_AGE_S = 600.0

#: Where nothing could be removed, nobody looks again so soon, seconds.
_FULL_AGE_S = 1.0

#: The share of the bound that is added between two looks.
_SHARE = 32


@dataclass(frozen=True, slots=True)
class CacheFileInfo:
    """One file in a folder of the cache.

    Attributes:
        folder: the name of its folder.
        path: where it is.
        index: which block it is; None for a draft.
        length_bytes: of the file, checksum included.
        size_bytes: on disk.
        used_ns: when it was last read, nanoseconds since 1970.
        fetched_ns: when it was written.
    """

    folder: str
    path: str
    index: int | None
    length_bytes: int
    size_bytes: int
    last_access_ns: int
    fetched_ns: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Whether the blocks of a folder may be removed, and the locks by which that stays so.

    Attributes:
        is_free: no process has the file open, or there is no way to know.
        locks: held until `close`; None where there are none.
    """

    is_free: bool
    locks: ByteRangeLocks | None = None

    def close(self) -> None:
        """Let go of the folder."""
        if self.locks is not None:
            self.locks.close()


class Evictor:
    """Decides whether there is room for a block, and makes it. Not thread-safe.

    Args:
        root: the folder of folders.
        clock: `now` tells the age of drafts, `monotonic` spaces looks in vain.
        limit_bytes: bound on all of it; 0 keeps nothing.
        floor_bytes: what stays free on the disk.
        has_locks: whether locks on files hold there, and end with their process.
    """

    def __init__(
        self,
        root: Path,
        clock: Clock,
        *,
        max_bytes: int,
        min_free_bytes: int,
        has_locks: bool = True,
    ) -> None:
        self._root = root
        self._clock = clock
        self._limit_bytes = max_bytes
        self._floor_bytes = min_free_bytes
        self._has_locks = has_locks
        #: Why a block was last refused.
        self.refusal = ""
        #: What all had when last looked, None before that; and what was added since.
        self._found_bytes: int | None = None
        self._added_bytes = 0
        self._retry_after = 0.0

    def admit(self, size_bytes: int) -> bool:
        """Make room for `size_bytes` more, and return whether there is some.

        Raises:
            OSError: the disk cannot be looked at.
        """
        if size_bytes > self._limit_bytes:
            self.refusal = f"the cache may take {self._limit_bytes} bytes in all"
            return False
        if self._clock.monotonic() < self._retry_after:
            return False
        lacking_bytes = self._floor_bytes + size_bytes - free_bytes(self._root)
        added_bytes = self._added_bytes + size_bytes
        is_due = added_bytes > self._limit_bytes // _SHARE
        if self._found_bytes is None or is_due or self._is_full(size_bytes) or lacking_bytes > 0:
            self._sweep(size_bytes, lacking_bytes)
        is_full = self._is_full(size_bytes)
        if is_full or self._floor_bytes + size_bytes > free_bytes(self._root):
            self._retry_after = self._clock.monotonic() + _FULL_AGE_S
            self.refusal = (
                "the cache is full of open files"
                if is_full
                else f"the disk is full, up to {self._floor_bytes >> 20} MiB that stay free"
            )
            return False
        self._added_bytes += size_bytes
        return True

    def _is_full(self, size_bytes: int) -> bool:
        return (self._found_bytes or 0) + self._added_bytes + size_bytes > self._limit_bytes

    def _sweep(self, wanted_bytes: int, lacking_bytes: int) -> None:
        """Count all, and remove until `wanted_bytes` fit and `lacking_bytes` more are free."""
        files = scan_cache(self._root)
        now_ns = int(self._clock.now() * 1e9)
        # A draft counts as what it will be: it was admitted as that.
        total_bytes = sum(_counted_bytes(file, wanted_bytes) for file in files)
        keep_bytes = self._limit_bytes - max(self._limit_bytes // _SHARE, wanted_bytes)
        goal_bytes = min(keep_bytes, total_bytes - max(lacking_bytes, 0))
        held: dict[str, Hold] = {}
        try:
            for file in sorted(files, key=lambda file: file.last_access_ns):
                if file.index is None:
                    is_doomed = now_ns - file.fetched_ns > _DRAFT_AGE_S * 1e9
                else:
                    is_doomed = total_bytes > goal_bytes
                    if is_doomed and file.folder not in held:
                        held[file.folder] = self._hold(self._root / file.folder)
                    is_doomed = is_doomed and held[file.folder].is_free
                if is_doomed:
                    with suppress(FileNotFoundError):
                        os.unlink(file.path)
                    total_bytes -= _counted_bytes(file, wanted_bytes)
        finally:
            for folder, hold in held.items():
                if hold.is_free:
                    remove_folder(self._root / folder)
                hold.close()
        self._found_bytes, self._added_bytes = total_bytes, 0

    def _hold(self, folder: Path) -> Hold:
        return hold_alone(folder) if self._has_locks else Hold(is_free=True)


def _counted_bytes(file: CacheFileInfo, block_bytes: int) -> int:
    return file.size_bytes if file.index is not None else max(file.size_bytes, block_bytes)


def block_of(name: str) -> int | None:
    """Return the index of the block that a file name stands for, None for another file."""
    return int(name) if name.isascii() and name.isdigit() else None


def free_bytes(directory: Path) -> int:
    """Return what is free on the disk that holds a directory, or would hold it once it is made.

    Raises:
        OSError: the disk does not say.
    """
    while True:
        try:
            status = os.statvfs(directory)
        except FileNotFoundError:
            directory = directory.parent
        else:
            return status.f_bavail * status.f_frsize


def scan_cache(root: Path) -> list[CacheFileInfo]:
    """Return every block and draft; none where there is no such folder.

    Raises:
        OSError: it cannot be read.
    """
    kept: list[CacheFileInfo] = []
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return kept
    for folder in folders:
        with suppress(FileNotFoundError):  # another process removes as well
            for entry in os.scandir(root / folder):
                index = block_of(entry.name)
                if index is None and not entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):  # unlink(2) would fail at every eviction
                        continue
                    size_bytes = max(status.st_size, status.st_blocks * 512)
                    times = status.st_atime_ns, status.st_mtime_ns
                    kept.append(
                        CacheFileInfo(folder, entry.path, index, status.st_size, size_bytes, *times)
                    )
    return kept


def hold_alone(folder: Path) -> Hold:
    """Return the hold on a folder of the cache; the caller closes it."""
    try:
        locks = ByteRangeLocks(open_regular(folder / "lock", os.O_RDWR))
    except FileNotFoundError:  # made where files could not be locked
        return Hold(is_free=True)
    except OSError:
        return Hold(is_free=False)
    try:
        if locks.acquire(0):
            return Hold(is_free=locks.is_linked(), locks=locks)
    except OSError:  # no locks here: a block that is in use is fetched again
        locks.close()
        return Hold(is_free=True)
    locks.close()
    return Hold(is_free=False)


def remove_folder(folder: Path) -> None:
    """Remove a folder of the cache where no block is left in it; the caller holds it alone.

    The lock goes before the folder: who opens it in between makes both anew.
    """
    names = set()
    with suppress(OSError):
        names = set(os.listdir(folder))
    if names <= {"about", "lock"}:
        with suppress(OSError):
            for name in sorted(names):
                os.unlink(folder / name)
            os.rmdir(folder)
