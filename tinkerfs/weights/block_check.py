"""Whether the blocks of a file are all of one version, where its ETag does not tell.

A store without strong ETags may have another version of a file from one request to the next, with
the same length. What is cached and what arrives are then held against each other, and against the
digests of the pass that found out what the file holds. Thread-safe.
"""

from collections.abc import Callable

from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.weights.block_download import block_digest
from tinkerfs.weights.block_math import BLOCK_BYTES
from tinkerfs.weights.etags import SAMPLE_BYTES, Sample, sample_of
from tinkerfs.weights.transfer import OVERLAP_BYTES


class BlockCheck:
    """Checks the blocks of one file.

    Args:
        disk: the blocks that are cached.
        peek: returns the bytes [start, stop) if they are cached.
        size_bytes: length of the file.
        digests: of every block, if known.
        is_needed: whether the store's validators do not tell versions apart.
    """

    def __init__(
        self,
        disk: BlockFile,
        peek: Callable[[int, int], bytes | None],
        size_bytes: int,
        *,
        digests: tuple[bytes, ...],
        is_needed: bool,
    ) -> None:
        self.is_needed = is_needed
        self._disk = disk
        self._peek = peek
        self._size_bytes = size_bytes
        self._digests = digests
        #: Cached blocks that have the digest that they must have.
        self._proven: set[int] = set()

    @property
    def looks_at_cached(self) -> bool:
        """Whether `is_proven` has to be asked of a cached block."""
        return self.is_needed and bool(self._digests)

    def is_proven(self, index: int) -> bool:
        """Return whether the block on disk is of this version; remove it if it is not."""
        if not self.looks_at_cached or index in self._proven:
            return True
        length = self._length(index)
        data = self._disk.read(index, 0, length, length)
        if data is None:
            return False
        if block_digest(data) != self._digests[index]:
            self._disk.drop(index)
            return False
        self._proven.add(index)
        return True

    def expected_digest(self, index: int) -> bytes:
        """Return the digest that a block must have when it arrives, empty for any."""
        if self._digests:
            return self._digests[index]
        if not self.is_needed:
            return b""
        # The store sends all of the file, and part of it is cached.
        length = self._length(index)
        cached = self._disk.read(index, 0, length, length)
        return b"" if cached is None else block_digest(cached)

    def before(self, start: int, part: bytes) -> bytes:
        """Return what must come before `start`, as far as it is known.

        Args:
            start: where a request begins otherwise.
            part: what is known right before that; empty for nothing.
        """
        if not self.is_needed or not start:
            return b""
        if part:
            return part[-OVERLAP_BYTES:]
        return self._peek(max(start - OVERLAP_BYTES, 0), start) or b""

    def sample(self) -> Sample | None:
        """Return a sample of what is cached, None for none."""
        for start in range(0, self._size_bytes, BLOCK_BYTES // 2):
            data = self._peek(start, min(start + SAMPLE_BYTES, self._size_bytes))
            sample = None if data is None else sample_of(start, data)
            if sample is not None:
                return sample
        return None

    def drop_all(self) -> None:
        """Remove every cached block: they are of another version than the store has."""
        self._proven.clear()
        for index in range(-(-self._size_bytes // BLOCK_BYTES)):
            self._disk.drop(index)
            self._disk.drop_partial(index)

    def _length(self, index: int) -> int:
        return min(BLOCK_BYTES, self._size_bytes - index * BLOCK_BYTES)
