"""Memory pool for units of weights, in flight and cached, with one bound.

A transfer reserves memory before it starts: a chunk if its units are written to disk, otherwise all
of them. Units that cannot be written to disk stay in the pool while there is room. They are evicted
in LRU order. Prefetched units that have not been read yet are evicted last, because they would have
to be downloaded again.
"""

import threading
from collections import OrderedDict

from tinkerfs.cache.data_layout import UNIT_BYTES, units_of
from tinkerfs.clock import SYSTEM_CLOCK, Clock

#: File and number of the unit.
Key = tuple[str, int]

#: A prefetched unit that was not read within this time counts as read, seconds.
_PREFETCH_TTL_S = 10.0


class BlockMemoryPool:
    """Caches units in memory, and reserves memory for others. Thread-safe.

    Args:
        max_bytes: bound on cached and reserved bytes together.
        clock: `monotonic` measures the age of prefetched units.
    """

    def __init__(self, max_bytes: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._changed = threading.Condition()
        # All guarded by _changed.
        #: Units that have not been read, with the time of their arrival, the oldest first.
        self._prefetched: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._prefetched_bytes = 0
        #: Units that have been read, the least recently used first.
        self._accessed: OrderedDict[Key, bytes] = OrderedDict()
        self._accessed_bytes = 0
        self._reserved_bytes = 0
        self._peak_bytes = 0

    @property
    def max_bytes(self) -> int:
        """The bound on cached and reserved bytes."""
        return self._max_bytes

    @property
    def peak_bytes(self) -> int:
        """The highest number of bytes that were cached and reserved at the same time."""
        return self._peak_bytes

    def can_prefetch(self, size_bytes: int) -> bool:
        """Return whether a prefetch fits; prefetches use at most half of the bound."""
        with self._changed:
            oldest = self._clock.monotonic() - _PREFETCH_TTL_S
            unread = (data for arrived, data in self._prefetched.values() if arrived >= oldest)
            prefetch_bytes = self._reserved_bytes + sum(map(len, unread)) + size_bytes
            return prefetch_bytes <= self._max_bytes // 2

    def reserve(self, size_bytes: int, timeout_s: float) -> bool:
        """Reserve memory, evicting units if needed; return whether it was free in time.

        A reservation beyond the bound succeeds when nothing else is reserved.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(size_bytes), timeout_s):
                return False
            self._reserved_bytes += size_bytes
            self._demote_expired()
            while self._accessed and self._total_bytes() > self._max_bytes:
                self._accessed_bytes -= len(self._accessed.popitem(last=False)[1])
            while self._prefetched and self._total_bytes() > self._max_bytes:
                self._prefetched_bytes -= len(self._prefetched.popitem(last=False)[1][1])
            self._peak_bytes = max(self._peak_bytes, self._total_bytes())
            return True

    def release(self, size_bytes: int) -> None:
        """Release reserved memory."""
        with self._changed:
            self._reserved_bytes -= size_bytes
            self._changed.notify_all()

    def keep(self, file: str, start: int, data: bytes) -> None:
        """Cache the units from offset `start` on, in the memory that was reserved for them."""
        units = units_of(start, start + len(data))
        with self._changed:
            arrived = self._clock.monotonic()
            for number, unit in enumerate(units):
                key, part = (file, unit), data[number * UNIT_BYTES : (number + 1) * UNIT_BYTES]
                self._accessed_bytes -= len(self._accessed.pop(key, b""))
                self._prefetched_bytes -= len(self._prefetched.pop(key, (0.0, b""))[1])
                self._prefetched_bytes += len(part)
                self._prefetched[key] = arrived, part
            self._reserved_bytes -= len(data)
            self._changed.notify_all()

    def is_empty(self) -> bool:
        """Return whether no unit is cached, which is usual if the disk takes them."""
        return not self._accessed and not self._prefetched  # correct at some instant, unlocked

    def has(self, key: Key) -> bool:
        """Return whether a unit is cached, without marking it as read."""
        return key in self._accessed or key in self._prefetched

    def get(self, key: Key) -> bytes | None:
        """Return a cached unit, and mark it as read."""
        with self._changed:
            if key in self._prefetched:
                self._mark_accessed(key)
            data = self._accessed.get(key)
            if data is not None:
                self._accessed.move_to_end(key)
            return data

    def demote_prefetched(self, file: str) -> None:
        """Mark the prefetched units of a file as read, because no reader waits for them."""
        with self._changed:
            for key in [key for key in self._prefetched if key[0] == file]:
                self._mark_accessed(key)

    def drop(self, file: str) -> None:
        """Remove every unit of a file."""
        with self._changed:
            for key in [key for key in self._prefetched if key[0] == file]:
                self._prefetched_bytes -= len(self._prefetched.pop(key)[1])
            for key in [key for key in self._accessed if key[0] == file]:
                self._accessed_bytes -= len(self._accessed.pop(key))
            self._changed.notify_all()

    def _demote_expired(self) -> None:
        """Mark prefetched units as read if no reader has wanted them in time."""
        oldest = self._clock.monotonic() - _PREFETCH_TTL_S
        while self._prefetched and next(iter(self._prefetched.values()))[0] < oldest:
            self._mark_accessed(next(iter(self._prefetched)))

    def _mark_accessed(self, key: Key) -> None:
        data = self._accessed[key] = self._prefetched[key][1]
        del self._prefetched[key]
        self._prefetched_bytes -= len(data)
        self._accessed_bytes += len(data)

    def _total_bytes(self) -> int:
        return self._reserved_bytes + self._accessed_bytes + self._prefetched_bytes

    def _fits(self, size_bytes: int) -> bool:
        return not self._reserved_bytes or self._reserved_bytes + size_bytes <= self._max_bytes
