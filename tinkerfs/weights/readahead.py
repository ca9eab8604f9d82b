"""Predict what to prefetch from the reads of one open file (pure).

The kernel sends the reads of one program from several threads, about 128 KiB each and slightly out
of order. A read near the end of the current run therefore continues it. The readahead window is as
long as the run: a short header costs nothing more, and a seek starts again with an empty window.
A run from the file's start that is longer than a header will probably read the whole file, so its
window grows faster. After a seek into a file of tensors, nothing beyond the current tensor is
prefetched until the run has left it.
"""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Maximum number of concurrent prefetch requests per file.
READAHEAD_CONCURRENCY = 16

#: Maximum length of the readahead window. Each of the concurrent requests then has 8 MiB.
MAX_READAHEAD_BYTES = 128 << 20

#: A longer run from the file's start is not a header; its window is multiplied by the factor.
HEADER_BYTES = 4 << 20
_WHOLE_FILE_FACTOR = 4

#: Maximum distance of a read from the end of the run that it continues. The kernel's threads are
#: that far apart, and its own readahead makes a run begin before a tensor or end after it.
SEEK_TOLERANCE_BYTES = 2 << 20

#: A file up to this size is prefetched whole at its second sequential read.
SMALL_FILE_BYTES = 64 << 20

#: Number of seeks of equal length that make a stride.
_MIN_STRIDE_SEEKS = 2


class ReadaheadPlan(NamedTuple):
    """The range [start, stop) to prefetch, and the size of one request."""

    start: int
    stop: int
    request_bytes: int


_NO_PLAN = ReadaheadPlan(0, 0, 0)


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
        self._seek_bytes = 0
        self._equal_seeks = 0
        self._tensor_ends: Sequence[int] | None = None

    def needs_tensor_offsets(self) -> bool:
        """Return whether tensor offsets are unknown and would matter for this run."""
        # Without the lock, because it runs at each read and a stale result is harmless.
        is_large = self._size_bytes > SMALL_FILE_BYTES
        return self._tensor_ends is None and is_large and not self._is_from_start(self._run)

    def set_tensor_offsets(self, tensor_ends: Sequence[int]) -> None:
        """Set the end offsets of the tensors, sorted; empty for a file without tensors."""
        with self._lock:
            self._tensor_ends = tensor_ends

    def on_read(self, offset: int, size: int) -> ReadaheadPlan:
        """Record a read, and return what to prefetch."""
        with self._lock:
            end = min(offset + size, self._size_bytes)
            run = self._run
            if abs(offset - run.end) > SEEK_TOLERANCE_BYTES:
                return self._on_seek(offset, end)
            is_first = run.end == run.start
            run.start, run.end = min(run.start, offset), max(run.end, end)
            ahead_bytes = run.end - run.start
            if self._is_from_start(run) and ahead_bytes > HEADER_BYTES:
                ahead_bytes *= _WHOLE_FILE_FACTOR
            ahead_bytes = min(ahead_bytes, MAX_READAHEAD_BYTES)
            if self._size_bytes <= SMALL_FILE_BYTES and not is_first:
                ahead_bytes = self._size_bytes
            request_bytes = ahead_bytes // READAHEAD_CONCURRENCY
            last = min(self._size_bytes, self._tensor_end(run))
            stop = min(run.end + ahead_bytes, last)
            start = max(run.end, self._fetched_until)
            # Wait until the range fills a request, except at the end.
            is_enough = stop - start >= request_bytes or stop == last
            return (
                ReadaheadPlan(start, stop, request_bytes)
                if start < stop and is_enough
                else _NO_PLAN
            )

    def mark_fetched(self, stop: int) -> None:
        """Record that everything up to `stop` is cached or in flight."""
        with self._lock:
            if stop > self._run.end:
                self._fetched_until = stop

    def _is_from_start(self, run: _SequentialRun) -> bool:
        """Return whether a run began at the file's start, for a header or the whole file."""
        return run.start <= self._data_start + SEEK_TOLERANCE_BYTES

    def _tensor_end(self, run: _SequentialRun) -> int:
        """Return where the run will probably end: at the end of its tensor or file."""
        if self._tensor_ends and not self._is_from_start(run):
            index = bisect_left(self._tensor_ends, run.start + SEEK_TOLERANCE_BYTES)
            if index < len(self._tensor_ends):
                tensor_end = self._tensor_ends[index]
                if run.end < tensor_end + SEEK_TOLERANCE_BYTES:
                    return tensor_end
        return self._size_bytes

    def _on_seek(self, offset: int, end: int) -> ReadaheadPlan:
        """Start a new run; after a stride of equal seeks, prefetch the next target."""
        run = self._run
        seek_bytes, run_bytes = offset - run.start, run.end - run.start
        is_stride = abs(seek_bytes - self._seek_bytes) <= run_bytes
        self._equal_seeks = self._equal_seeks + 1 if is_stride else 1
        self._seek_bytes = seek_bytes
        run.start, run.end = offset, end
        self._fetched_until = 0
        if self._equal_seeks < _MIN_STRIDE_SEEKS or seek_bytes <= 0:
            return _NO_PLAN
        begin = offset + seek_bytes
        stop = begin + min(max(run_bytes, end - offset), MAX_READAHEAD_BYTES)
        return ReadaheadPlan(min(begin, self._size_bytes), min(stop, self._size_bytes), 0)
