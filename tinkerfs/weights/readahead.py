"""Predict what to prefetch from the reads of one open file (pure).

The kernel sends the reads of one program from several threads, 128 KiB to 1 MiB each and slightly
out of order. A read near the end of the current run therefore continues it. The readahead window is
as long as the run: a short header costs nothing more, and a seek starts again with an empty window.
A run from the file's start that is longer than a header will probably read the whole file, so its
window grows faster. A run after a seek is expected to be as long as the run before it, and to end
with its tensor in a file of tensors.

Until a run has had a second read beyond its first unit, only the units that are read are requested.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES

#: Maximum number of concurrent prefetch requests per file.
READAHEAD_CONCURRENCY = 24

#: Maximum length of the readahead window. Each of the concurrent requests then has 8 MiB.
MAX_READAHEAD_BYTES = 192 << 20

#: A longer run from the file's start is not a header; its window is multiplied by the factor.
HEADER_BYTES = 4 << 20
_WHOLE_FILE_FACTOR = 4

#: Maximum distance of a read from the end of the run that it continues. The kernel's threads are
#: that far apart, and its own readahead makes a run begin before a tensor or end after it.
SEEK_TOLERANCE_BYTES = 2 << 20

#: Maximum length of a read of the kernel, which may be for a single byte that a program reads.
MAX_KERNEL_READ_BYTES = 1 << 20

#: The first window of a run after a seek if nothing is known, and of a run from the file's start.
FIRST_WINDOW_BYTES = 2 * BLOCK_BYTES

#: A file up to this size is prefetched whole at its second sequential read.
SMALL_FILE_BYTES = 64 << 20

#: Number of seeks of equal length that make a stride.
_MIN_STRIDE_SEEKS = 2


class ReadaheadPlan(NamedTuple):
    """What to request for a read.

    Attributes:
        granule_bytes: what the read itself misses is requested in multiples of it.
        start: of the range to prefetch.
        stop: of the range to prefetch; not above `start` if there is none.
        request_bytes: size of one request of the prefetch.
        ahead_granule_bytes: as `granule_bytes`, for the prefetch.
    """

    granule_bytes: int
    start: int = 0
    stop: int = 0
    request_bytes: int = 0
    ahead_granule_bytes: int = UNIT_BYTES


@dataclass(slots=True)
class _SequentialRun:
    start: int
    end: int


class ReadaheadState:
    """Tracks the reads of one open file. Thread-safe.

    Args:
        size_bytes: the length of the file.
        data_start: where the first run begins; reads before it are not reported.
    """

    def __init__(self, size_bytes: int, data_start: int = 0) -> None:
        self._size_bytes = size_bytes
        self._data_start = data_start
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._run = _SequentialRun(data_start, data_start)
        self._fetched_until = 0
        #: Length of the last run after a seek; None if there was none, or if it read whole tensors.
        self._expected_bytes: int | None = None
        self._seek_bytes = 0
        self._equal_seeks = 0
        self._tensor_ends: Sequence[int] | None = None

    def needs_tensor_offsets(self, offset: int) -> bool:
        """Return whether tensor offsets are unknown and would matter for a read."""
        # Without the lock, because it runs at each read and a stale result is harmless.
        is_large = self._size_bytes > SMALL_FILE_BYTES
        return self._tensor_ends is None and is_large and not self._is_from_start(offset)

    def set_tensor_offsets(self, tensor_ends: Sequence[int]) -> None:
        """Set the end offsets of the tensors, sorted; empty for a file without tensors."""
        with self._lock:
            self._tensor_ends = tensor_ends

    def on_read(self, offset: int, size: int) -> ReadaheadPlan:
        """Record a read, and return what to request."""
        with self._lock:
            end = min(offset + size, self._size_bytes)
            run = self._run
            is_long = run.end - run.start >= SEEK_TOLERANCE_BYTES or self._is_from_start(run.start)
            tolerance = SEEK_TOLERANCE_BYTES if is_long else MAX_KERNEL_READ_BYTES
            if abs(offset - run.end) > tolerance:
                return self._on_seek(offset, end)
            is_first = run.end == run.start
            if is_first:
                run.start, run.end = offset, end
                if self._size_bytes <= BLOCK_BYTES:
                    return ReadaheadPlan(BLOCK_BYTES)
                if end - offset <= MAX_KERNEL_READ_BYTES:  # it may be only a header
                    return ReadaheadPlan(UNIT_BYTES)
            run.start, run.end = min(run.start, offset), max(run.end, end)
            return self._plan(run, run.end - run.start, is_first=is_first)

    def _plan(self, run: _SequentialRun, run_bytes: int, *, is_first: bool) -> ReadaheadPlan:
        """Return what to request for a read that continues a run, or begins it at the start."""
        last = min(self._size_bytes, self._tensor_end(run))
        is_from_start = self._is_from_start(run.start)
        granule_bytes = ahead_granule_bytes = BLOCK_BYTES
        if self._size_bytes <= SMALL_FILE_BYTES and not is_first:
            ahead_bytes = self._size_bytes
        elif run_bytes <= UNIT_BYTES:
            return ReadaheadPlan(UNIT_BYTES)
        elif is_from_start and run_bytes > HEADER_BYTES:
            ahead_bytes = run_bytes * _WHOLE_FILE_FACTOR
        elif is_from_start or self._expected_bytes is None:
            ahead_bytes = max(run_bytes, FIRST_WINDOW_BYTES)
        elif run_bytes <= self._expected_bytes:
            last = min(last, run.start + self._expected_bytes)
            ahead_bytes = self._expected_bytes
            granule_bytes = BLOCK_BYTES if self._expected_bytes >= BLOCK_BYTES else UNIT_BYTES
        else:
            ahead_bytes = max(run_bytes, BLOCK_BYTES)
        ahead_bytes = min(ahead_bytes, MAX_READAHEAD_BYTES)
        request_bytes = ahead_bytes // READAHEAD_CONCURRENCY
        stop = min(run.end + ahead_bytes, last)
        if stop == last:
            ahead_granule_bytes = UNIT_BYTES
        start = max(run.end, self._fetched_until)
        # Wait until the range fills a request, except at the end.
        if start >= stop or (stop - start < request_bytes and stop != last):
            return ReadaheadPlan(granule_bytes)
        return ReadaheadPlan(granule_bytes, start, stop, request_bytes, ahead_granule_bytes)

    def mark_fetched(self, stop: int) -> None:
        """Record that everything up to `stop` is cached or in flight."""
        with self._lock:
            if stop > self._run.end:
                self._fetched_until = stop

    def _is_from_start(self, start: int) -> bool:
        """Return whether a run began at the file's start, for a header or the whole file."""
        return start <= self._data_start + SEEK_TOLERANCE_BYTES

    def _tensor_end(self, run: _SequentialRun) -> int:
        """Return where the run will probably end: at the end of its tensor or file."""
        if self._tensor_ends and not self._is_from_start(run.start):
            index = bisect_left(self._tensor_ends, run.start + SEEK_TOLERANCE_BYTES)
            if index < len(self._tensor_ends):
                tensor_end = self._tensor_ends[index]
                if run.end < tensor_end + SEEK_TOLERANCE_BYTES:
                    return tensor_end
        return self._size_bytes

    def _begun_tensor_end(self, offset: int, end: int) -> int:
        """Return the end of the tensor that a read begins and its run will probably read; or 0."""
        if not self._tensor_ends or self._expected_bytes is not None or end - offset < UNIT_BYTES:
            return 0
        index = bisect_right(self._tensor_ends, end - 1)
        is_begun = 0 < index < len(self._tensor_ends) and self._tensor_ends[index - 1] >= offset
        return self._tensor_ends[index] if is_begun else 0

    def _on_seek(self, offset: int, end: int) -> ReadaheadPlan:
        """Start a new run; after a stride of equal seeks, prefetch the next target."""
        run = self._run
        seek_bytes, run_bytes = offset - run.start, run.end - run.start
        is_stride = abs(seek_bytes - self._seek_bytes) <= run_bytes
        self._equal_seeks = self._equal_seeks + 1 if is_stride else 1
        self._seek_bytes = seek_bytes
        if not self._is_from_start(run.start):
            is_at_end = abs(run.end - self._tensor_end(run)) <= SEEK_TOLERANCE_BYTES
            self._expected_bytes = None if is_at_end else run_bytes
        run.start, run.end = offset, end
        self._fetched_until = 0
        if self._equal_seeks < _MIN_STRIDE_SEEKS or seek_bytes <= 0:
            stop = min(self._begun_tensor_end(offset, end), end + FIRST_WINDOW_BYTES)
            return ReadaheadPlan(UNIT_BYTES, end, stop)
        begin = min(offset + seek_bytes, self._size_bytes)
        stop = begin + min(max(run_bytes, end - offset), MAX_READAHEAD_BYTES)
        return ReadaheadPlan(UNIT_BYTES, begin, min(stop, self._size_bytes))
