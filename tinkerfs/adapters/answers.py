"""What looks at paths were answered, by the path as libfuse tells it, for as long as that holds.

The way through the tree takes a look 3 us, and 8 us where the processor comes to it from other work
as it does between requests; an answer that is kept 1 us. So it is kept ready to be copied, and a
path is what came with the request. Thread-safe.
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from tinkerfs.call import Lease

__all__ = ["Answers"]

#: When there are as many as are kept, others are not, for so long: whoever goes through more again
#: and again finds those that are, seconds.
_STAY_S = 60.0

T = TypeVar("T")


class _Answer(msgspec.Struct, Generic[T], frozen=True):
    value: T
    lease: Lease
    epoch: int


class Answers(Generic[T]):
    """Answers of one kind.

    Args:
        holds: as `FileSystem.holds`.
        most: so many are kept.
    """

    def __init__(self, holds: Callable[[Lease, int], bool], most: int) -> None:
        self._holds = holds
        self._most = most
        # Single operations on a dict are atomic; answers are frozen.
        self._kept: dict[bytes, _Answer[T]] = {}
        self._since = 0.0

    def get(self, path: bytes) -> T | None:
        """Return the answer that was given, None where it may be another one now."""
        kept = self._kept.get(path)
        return kept.value if kept is not None and self._holds(kept.lease, kept.epoch) else None

    def keep(self, path: bytes, value: T, lease: Lease, epoch: int) -> None:
        """Keep an answer.

        Args:
            path: to what.
            value: what was said.
            lease: that the look was made with.
            epoch: `FileSystem.epoch` from before the look.
        """
        if lease.is_void:
            return
        if len(self._kept) >= self._most:
            if time.monotonic() - self._since < _STAY_S:
                return
            self._kept.clear()
        if not self._kept:
            self._since = time.monotonic()
        self._kept[path] = _Answer(value, lease, epoch)
