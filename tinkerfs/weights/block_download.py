"""One block of a file as it comes: on disk where that takes it, else in memory.

What comes is written down piece by piece. To gather a block first, and write it then, makes the
processor touch 4 MiB of cold memory three times more, by each of 16 connections: 1 GB at 50 ms and
100 MB/s a connection took a bare downloader of Python 2.0 s of the kernel's time and 0.7 s of its
own; piece by piece 0.8 and 0.5 s.
"""

import hashlib
from contextlib import closing

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.weights.connections import READ_BYTES


class CacheWriteLost(OSError):
    """EIO: what was written of a block can neither be kept nor read again; it must come anew."""


class BlockDownload:
    """A block on its way. One thread's; to be closed, whatever came of it.

    Args:
        key: of the file.
        index: which block.
        length: of it.
        disk: where it is kept.
        memory: where it is kept otherwise, and the bound on what is under way.
        patience_s: how long to wait for room in memory.
        digest: what it must have, as of `digest_of`; empty where nobody knows.
        uses_disk: whether the disk is tried.

    Raises:
        TimedOut: there was no room.

    Attributes:
        lacking_bytes: what has not come yet.
    """

    def __init__(
        self,
        key: str,
        index: int,
        length: int,
        disk: BlockFile,
        memory: BlockMemoryPool,
        patience_s: float,
        *,
        digest: bytes = b"",
        uses_disk: bool = True,
    ) -> None:
        self.remaining_bytes = length
        self._key, self._index, self._length = key, index, length
        self._disk = disk
        self._memory = memory
        self._patience_s = patience_s
        self._digest = digest
        self._sha256 = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._is_lost = False
        self._room_bytes = 0
        self._draft = disk.begin_write(index, length) if uses_disk else None
        try:
            self._reserve(length if self._draft is None else min(READ_BYTES, length))
        except errors.RequestTimeout:
            self.close()
            raise

    def feed(self, piece: memoryview) -> memoryview:
        """Take what belongs to the block from the start of a piece, and return the rest.

        Raises:
            TimedOut: the disk took no more, and there was no room in memory.
        """
        taken, rest = piece[: self.remaining_bytes], piece[self.remaining_bytes :]
        if self._digest:
            self._sha256.update(taken)
        if self._draft is not None:
            try:
                self._draft.write(taken)
            except OSError as error:
                self._spill_to_memory(error)
        if self._draft is None and not self._is_lost:
            self._pieces.append(bytes(taken))
        self.remaining_bytes -= len(taken)
        return rest

    def is_sound(self) -> bool:
        """Tell whether it has its digest, when it is whole."""
        return not self._digest or _cut(self._sha256) == self._digest

    def keep(self) -> bytes | None:
        """Keep it, which is whole, and return it where that is in memory; None: it is on disk.

        Raises:
            TimedOut: as `add`.
            DiskLost: as it says; what comes behind the block is as good as ever.
        """
        if self._draft is not None:
            if self._disk.commit(self._index, self._draft):
                return None
            self._spill_to_memory(None)
        if self._is_lost:
            lost = errors.corrupt("", "the disk of the cache lost a block on its way there")
            raise CacheWriteLost(lost.errno, lost.strerror)
        data = b"".join(self._pieces)
        self._memory.keep((self._key, self._index), data)
        self._room_bytes = 0
        return data

    def keep_part(self) -> None:
        """Keep what came, for who asks for the block next; where it is in memory it is lost."""
        if self._draft is not None and self.remaining_bytes < self._length:
            self._disk.commit_partial(self._index, self._draft)

    def close(self) -> None:
        """Let go of what was not kept."""
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.close()
        self._release()

    def _spill_to_memory(self, error: OSError | None) -> None:
        """Take what is written down so far into memory, since the disk does not keep it."""
        draft, self._draft = self._draft, None
        assert draft is not None
        if error is not None:
            self._disk.tell(error)
        with closing(draft):
            self._release()
            self._reserve(self._length)
            try:
                self._pieces.append(draft.read_back())
            except OSError as failure:
                self._disk.tell(failure)
                self._is_lost = True

    def _release(self) -> None:
        self._memory.release(self._room_bytes)
        self._room_bytes = 0

    def _reserve(self, size_bytes: int) -> None:
        if not self._memory.reserve(size_bytes, self._patience_s):
            raise errors.RequestTimeout("no memory was free for a block in time")
        self._room_bytes = size_bytes


def block_digest(block: bytes) -> bytes:
    """Return what tells a block from any other."""
    return _cut(hashlib.sha256(block))


def _cut(sha256: "hashlib._Hash") -> bytes:
    return sha256.digest()[:16]
