"""Verify that all blocks of a file without a strong ETag are of one version.

A store without strong ETags may serve another version of the same length at any request. Cached and
received bytes are therefore compared with each other and with the digests of the pass that indexed
the archive. Thread-safe.
"""

from collections.abc import Callable

from tinkerfs.cache.blocks import FileBlocks
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.weights.block_download import block_digest
from tinkerfs.weights.etags import SAMPLE_BYTES, Sample, sample_of
from tinkerfs.weights.transfer import OVERLAP_BYTES


class BlockCheck:
    """Verifies the blocks of one file.

    Args:
        disk: the cached blocks.
        peek: returns the bytes [start, stop) if they are cached.
        digests: of all blocks; empty if unknown.
        is_needed: whether the store's validators do not distinguish all versions.
    """

    def __init__(
        self,
        disk: FileBlocks,
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
        #: Cached blocks with a verified digest.
        self._verified: set[int] = set()

    @property
    def has_digests(self) -> bool:
        """Whether the digest of each block is known."""
        return bool(self._digests)

    @property
    def needs_whole_blocks(self) -> bool:
        """Whether smaller parts would show changes of the file less reliably."""
        return self.is_needed or self.has_digests

    @property
    def verifies_cached(self) -> bool:
        """Whether cached blocks must pass `verify_block`."""
        return self.is_needed and bool(self._digests)

    def verify_block(self, index: int) -> bool:
        """Return whether the block on disk is of this version; otherwise remove it."""
        if not self.verifies_cached or index in self._verified:
            return True
        length = self._length(index)
        data = self._disk.read(index, 0, length, length)
        if data is None:
            return False
        if block_digest(data) != self._digests[index]:
            self._disk.drop(index)
            return False
        self._verified.add(index)
        return True

    def expected_digest(self, index: int) -> bytes:
        """Return the digest that an arriving block must have; empty if any is valid."""
        if self._digests:
            return self._digests[index]
        if not self.is_needed:
            return b""
        # The store sends the whole file, and some of its blocks are cached.
        length = self._length(index)
        cached = self._disk.read(index, 0, length, length)
        return b"" if cached is None else block_digest(cached)

    def before(self, start: int) -> bytes:
        """Return known bytes that precede `start`, to be requested again and compared."""
        if not self.is_needed or not start:
            return b""
        return self._peek(max(start - OVERLAP_BYTES, 0), start) or b""

    def sample(self) -> Sample | None:
        """Return a sample of the cached bytes, None if there is none."""
        for start in range(0, self._size_bytes, BLOCK_BYTES // 2):
            data = self._peek(start, min(start + SAMPLE_BYTES, self._size_bytes))
            sample = None if data is None else sample_of(start, data)
            if sample is not None:
                return sample
        return None

    def drop_all(self) -> None:
        """Remove all cached blocks, which are of another version than the store's file."""
        self._verified.clear()
        self._disk.drop_all()

    def _length(self, index: int) -> int:
        return min(BLOCK_BYTES, self._size_bytes - index * BLOCK_BYTES)
