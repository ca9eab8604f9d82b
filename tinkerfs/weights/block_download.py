"""Store a block, or units of it, while they are downloaded: on disk if possible, else in memory.

Each chunk is written as soon as it arrives. Collecting the whole block first would move 4 MiB
through the processor's caches several more times, for each of the concurrent downloads.
"""

import hashlib
from contextlib import closing
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.cache.blocks import FileBlocks
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.weights.transfer_monitor import CHUNK_BYTES


class CacheWriteLost(OSError):
    """EIO: partly written bytes are lost and must be downloaded again."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a file that are in memory, at `start`."""

    start: int
    data: bytes

    def fill(self, buffer: memoryview, offset: int) -> bool:
        """Fill `buffer` with the bytes at `offset`; return whether all of them are here."""
        first = offset - self.start
        if first < 0 or first + len(buffer) > len(self.data):
            return False
        buffer[:] = memoryview(self.data)[first : first + len(buffer)]
        return True


class BlockDownload:
    """Units of one block that are being downloaded. Not thread-safe; close it in any case.

    Args:
        key: of the file.
        start: offset of the first unit.
        length: of all units.
        disk: the disk cache of the file.
        memory: the pool for units that the disk does not take; it also bounds write buffers.
        timeout_s: how long to wait for free memory.
        digest: the expected `block_digest` of a whole block; empty if unknown.
        uses_disk: whether the units may be stored on disk.

    Raises:
        RequestTimeout: no memory became free.

    Attributes:
        index: of the block.
        stop: offset after the last unit.
        remaining_bytes: number of bytes that have not arrived yet.
    """

    def __init__(
        self,
        key: str,
        start: int,
        length: int,
        disk: FileBlocks,
        memory: BlockMemoryPool,
        timeout_s: float,
        *,
        digest: bytes = b"",
        uses_disk: bool = True,
    ) -> None:
        self.index = start // BLOCK_BYTES
        self.stop = start + length
        self.remaining_bytes = length
        self._key, self._start, self._length = key, start, length
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
        self._writer = disk.begin_write(start, length) if uses_disk and not digest else None
        try:
            is_on_disk = self._writer is not None and not self._writer.is_in_memory
            self._reserve(min(CHUNK_BYTES, length) if is_on_disk else length)
        except errors.RequestTimeout:
            self.close()
            raise

    def feed(self, chunk: memoryview) -> memoryview:
        """Store the bytes of a chunk that belong to the units, and return the rest.

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

    def commit(self) -> Piece | None:
        """Store complete units; return them if they are in memory, None if they are on disk.

        Raises:
            RequestTimeout: as `feed`.
            CacheWriteLost: the units are lost; those after them are not affected.
        """
        if self._writer is not None:
            if self._disk.commit(self._writer):
                return None
            self._spill_to_memory(None)
        if self._is_unreadable:
            error = errors.corrupt("", "the disk of the cache has lost a block that was written")
            raise CacheWriteLost(error.errno, error.strerror)
        data = b"".join(self._chunks)
        if self._digest and self._uses_disk and self._disk.put(self.index, data):
            return None
        self._memory.keep(self._key, self._start, data)
        self._reserved_bytes = 0
        return Piece(self._start, data)

    def commit_partial(self) -> None:
        """Store the complete units for the next download; in memory they would be lost."""
        if self._writer is not None and self.remaining_bytes < self._length:
            self._disk.commit_part(self._writer)

    def close(self) -> None:
        """Free the resources; uncommitted units are discarded."""
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
