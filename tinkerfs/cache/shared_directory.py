"""A directory that many hosts share as a cache: its space, and what of it is in memory."""

import threading
from contextlib import suppress
from pathlib import Path

from cachetools import LRUCache

from tinkerfs.cache.bounded_access import BOUND_S, BoundedAccess
from tinkerfs.cache.extent_files import Extent
from tinkerfs.cache.space import CacheSpace
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.telemetry import Telemetry

#: A scan is due after this share (one nth) of the bound was added. Smaller than for one host,
#: because each of many hosts exceeds the bound by that share.
_SCAN_SHARE = 256

#: Number of extents that can be loaded at the same time.
_CONCURRENT_LOADS = 32


class SharedDirectory(CacheSpace):
    """The directory of a shared cache; see `CacheSpace`.

    Args:
        owner: user id that files of this host get there.
        memory_bytes: bound on the extents in memory.
        bound_s: how long an access may take, seconds.

    Attributes:
        access: runs everything that may hang.
        loaded: the extents in memory.
    """

    def __init__(
        self,
        directory: Path,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        *,
        owner: int,
        has_locks: bool,
        max_bytes: int,
        min_free_bytes: int,
        memory_bytes: int,
        bound_s: float = BOUND_S,
    ) -> None:
        super().__init__(
            directory,
            telemetry,
            clock,
            max_bytes=max_bytes,
            min_free_bytes=min_free_bytes,
            has_locks=has_locks,
            scan_share=_SCAN_SHARE,
        )
        self.owner = owner
        self.access = BoundedAccess(directory, telemetry, bound_s=bound_s)
        self.loaded = LoadedExtents(memory_bytes)
        self._loading = tuple(threading.Lock() for _ in range(_CONCURRENT_LOADS))
        self._last_usage_bytes = 0
        telemetry.add_gauge("shared_cache_hangs", lambda: int(self.access.is_set_aside))

    def usage_bytes(self) -> int:
        """Return the disk usage of the cache; the last one if the file system hangs.

        Raises:
            OSError: the cache directory cannot be read.
        """
        with suppress(TimeoutError):
            self._last_usage_bytes = self.access.run(super().usage_bytes)
        return self._last_usage_bytes

    def free_bytes(self) -> int:
        """Return the free space on the file system, 0 if it hangs.

        Raises:
            OSError: the cache directory cannot be read.
        """
        try:
            return self.access.run(super().free_bytes)
        except TimeoutError:
            return 0

    def count(self, name: str) -> None:
        """Add 1 to a counter of the mount."""
        self._telemetry.count(name)

    def loading(self, key: tuple[str, Extent]) -> threading.Lock:
        """Return the lock that is held while an extent is loaded."""
        return self._loading[hash(key) % len(self._loading)]


class LoadedExtents:
    """Extents in memory, the least recently used of which are evicted. Thread-safe.

    Args:
        max_bytes: bound on their data; a larger extent is not cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._extents: LRUCache[tuple[str, Extent], bytes] = LRUCache(max_bytes, getsizeof=len)

    def __contains__(self, key: tuple[str, Extent]) -> bool:
        """Return whether an extent of a file is in memory."""
        return key in self._extents

    def get(self, key: tuple[str, Extent]) -> bytes | None:
        """Return the data of an extent of a file; None if it is not in memory."""
        with self._lock:
            return self._extents.get(key)

    def put(self, key: tuple[str, Extent], data: bytes) -> None:
        """Add an extent of a file."""
        with self._lock, suppress(ValueError):  # larger than the bound
            self._extents[key] = data

    def discard(self, key: tuple[str, Extent]) -> None:
        """Remove an extent if it is in memory."""
        with self._lock:
            self._extents.pop(key, None)
