"""Recognize ETags that name the same bytes: the servers of a store may differ."""

import hashlib
import threading
from typing import NamedTuple

#: Number of bytes that are compared to find out whether two ETags name the same content.
SAMPLE_BYTES = 4096

#: A sample of tensors has at least this number of distinct byte values. Headers, which may be the
#: same in every version, and padding have fewer.
_MIN_VALUES = 160


class Sample(NamedTuple):
    """The digest of `SAMPLE_BYTES` bytes of a file, from `start` on."""

    start: int
    digest: bytes

    def is_of(self, data: bytes) -> bool:
        """Return whether these bytes have the same digest."""
        return _digest(data) == self.digest


def sample_of(start: int, data: bytes) -> Sample | None:
    """Return a sample of `data`, which begins at `start` in the file.

    Returns:
        None if `data` is too short, or contains only headers.
    """
    for offset in range(len(data) - SAMPLE_BYTES, -1, -max(len(data) // 8, SAMPLE_BYTES)):
        found = data[offset : offset + SAMPLE_BYTES]
        if len(set(found)) >= _MIN_VALUES:
            return Sample(start + offset, _digest(found))
    return None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


class EtagAliases:
    """The ETags of a file that are known to name the same bytes. Thread-safe.

    Attributes:
        sample: of the bytes received under one of the ETags; None if there is none yet.
    """

    def __init__(self, etag: str, sample: Sample | None = None) -> None:
        self.sample = sample
        self._first = _bare(etag)
        self._lock = threading.Lock()
        # Guarded by _lock; the set is replaced, never changed.
        self._names = {self._first}
        self._is_in_use = False

    @property
    def is_mixed(self) -> bool:
        """Whether there are several ETags, so that `If-Range` is unreliable."""
        return self._names != {self._first}

    def has(self, etag: str) -> bool:
        """Return whether an ETag is known to name the same bytes."""
        return _bare(etag) in self._names

    def add(self, etag: str) -> None:
        """Record that an ETag names the same bytes."""
        with self._lock:
            self._names = self._names | {_bare(etag)}

    @property
    def is_in_use(self) -> bool:
        """Whether bytes under one of the ETags have been requested."""
        return self._is_in_use

    def mark_in_use(self) -> None:
        """Record that bytes under one of the ETags have been requested."""
        self._is_in_use = True

    def adopt_if_unused(self, etag: str) -> bool:
        """Replace all ETags, unless bytes were requested; return whether it was done."""
        with self._lock:
            if self._is_in_use:
                return False
            self._is_in_use = True
            # The previous ETags are added again once a sample proves that they name the same bytes.
            self._names = {_bare(etag)}
            return True


def _bare(etag: str) -> str:
    """Return the part of an ETag that the weak comparison uses (RFC 9110, 8.8.3.2)."""
    return etag.removeprefix("W/")
