"""Bounds of the block cache on disk, and LRU eviction of its blocks.

Every process that uses the cache counts the bytes that it adds, and scans the whole cache again
after adding a 32nd of the bound. So independent processes stay within the bound together. Blocks
of a file that any process has open (byte 0 of its lock file) are never evicted. On file systems
without locks such blocks may be evicted, and their readers download them again.
"""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.clock import Clock
from tinkerfs.safe_open import open_regular

#: A temporary file of this age was left behind by a killed process, seconds.
_TEMPORARY_FILE_AGE_S = 600.0

#: Minimum time between two scans that could not free enough space, seconds.
_FULL_RETRY_S = 1.0

#: A scan is due after this share (one nth) of the bound has been added.
_SCAN_SHARE = 32


@dataclass(frozen=True, slots=True)
class CacheFileInfo:
    """One file in a directory of the cache.

    Attributes:
        directory: name of the directory, without its parents.
        path: path of the file.
        index: block index; None for a temporary file or the start of a block.
        length_bytes: file size, including the checksum.
        size_bytes: space on disk.
        last_access_ns: time of the last read, nanoseconds since 1970.
        fetched_ns: time of the write, nanoseconds since 1970.
    """

    directory: str
    path: str
    index: int | None
    length_bytes: int
    size_bytes: int
    last_access_ns: int
    fetched_ns: int


@dataclass(frozen=True, slots=True)
class DirectoryLock:
    """Whether a directory's blocks may be removed, and the locks that ensure it.

    Attributes:
        is_free: no process has the file open, or the file system has no locks.
        locks: held until `close`; None if there are no locks.
    """

    is_free: bool
    locks: ByteRangeLocks | None = None

    def close(self) -> None:
        """Release the locks."""
        if self.locks is not None:
            self.locks.close()


