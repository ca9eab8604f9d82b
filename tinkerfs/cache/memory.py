"""The one bound on the memory that weights take, and what is kept within it.

Room is reserved before bytes are fetched. What cannot go to disk stays here while there is room;
whoever needs room takes that of the least recently used.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["BlockMemory"]


class BlockMemory:
    """Blocks by key, and room for more. Thread-safe.

    Args:
        limit_bytes: of all blocks kept and all room reserved.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        # All guarded by _changed.
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._reserved_bytes = 0
        self._most_bytes = 0

    @property
    def most_bytes(self) -> int:
        """The most that was ever kept and reserved at one time."""
        return self._most_bytes

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether `size_bytes` could be reserved with half of the bound left for others."""
        return self._reserved_bytes + size_bytes <= self._limit_bytes // 2

    def reserve(self, size_bytes: int, patience_s: float) -> bool:
        """Take room, waiting for it where others have it; return whether it was had in time.

        More than the bound allows is given to one alone.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(size_bytes), patience_s):
                return False
            self._reserved_bytes += size_bytes
            while self._kept and self._kept_bytes + self._reserved_bytes > self._limit_bytes:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])
            self._most_bytes = max(self._most_bytes, self._kept_bytes + self._reserved_bytes)
            return True

    def release(self, size_bytes: int) -> None:
        """Give back room."""
        with self._changed:
            self._reserved_bytes -= size_bytes
            self._changed.notify_all()

    def keep(self, key: Hashable, data: bytes) -> None:
        """Keep a block; its room, reserved before, is its own until somebody needs it."""
        with self._changed:
            self._reserved_bytes -= len(data)
            old = self._kept.pop(key, b"")
            self._kept[key] = data
            self._kept_bytes += len(data) - len(old)
            self._changed.notify_all()

    def get(self, key: Hashable) -> bytes | None:
        """Return a block that is kept."""
        if not self._kept:  # as ever where blocks go to disk; true of some instant without the lock
            return None
        with self._changed:
            data = self._kept.get(key)
            if data is not None:
                self._kept.move_to_end(key)
            return data

    def _fits(self, size_bytes: int) -> bool:
        return not self._reserved_bytes or self._reserved_bytes + size_bytes <= self._limit_bytes
