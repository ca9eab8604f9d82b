"""An open file with a layout over several files of weights."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinkerfs.context import RequestContext
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.virtual_file import Layout

if TYPE_CHECKING:
    from concurrent.futures import Future


class JoinedFile(WeightsFile):
    """An open file made of others. Its blocks are theirs, so it shares their cache.

    Each file has its own readahead, so a sequential read prefetches within a file.

    Args:
        files: open files, closed by `close`.
        layout: the layout over the bytes of all files, one after the other.
        mtime_ns: nanoseconds since 1970.
    """

    def __init__(self, files: Sequence[WeightsFile], layout: Layout, mtime_ns: int) -> None:
        self._files = files
        self._extents = layout.extents
        self.size_bytes = layout.extents.size_bytes
        self.mtime_ns = mtime_ns
        keys = "\n".join([*(file.key for file in files), layout.key])
        self.key = hashlib.sha256(keys.encode("utf-8", "surrogatepass")).hexdigest()
        #: Offset of each file in the source, and number of its first block. A gap in the numbers
        #: prevents that one request is for blocks of two files.
        self._starts: list[int] = []
        self._first_blocks: list[int] = []
        start, first_block = 0, 0
        for file in files:
            self._starts.append(start)
            self._first_blocks.append(first_block)
            start += file.size_bytes
            first_block += max(file.blocks(), default=0) + 2

    def close(self) -> None:
        """See `WeightsFile.close`."""
        for file in self._files:
            file.close()

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """See `WeightsFile.read_into`."""

        def read_source(view: memoryview, start: int) -> None:
            while view:
                # Of files with the same start, all but the last one are empty.
                number = bisect_right(self._starts, start) - 1
                count = self._files[number].read_into(view, start - self._starts[number], ctx)
                view, start = view[count:], start + count

        return self._extents.read_into(buffer, offset, read_source)

    def blocks(self) -> dict[int, int]:
        """See `WeightsFile.blocks`; the layout's own bytes are in no block."""
        return {
            first_block + block: held_bytes
            for file, first_block in zip(self._files, self._first_blocks, strict=True)
            for block, held_bytes in file.blocks().items()
        }

    def block_key(self, block: int) -> tuple[str, int]:
        """See `WeightsFile.block_key`."""
        file, number = self._locate(block)
        return file.block_key(number)

    def block_bytes(self, block: int) -> int:
        """See `WeightsFile.block_bytes`."""
        file, number = self._locate(block)
        return file.block_bytes(number)

    def is_cached(self, block: int) -> bool:
        """See `WeightsFile.is_cached`."""
        file, number = self._locate(block)
        return file.is_cached(number)

    def prepare(self, ctx: RequestContext) -> None:
        """See `WeightsFile.prepare`."""
        for file in self._files:
            file.prepare(ctx)

    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "Future[bytes | None]":
        """See `WeightsFile.fetch`."""
        file, number = self._locate(block)
        return file.fetch(number, ctx, count)

    def _locate(self, block: int) -> tuple[WeightsFile, int]:
        """Return the file of a block, and its number there."""
        number = bisect_right(self._first_blocks, block) - 1
        return self._files[number], block - self._first_blocks[number]
