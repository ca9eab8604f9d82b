"""What to fetch before it is asked for, guessed from the reads of one open file (pure).

The kernel sends the reads of one program through several threads, 128 KiB or so each, partly out of
order. So a read continues a run when it is near the run's end, whichever side; and as much as a run
has read it is worth to fetch ahead: a header costs nothing more, and a jump starts at nothing
again. Who reads on behind what a header takes wants all of it: then all connections are soon busy.
Who jumped into a file of tensors may want one of them: nothing beyond its end is fetched ahead
before the run has left it behind.
"""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Requests ahead at a time. Measured through a mount at 50 ms latency and 40 MB/s a connection: 8
#: gave 171 MB/s, 16 and a quicker start 268 to 297, curl with 8 ranges 295.
READAHEAD_CONCURRENCY = 16

#: The furthest that is fetched ahead, spread over so many requests: 8 MiB each hide 50 ms of
#: latency better than 4 MiB, and cost both ends half as many requests.
MAX_READAHEAD_BYTES = 128 << 20

#: A run from a file's start that is longer than this is no header's, and is worth so much more.
HEADER_BYTES = 4 << 20
_WHOLE_FILE_FACTOR = 4

#: How far from a run's end a read may be and still continue it: the kernel's threads are apart. It
#: is also how far the kernel's own read-ahead makes a run begin before a tensor, or end behind it.
SEEK_TOLERANCE_BYTES = 2 << 20

#: A file up to this size is fetched whole at its second sequential read.
SMALL_FILE_BYTES = 64 << 20

#: As many jumps of one length make a stride.
_STRIDE_JUMPS = 2


class ReadaheadPlan(NamedTuple):
    """What to fetch ahead: [start, stop), empty for nothing; so much by a request."""

    start: int
    stop: int
    request_bytes: int


_NOTHING = ReadaheadPlan(0, 0, 0)


@dataclass(slots=True)
class _SequentialRun:
    start: int
    end: int

    @property
    def is_from_start(self) -> bool:
        """Whether it began where a file does: that is a header, or all of it."""
        return self.start <= SEEK_TOLERANCE_BYTES


class ReadaheadState:
    """The reads of one handle so far. Thread-safe.

    Args:
        size_bytes: of the file.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._run = _SequentialRun(0, 0)
        self._reached = 0
        self._jump_bytes = 0
        self._jumps = 0
        self._ends: Sequence[int] | None = None

    def needs_tensor_offsets(self) -> bool:
        """Tell whether it matters now where the tensors of the file end, and is not known."""
        # Without the lock: true of some instant, and asked at each read.
        is_large = self._size_bytes > SMALL_FILE_BYTES
        return self._ends is None and is_large and not self._run.is_from_start

    def set_tensor_offsets(self, ends: Sequence[int]) -> None:
        """Take note of where the tensors of the file end, in order; empty for a file of none."""
        with self._lock:
            self._ends = ends

    def on_read(self, offset: int, size: int) -> ReadaheadPlan:
        """Take note of a read, and return what to fetch ahead."""
        with self._lock:
            end = min(offset + size, self._size_bytes)
            run = self._run
            if abs(offset - run.end) > SEEK_TOLERANCE_BYTES:
                return self._on_seek(offset, end)
            is_first = run.end == run.start
            run.start, run.end = min(run.start, offset), max(run.end, end)
            ahead_bytes = run.end - run.start
            if run.is_from_start and ahead_bytes > HEADER_BYTES:
                ahead_bytes *= _WHOLE_FILE_FACTOR
            ahead_bytes = min(ahead_bytes, MAX_READAHEAD_BYTES)
            if self._size_bytes <= SMALL_FILE_BYTES and not is_first:
                ahead_bytes = self._size_bytes
            request_bytes = ahead_bytes // READAHEAD_CONCURRENCY
            last = min(self._size_bytes, self._tensor_end(run))
            stop = min(run.end + ahead_bytes, last)
            start = max(run.end, self._reached)
            # As much as a request is for, and what is left at the end.
            is_enough = stop - start >= request_bytes or stop == last
            return (
                ReadaheadPlan(start, stop, request_bytes)
                if start < stop and is_enough
                else _NOTHING
            )

    def mark_fetched(self, stop: int) -> None:
        """Take note that all up to `stop` is there or under way: it is not wanted again."""
        with self._lock:
            if stop > self._run.end:
                self._reached = stop

    def _tensor_end(self, run: _SequentialRun) -> int:
        """Return the end of the tensor that a run began in, while it may be all that is read."""
        if self._ends and not run.is_from_start:
            at = bisect_left(self._ends, run.start + SEEK_TOLERANCE_BYTES)
            if at < len(self._ends) and run.end < self._ends[at] + SEEK_TOLERANCE_BYTES:
                return self._ends[at]
        return self._size_bytes

    def _on_seek(self, offset: int, end: int) -> ReadaheadPlan:
        """Start another run; of jumps of one length, fetch where the next one leads."""
        run = self._run
        jump_bytes, run_bytes = offset - run.start, run.end - run.start
        is_stride = abs(jump_bytes - self._jump_bytes) <= run_bytes
        self._jumps = self._jumps + 1 if is_stride else 1
        self._jump_bytes = jump_bytes
        run.start, run.end = offset, end
        self._reached = 0
        if self._jumps < _STRIDE_JUMPS or jump_bytes <= 0:
            return _NOTHING
        begin = offset + jump_bytes
        stop = begin + min(max(run_bytes, end - offset), MAX_READAHEAD_BYTES)
        return ReadaheadPlan(min(begin, self._size_bytes), min(stop, self._size_bytes), 0)
