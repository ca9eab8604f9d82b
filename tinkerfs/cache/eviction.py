"""Bounds of the block cache on disk, and LRU eviction of its files.

Every process that uses the cache counts the bytes that it adds, and scans the whole cache again
after adding a share of the bound. So independent processes stay within the bound together. A file
that any process has open (byte 0 of its lock file) is never evicted. On file systems without locks
it may be; its readers keep the data until they have closed it.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.cache.data_files import remove
from tinkerfs.cache.data_layout import UNIT_BYTES
from tinkerfs.cache.extent_files import HEADER_BYTES, USED, extent_of
from tinkerfs.clock import Clock
from tinkerfs.safe_open import open_regular

#: Minimum time between two scans that could not free enough space, seconds.
_FULL_RETRY_S = 1.0

#: Files of a directory that remain while a process has it open.
_KEPT_NAMES = frozenset({"about", "lock"})


@dataclass(frozen=True, slots=True)
class CacheDirectoryInfo:
    """One directory of the cache, which has the data of one file.

    Attributes:
        name: without its parents.
        size_bytes: space on disk.
        last_access_ns: time of the last read, nanoseconds since 1970; 0 if there is no data.
        created_ns: time of its creation, nanoseconds since 1970.
    """

    name: str
    size_bytes: int
    last_access_ns: int
    created_ns: int


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
        clock: spaces failed scans.
        max_bytes: bound on the size of the cache; 0 caches nothing.
        min_free_bytes: minimum free space to leave on the disk.
        has_locks: whether the file system has locks that end with their process.
        scan_share: a scan is due after this share (one nth) of the bound was added.
    """

    def __init__(
        self,
        root: Path,
        clock: Clock,
        *,
        max_bytes: int,
        min_free_bytes: int,
        has_locks: bool,
        scan_share: int,
    ) -> None:
        self._root = root
        self._clock = clock
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._has_locks = has_locks
        self._scan_share_bytes = max_bytes // scan_share
        #: Why the last block was rejected.
        self.rejection = ""
        #: Size of the cache at the last scan, None before the first; bytes added since; and bytes
        #: that are being written.
        self._scanned_bytes: int | None = None
        self._added_bytes = 0
        self._reserved_bytes = 0
        self._retry_after = 0.0

    def reserve(self, size_bytes: int) -> bool:
        """Make room for `size_bytes` more, and return whether they fit; see `release`.

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
        is_due = self._scanned_bytes is None or added_bytes > self._scan_share_bytes
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
        self._reserved_bytes += size_bytes
        return True

    def release(self, size_bytes: int) -> None:
        """Record that bytes, which were reserved, have been written."""
        self._reserved_bytes -= size_bytes
        self._added_bytes += size_bytes

    def _is_full(self, size_bytes: int) -> bool:
        known_bytes = (self._scanned_bytes or 0) + self._added_bytes + self._reserved_bytes
        return known_bytes + size_bytes > self._max_bytes

    def _evict(self, needed_bytes: int, shortfall_bytes: int) -> None:
        """Evict until `needed_bytes` fit and `shortfall_bytes` are freed."""
        directories = scan_cache(self._root)
        total_bytes = sum(each.size_bytes for each in directories) + self._reserved_bytes
        target_bytes = self._max_bytes - max(self._scan_share_bytes, needed_bytes)
        target_bytes = min(target_bytes, total_bytes - max(shortfall_bytes, 0))
        for directory in sorted(directories, key=lambda each: each.last_access_ns):
            if total_bytes <= target_bytes:
                break
            path = self._root / directory.name
            lock = self._try_lock(path)
            if lock.is_free:
                remove_directory(path)
                total_bytes -= directory.size_bytes
            lock.close()
        self._scanned_bytes, self._added_bytes = total_bytes - self._reserved_bytes, 0

    def _try_lock(self, directory: Path) -> DirectoryLock:
        return try_lock_exclusive(directory) if self._has_locks else DirectoryLock(is_free=True)


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


def scan_cache(root: Path) -> list[CacheDirectoryInfo]:
    """Return every directory; empty if the cache does not exist.

    Raises:
        OSError: the cache directory cannot be read.
    """
    found: list[CacheDirectoryInfo] = []
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return found
    for name in names:
        with suppress(FileNotFoundError):  # removed by another process
            size_bytes, last_access_ns = 0, 0
            for entry in os.scandir(root / name):
                extent = extent_of(entry.name)
                if extent is not None:  # no request to the server for each of many files
                    size_bytes += HEADER_BYTES + (extent.stop - extent.first) * UNIT_BYTES
                    continue
                status = entry.stat(follow_symlinks=False)
                # Some file systems count no blocks.
                size_bytes += status.st_blocks * 512 or status.st_size
                if entry.name == "index":
                    last_access_ns = status.st_atime_ns
                elif entry.name == USED:
                    last_access_ns = status.st_mtime_ns
            created_ns = os.stat(root / name).st_mtime_ns
            with suppress(FileNotFoundError):
                created_ns = os.stat(root / name / "about").st_mtime_ns
            found.append(CacheDirectoryInfo(name, size_bytes, last_access_ns, created_ns))
    return found


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


def remove_data(directory: str | Path) -> None:
    """Remove the data of a directory; a process that has it open keeps it until it closes it."""
    with suppress(OSError):
        # The index first, because it says that there is data.
        for name in sorted(os.listdir(directory), reverse=True):
            if name not in _KEPT_NAMES:
                with suppress(OSError):
                    remove(f"{directory}/{name}")


def remove_directory(directory: Path) -> None:
    """Remove a directory of the cache; the caller holds its lock.

    A process that opens the file in between creates all files again.
    """
    remove_data(directory)
    with suppress(OSError):
        for name in sorted(_KEPT_NAMES, reverse=True):
            with suppress(FileNotFoundError):
                remove(f"{directory}/{name}")
        os.rmdir(directory)
