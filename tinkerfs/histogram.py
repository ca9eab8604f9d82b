"""Histograms of durations with fixed buckets."""

import threading
from bisect import bisect_left
from typing import Final

import msgspec

#: Upper bounds of the buckets, seconds: replies from memory, from a disk, from a server, and of
#: archives that are being built.
BUCKETS_S: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0),
)


class HistogramValues(msgspec.Struct, frozen=True):
    """The values of a histogram at one time.

    Attributes:
        buckets: number of durations per bucket; the last one is above every bound.
        sum_s: sum of the durations, seconds.
    """

    buckets: tuple[int, ...]
    sum_s: float

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self.buckets)


class DurationHistogram:
    """Counts durations by bucket. Thread-safe."""

    __slots__ = ("_buckets", "_lock", "_sum_s")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Both are guarded by _lock.
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count a duration."""
        index = bisect_left(BUCKETS_S, duration_s)
        with self._lock:
            self._buckets[index] += 1
            self._sum_s += duration_s

    def values(self) -> HistogramValues:
        """Return the current values."""
        with self._lock:
            return HistogramValues(tuple(self._buckets), self._sum_s)