class Evictor:
    """Checks whether a block fits into the cache, and evicts others to make room.

    Not thread-safe.

    Args:
        root: the directory that has one directory for each file.
        clock: `now` measures the age of temporary files, `monotonic` spaces failed scans.
        max_bytes: bound on the size of the cache; 0 caches nothing.
        min_free_bytes: minimum free space to leave on the disk.
        has_locks: whether the file system has locks that end with their process.
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
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._has_locks = has_locks
        #: Why the last block was rejected.
        self.rejection = ""
        #: Size of the cache at the last scan, None before the first; and bytes added since.
        self._scanned_bytes: int | None = None
        self._added_bytes = 0
        self._retry_after = 0.0

    def reserve(self, size_bytes: int) -> bool:
        """Make room for `size_bytes` more, and return whether they fit.

        Raises:
            OSError: the disk cannot be read.
        """
        if size_bytes > self._max_bytes:
            self.rejection = f"the cache is limited to {self._max_bytes} bytes"
            return False
        if self._clock.monotonic() < self._retry_after:
            return False
        shortfall_bytes = self._min_free_bytes + size_bytes - free_bytes(self._root)
        added_bytes = self._added_bytes + size_bytes
        is_due = self._scanned_bytes is None or added_bytes > self._max_bytes // _SCAN_SHARE
        if is_due or self._is_full(size_bytes) or shortfall_bytes > 0:
            self._evict(size_bytes, shortfall_bytes)
        is_full = self._is_full(size_bytes)
        if is_full or self._min_free_bytes + size_bytes > free_bytes(self._root):
            self._retry_after = self._clock.monotonic() + _FULL_RETRY_S
            self.rejection = (
                "the cache is full of open files"
                if is_full
                else f"less than {self._min_free_bytes >> 20} MiB would stay free on the disk"
            )
            return False
        self._added_bytes += size_bytes
        return True

    def _is_full(self, size_bytes: int) -> bool:
        return (self._scanned_bytes or 0) + self._added_bytes + size_bytes > self._max_bytes

    def _evict(self, needed_bytes: int, shortfall_bytes: int) -> None:
        """Evict until `needed_bytes` fit and `shortfall_bytes` are freed."""
        files = scan_cache(self._root)
        now_ns = int(self._clock.now() * 1e9)
        # A temporary file counts as a whole block, because space was reserved for one.
        total_bytes = sum(_counted_bytes(file, needed_bytes) for file in files)
        target_bytes = self._max_bytes - max(self._max_bytes // _SCAN_SHARE, needed_bytes)
        target_bytes = min(target_bytes, total_bytes - max(shortfall_bytes, 0))
        locks: dict[str, DirectoryLock] = {}
        try:
            for file in sorted(files, key=lambda file: file.last_access_ns):
                if file.index is None:
                    should_evict = now_ns - file.fetched_ns > _TEMPORARY_FILE_AGE_S * 1e9
                else:
                    should_evict = total_bytes > target_bytes
                    if should_evict and file.directory not in locks:
                        locks[file.directory] = self._try_lock(self._root / file.directory)
                    should_evict = should_evict and locks[file.directory].is_free
                if should_evict:
                    with suppress(FileNotFoundError):
                        os.unlink(file.path)
                    total_bytes -= _counted_bytes(file, needed_bytes)
        finally:
            for directory, lock in locks.items():
                if lock.is_free:
                    remove_directory(self._root / directory)
                lock.close()
        self._scanned_bytes, self._added_bytes = total_bytes, 0

    def _try_lock(self, directory: Path) -> DirectoryLock:
        return try_lock_exclusive(directory) if self._has_locks else DirectoryLock(is_free=True)


def _counted_bytes(file: CacheFileInfo, block_bytes: int) -> int:
    return file.size_bytes if file.index is not None else max(file.size_bytes, block_bytes)


def block_of(name: str) -> int | None:
    """Return the block index for a file name, None for a file that is not a block."""
    return int(name) if name.isascii() and name.isdigit() else None


def free_bytes(directory: Path) -> int:
    """Return the free space on the disk of a directory, which need not exist.

    Raises:
        OSError: the disk cannot be read.
    """
    while True:
        try:
            status = os.statvfs(directory)
        except FileNotFoundError:
            directory = directory.parent
        else:
            return status.f_bavail * status.f_frsize


def scan_cache(root: Path) -> list[CacheFileInfo]:
    """Return every block and temporary file; empty if there is no directory.

    Raises:
        OSError: the cache directory cannot be read.
    """
    files: list[CacheFileInfo] = []
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return files
    for name in names:
        with suppress(FileNotFoundError):  # removed by another process
            for entry in os.scandir(root / name):
                index = block_of(entry.name)
                if index is None and not entry.name.startswith("."):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):  # unlink(2) would fail at every eviction
                        continue
                    size_bytes = max(status.st_size, status.st_blocks * 512)
                    times = status.st_atime_ns, status.st_mtime_ns
                    files.append(
                        CacheFileInfo(name, entry.path, index, status.st_size, size_bytes, *times)
                    )
    return files


def try_lock_exclusive(directory: Path) -> DirectoryLock:
    """Try to lock a cache directory against readers; the caller closes the lock."""
    try:
        locks = ByteRangeLocks(open_regular(directory / "lock", os.O_RDWR))
    except FileNotFoundError:  # created on a file system without locks
        return DirectoryLock(is_free=True)
    except OSError:
        return DirectoryLock(is_free=False)
    try:
        if locks.acquire(0):
            return DirectoryLock(is_free=locks.is_linked(), locks=locks)
    except OSError:  # no locks on this file system: a block in use is downloaded again
        locks.close()
        return DirectoryLock(is_free=True)
    locks.close()
    return DirectoryLock(is_free=False)


def remove_directory(directory: Path) -> None:
    """Remove a cache directory unless it has blocks; the caller holds its lock.

    The lock file is removed first, so that a process that opens the file in between creates both
    again.
    """
    names = set()
    with suppress(OSError):
        names = set(os.listdir(directory))
    if names <= {"about", "lock"}:
        with suppress(OSError):
            for name in sorted(names):
                os.unlink(directory / name)
            os.rmdir(directory)
