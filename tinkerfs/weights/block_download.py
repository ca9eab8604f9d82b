"""Store a block while it is downloaded: on disk if possible, else in memory.

Each chunk is written as soon as it arrives. Collecting the whole block first would move 4 MiB
through the processor's caches several more times, for each of the concurrent downloads.
"""

import hashlib
from contextlib import closing

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.weights.transfer_monitor import CHUNK_BYTES


class CacheWriteLost(OSError):
    """EIO: a partly written block is lost and must be downloaded again."""


class BlockDownload:
    """A block that is being downloaded. Not thread-safe; close it in any case.

    Args:
        key: of the file.
        length: of the block.
        disk: the disk cache of the file's blocks.
        memory: the pool for blocks that the disk does not take; it also bounds write buffers.
        timeout_s: how long to wait for free memory.
        digest: the expected `block_digest`; empty if unknown.
        uses_disk: whether the block may be stored on disk.

    Raises:
        RequestTimeout: no memory became free.

    Attributes:
        remaining_bytes: number of bytes that have not arrived yet.
    """

    def __init__(
        self,
        key: str,
        index: int,
        length: int,
        disk: BlockFile,
        memory: BlockMemoryPool,
        timeout_s: float,
        *,
        digest: bytes = b"",
        uses_disk: bool = True,
    ) -> None:
        self.remaining_bytes = length
        self._key, self._index, self._length = key, index, length
        self._disk = disk
        self._memory = memory
        self._timeout_s = timeout_s
        self._digest = digest
        self._sha256 = hashlib.sha256()
        self._chunks: list[bytes] = []
        self._is_unreadable = False
        self._reserved_bytes = 0
        self._uses_disk = uses_disk
        # A block with a digest may be of another version, and is not written before that is known.
        # Blocks of that version may be on disk, and in use.
        self._writer = disk.begin_write(index, length) if uses_disk and not digest else None
        try:
            self._reserve(length if self._writer is None else min(CHUNK_BYTES, length))
        except errors.RequestTimeout:
            self.close()
            raise

    def feed(self, chunk: memoryview) -> memoryview:
        """Store the bytes of a chunk that belong to the block, and return the rest.

        Raises:
            RequestTimeout: the disk failed, and no memory became free.
        """
        own, rest = chunk[: self.remaining_bytes], chunk[self.remaining_bytes :]
        if self._digest:
            self._sha256.update(own)
        if self._writer is not None:
            try:
                self._writer.write(own)
            except OSError as error:
                self._spill_to_memory(error)
        if self._writer is None and not self._is_unreadable:
            self._chunks.append(bytes(own))
        self.remaining_bytes -= len(own)
        return rest

    def is_intact(self) -> bool:
        """Return whether a complete block has the expected digest."""
        return not self._digest or _truncated_digest(self._sha256) == self._digest

    def commit(self) -> bytes | None:
        """Store a complete block; return it if it is in memory, None if it is on disk.

        Raises:
            RequestTimeout: as `feed`.
            CacheWriteLost: the block is lost; the blocks after it are not affected.
        """
        if self._writer is not None:
            if self._disk.commit(self._index, self._writer):
                return None
            self._spill_to_memory(None)
        if self._is_unreadable:
            error = errors.corrupt("", "the disk of the cache has lost a block that was written")
            raise CacheWriteLost(error.errno, error.strerror)
        data = b"".join(self._chunks)
        if self._digest and self._uses_disk and self._disk.put(self._index, data):
            return None
        self._memory.keep((self._key, self._index), data)
        self._reserved_bytes = 0
        return data

    def commit_partial(self) -> None:
        """Store an incomplete block for the next download; in memory it would be lost."""
        if self._writer is not None and self.remaining_bytes < self._length:
            self._disk.commit_part(self._writer)

    def close(self) -> None:
        """Free the resources; an uncommitted block is discarded."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._release()

    def _spill_to_memory(self, error: OSError | None) -> None:
        """Continue in memory after the disk has failed; read back what was written."""
        writer, self._writer = self._writer, None
        assert writer is not None
        if error is not None:
            self._disk.report(error)
        with closing(writer):
            self._release()
            self._reserve(self._length)
            try:
                self._chunks.append(writer.read_back())
            except OSError as failure:
                self._disk.report(failure)
                self._is_unreadable = True

    def _release(self) -> None:
        self._memory.release(self._reserved_bytes)
        self._reserved_bytes = 0

    def _reserve(self, size_bytes: int) -> None:
        if not self._memory.reserve(size_bytes, self._timeout_s):
            raise errors.RequestTimeout("no memory became free for a block in time")
        self._reserved_bytes = size_bytes


def block_digest(block: bytes) -> bytes:
    """Return a digest that identifies the content of a block."""
    return _truncated_digest(hashlib.sha256(block))


def _truncated_digest(sha256: "hashlib._Hash") -> bytes:
    return sha256.digest()[:16]
