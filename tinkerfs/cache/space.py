"""The space of a block cache on disk: its bound, its usage, and its errors."""

import threading
from pathlib import Path

from tinkerfs import errors
from tinkerfs.cache.eviction import Evictor, free_bytes, scan_cache
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.telemetry import Telemetry

#: Maximum age of the cache's size on disk, seconds. File managers request the free space with
#: every directory, and a scan of a large cache takes a noticeable time.
_USAGE_TTL_S = 5.0

#: Stands for a cache directory that does not exist; nothing is created in it.
_NOWHERE = Path("/nonexistent/tinkerfs")


class CacheSpace:
    """The directory of a block cache, and the space in it. Thread-safe.

    Args:
        directory: created with mode 0700 when the first block is stored; None disables the cache.
        telemetry: receives counters and errors.
        clock: `now` provides access times, `monotonic` spaces scans.
        max_bytes: bound on the size of the cache; 0 caches nothing.
        min_free_bytes: minimum free space to leave on the disk.
        has_locks: whether the file system has locks that end with their process.
        scan_share: the cache is scanned again after this share (one nth) of the bound was added.

    Attributes:
        is_on: whether new blocks may be stored.
    """

    def __init__(
        self,
        directory: Path | None,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        *,
        max_bytes: int,
        min_free_bytes: int,
        has_locks: bool,
        scan_share: int,
    ) -> None:
        max_bytes = max_bytes if directory is not None else 0
        self.directory = directory or _NOWHERE
        self.is_on = max_bytes > 0
        self.has_locks = has_locks
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._evictor = Evictor(
            self.directory,
            clock,
            max_bytes=max_bytes,
            min_free_bytes=min_free_bytes,
            has_locks=has_locks,
            scan_share=scan_share,
        )
        self._reported: set[str] = set()
        self._usage = (float("-inf"), 0)  # time of the scan on the monotonic clock, and bytes

    def reserve_space(self, size_bytes: int) -> bool:
        """Make room for units by eviction, and return whether it fits; see `release_space`.

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

    def release_space(self, size_bytes: int) -> None:
        """Record that units, for which space was reserved, are written or discarded."""
        with self._lock:
            self._evictor.release(size_bytes)

    def usage_bytes(self) -> int:
        """Return the disk usage of the cache, including other processes; at most 5 s old.

        Raises:
            OSError: the cache directory cannot be read.
        """
        with self._lock:
            scanned_at, size_bytes = self._usage
        now = self._clock.monotonic()
        if self.is_on and now - scanned_at >= _USAGE_TTL_S:
            size_bytes = sum(each.size_bytes for each in scan_cache(self.directory))
            with self._lock:
                self._usage = now, size_bytes
        return size_bytes

    def free_bytes(self) -> int:
        """Return the free space on the disk of the cache.

        Raises:
            OSError: the cache directory cannot be read.
        """
        return free_bytes(self.directory)

    def report_once(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        name = errors.errno_name(error)
        with self._lock:
            if name in self._reported:
                return
            self._reported.add(name)
        self._telemetry.record_error(str(self.directory), "cache", error)

    def report_corrupt(self, directory: str) -> None:
        """Report a corrupt unit, which was dropped."""
        self._telemetry.count("block_cache_corruptions")
        message = "a block on disk was altered; it is downloaded again"
        self.report_once(errors.corrupt(directory, message))
