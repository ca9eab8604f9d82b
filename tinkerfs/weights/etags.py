"""ETags of one file that name the same bytes, because each server of a store makes its own."""

import hashlib
import threading
from typing import NamedTuple

#: What is compared of a file to find out whether two ETags name the same bytes.
SAMPLE_BYTES = 4096

#: Tensors have more different bytes than this in a sample. Headers, which may be the same in every
#: version, and padding have fewer.
_MIN_VALUES = 160


class Sample(NamedTuple):
    """The digest of `SAMPLE_BYTES` of a file, from `start` on."""

    start: int
    digest: bytes

    def is_of(self, data: bytes) -> bool:
        """Return whether it is the sample of some bytes."""
        return _digest(data) == self.digest


def sample_of(start: int, data: bytes) -> Sample | None:
    """Return a sample of `data`, which is at `start`, that differs from version to version.

    Returns:
        None if `data` is short, or holds headers alone.
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

    Args:
        etag: the first of them.
        sample: of what was received under it; None for none.

    Attributes:
        sample: of what was received under one of them; None for none so far.
    """

    def __init__(self, etag: str, sample: Sample | None = None) -> None:
        self.sample = sample
        self._first = _bare(etag)
        self._lock = threading.Lock()
        # Guarded by _lock; a set in it is never changed.
        self._names = {self._first}
        self._is_in_use = False

    @property
    def is_mixed(self) -> bool:
        """Whether there are others than the first, so that `If-Range` with that means little."""
        return self._names != {self._first}

    def has(self, etag: str) -> bool:
        """Return whether an ETag is one of them."""
        return _bare(etag) in self._names

    def add(self, etag: str) -> None:
        """Record that an ETag names the same bytes."""
        with self._lock:
            self._names = self._names | {_bare(etag)}

    @property
    def is_in_use(self) -> bool:
        """Whether bytes under one of them are on their way, or were."""
        return self._is_in_use

    def mark_in_use(self) -> None:
        """Record that bytes under one of them are on their way."""
        self._is_in_use = True

    def take_first(self, etag: str) -> bool:
        """Use an ETag in place of all others while no byte was received; return whether."""
        with self._lock:
            if self._is_in_use:
                return False
            self._is_in_use = True
            # The ones before count too, once a sample shows that they name the same bytes.
            self._names = {_bare(etag)}
            return True


def _bare(etag: str) -> str:
    """Return what the weak comparison looks at (RFC 9110, 8.8.3.2)."""
    return etag.removeprefix("W/")
