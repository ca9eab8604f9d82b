"""The one bound on the memory that weights take, and what is kept within it.

Room is reserved for what is under way: a piece of what goes to disk, a whole block else. What
cannot go to disk stays here while there is room; whoever needs room takes that of the least
recently used, and of what nobody has used yet only in the end: it was fetched ahead, and would have
to come again.
"""

import threading
from collections import OrderedDict

from tinkerfs.clock import SYSTEM_CLOCK, Clock

#: Of which file, and which block of it.
Key = tuple[str, int]

#: What was fetched ahead and is not used for so long is taken to be wanted by nobody, seconds.
_UNWANTED_S = 10.0


class BlockMemoryPool:
    """Blocks by key, and room for more. Thread-safe.

    Args:
        limit_bytes: of all blocks kept and all room reserved.
        clock: `monotonic` tells the age of what is not used.
    """

    def __init__(self, max_bytes: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._limit_bytes = max_bytes
        self._clock = clock
        self._changed = threading.Condition()
        # All guarded by _changed.
        #: With the time that they came, the oldest first.
        self._prefetched: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._unused_bytes = 0
        self._accessed: OrderedDict[Key, bytes] = OrderedDict()
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._most_bytes = 0

    @property
    def peak_bytes(self) -> int:
        """The most that was ever kept and reserved at one time."""
        return self._most_bytes

    def can_prefetch(self, size_bytes: int) -> bool:
        """Tell whether so much more can be fetched ahead, with half of the bound for the rest."""
        with self._changed:
            old = self._clock.monotonic() - _UNWANTED_S
            while self._prefetched and next(iter(self._prefetched.values()))[0] < old:
                self._use(next(iter(self._prefetched)))
            ahead_bytes = self._reserved_bytes + self._unused_bytes + size_bytes
            return ahead_bytes <= self._limit_bytes // 2

    def reserve(self, size_bytes: int, timeout_s: float) -> bool:
        """Take room, waiting for it where others have it; return whether it was had in time.

        More than the bound allows is given to one alone.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(size_bytes), timeout_s):
                return False
            self._reserved_bytes += size_bytes
            while self._accessed and self._total_bytes() > self._limit_bytes:
                self._used_bytes -= len(self._accessed.popitem(last=False)[1])
            while self._prefetched and self._total_bytes() > self._limit_bytes:
                self._unused_bytes -= len(self._prefetched.popitem(last=False)[1][1])
            self._most_bytes = max(self._most_bytes, self._total_bytes())
            return True

    def release(self, size_bytes: int) -> None:
        """Give back room."""
        with self._changed:
            self._reserved_bytes -= size_bytes
            self._changed.notify_all()

    def keep(self, key: Key, data: bytes) -> None:
        """Keep a block; its room, reserved before, is its own until somebody needs it."""
        with self._changed:
            self._reserved_bytes -= len(data)
            self._used_bytes -= len(self._accessed.pop(key, b""))
            self._unused_bytes += len(data) - len(self._prefetched.pop(key, (0.0, b""))[1])
            self._prefetched[key] = self._clock.monotonic(), data
            self._changed.notify_all()

    def has(self, key: Key) -> bool:
        """Tell whether a block is kept, which is no use of it."""
        return key in self._accessed or key in self._prefetched

    def get(self, key: Key) -> bytes | None:
        """Return a block that is kept, for use."""
        # As ever where blocks go to disk; true of some instant without the lock.
        if not self._accessed and not self._prefetched:
            return None
        with self._changed:
            if key in self._prefetched:
                self._use(key)
            data = self._accessed.get(key)
            if data is not None:
                self._accessed.move_to_end(key)
            return data

    def demote_prefetched(self, file: str) -> None:
        """Take note that nobody waits for what was fetched ahead of a file."""
        with self._changed:
            for key in [key for key in self._prefetched if key[0] == file]:
                self._use(key)

    def drop(self, file: str) -> None:
        """Remove every block of a file."""
        with self._changed:
            for key in [key for key in self._prefetched if key[0] == file]:
                self._unused_bytes -= len(self._prefetched.pop(key)[1])
            for key in [key for key in self._accessed if key[0] == file]:
                self._used_bytes -= len(self._accessed.pop(key))
            self._changed.notify_all()

    def _use(self, key: Key) -> None:
        data = self._accessed[key] = self._prefetched[key][1]
        del self._prefetched[key]
        self._unused_bytes -= len(data)
        self._used_bytes += len(data)

    def _total_bytes(self) -> int:
        return self._reserved_bytes + self._used_bytes + self._unused_bytes

    def _fits(self, size_bytes: int) -> bool:
        return not self._reserved_bytes or self._reserved_bytes + size_bytes <= self._limit_bytes
