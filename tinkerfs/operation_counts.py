"""Counts of the FUSE operations of a mount, which need no subscriber of the operation log."""

import threading
from collections import Counter

from tinkerfs import errors
from tinkerfs.histogram import DurationHistogram, HistogramValues


class OperationCounts:
    """Counts operations by name, errno and duration, and their bytes. Thread-safe.

    Attributes:
        cached_getattrs: replies to getattr from the cache of packed replies. The FUSE adapter
            increments these three; they are plain numbers, because such a reply takes microseconds.
        cached_readlinks: the same of readlink.
        cached_readdirs: the same of readdir, one per filled buffer.
    """

    __slots__ = (
        "_durations",
        "_errors",
        "_lock",
        "_read_bytes",
        "_written_bytes",
        "cached_getattrs",
        "cached_readdirs",
        "cached_readlinks",
    )

    def __init__(self) -> None:
        self.cached_getattrs = self.cached_readlinks = self.cached_readdirs = 0
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._durations: dict[str, DurationHistogram] = {}
        self._errors: Counter[tuple[str, int]] = Counter()
        self._read_bytes = self._written_bytes = 0

    def record(
        self,
        operation: str,
        duration_s: float,
        errno: int = 0,
        *,
        read_bytes: int = 0,
        written_bytes: int = 0,
    ) -> None:
        """Count one operation; `errno` is 0 for success."""
        histogram = self._durations.get(operation)
        if histogram is None:
            with self._lock:
                histogram = self._durations.setdefault(operation, DurationHistogram())
        histogram.observe(duration_s)
        if errno or read_bytes or written_bytes:
            with self._lock:
                self._read_bytes += read_bytes
                self._written_bytes += written_bytes
                if errno:
                    self._errors[operation, errno] += 1

    @property
    def read_bytes(self) -> int:
        """Bytes that reads have returned to the kernel."""
        return self._read_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes that writes have accepted."""
        return self._written_bytes

    def durations(self) -> dict[str, HistogramValues]:
        """Return the durations by operation, without replies from the cache of packed replies."""
        with self._lock:
            histograms = sorted(self._durations.items())
        return {name: histogram.values() for name, histogram in histograms}

    def errors(self) -> dict[str, dict[str, int]]:
        """Return the number of failures by operation and name of the errno."""
        with self._lock:
            counts = sorted(self._errors.items())
        found: dict[str, dict[str, int]] = {}
        for (operation, number), count in counts:
            found.setdefault(operation, {})[errors.name_of_errno(number)] = count
        return found

    def cached_replies(self) -> dict[str, int]:
        """Return the number of replies from the cache of packed replies, by operation."""
        return {
            "getattr": self.cached_getattrs,
            "readdir": self.cached_readdirs,
            "readlink": self.cached_readlinks,
        }

    def snapshot(self) -> dict[str, object]:
        """Return all values as plain JSON types."""
        failures = self.errors()
        return {
            "operations": {
                name: {
                    "count": values.count,
                    "duration_s": round(values.sum_s, 6),
                    "errors": failures.get(name, {}),
                }
                for name, values in self.durations().items()
            },
            "cached_replies": self.cached_replies(),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        }
