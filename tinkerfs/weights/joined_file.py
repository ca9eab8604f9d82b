"""An open file with a layout over several files of weights."""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import RequestContext
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.virtual_file import Layout

if TYPE_CHECKING:
    from tinkerfs.weights.flights import PieceFuture

#: Maximum number of files that stay open without being read: each takes a file descriptor.
MAX_OPEN_FILES = 16


@dataclass(frozen=True, slots=True)
class JoinedPart:
    """One of the files that are joined, as a whole.

    Attributes:
        key: unique for the file and its version.
        open: opens the file, without a request.
    """

    key: str
    size_bytes: int
    open: Callable[[], WeightsFile]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.size_bytes // BLOCK_BYTES)


@dataclass(slots=True)
class _OpenPart:
    file: WeightsFile
    users: int = 0


class JoinedFile(WeightsFile):
    """An open file made of others. Its blocks are theirs, so it shares their cache.

    Each part has its own readahead, so a sequential read prefetches within a part. Parts are opened
    when they are read, and a few stay open.

    Args:
        layout: the layout over the bytes of all parts, one after the other.
        mtime_ns: nanoseconds since 1970.
    """

    def __init__(self, parts: Sequence[JoinedPart], layout: Layout, mtime_ns: int) -> None:
        self._parts = parts
        self._extents = layout.extents
        self.size_bytes = layout.extents.size_bytes
        self.mtime_ns = mtime_ns
        keys = "\n".join([*(part.key for part in parts), layout.key])
        self.key = hashlib.sha256(keys.encode("utf-8", "surrogatepass")).hexdigest()
        #: Offset of each part in the source, and number of its first block. A gap in the numbers
        #: prevents that one request is for blocks of two parts.
        self._starts: list[int] = []
        self._first_blocks: list[int] = []
        start, first_block = 0, 0
        for part in parts:
            self._starts.append(start)
            self._first_blocks.append(first_block)
            start += part.size_bytes
            first_block += part.blocks + 1
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenPart] = OrderedDict()  # guarded by _lock
        if parts:  # stays open, because an export is renewed as long as a file of it is open
            self._open[0] = _OpenPart(parts[0].open(), users=1)

    def close(self) -> None:
        """See `WeightsFile.close`."""
        for part in self._open.values():
            part.file.close()

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """See `WeightsFile.read_into`."""

        def read_source(view: memoryview, start: int) -> None:
            while view:
                # Of parts with the same start, all but the last one are empty.
                number = bisect_right(self._starts, start) - 1
                with self._opened(number) as file:
                    count = file.read_into(view, start - self._starts[number], ctx)
                view, start = view[count:], start + count

        return self._extents.read_into(buffer, offset, read_source)

    def blocks(self) -> dict[int, int]:
        """See `WeightsFile.blocks`; the layout's own bytes are in no block."""
        return {
            first_block + block: min(BLOCK_BYTES, part.size_bytes - block * BLOCK_BYTES)
            for part, first_block in zip(self._parts, self._first_blocks, strict=True)
            for block in range(part.blocks)
        }

    def block_key(self, block: int) -> tuple[str, int]:
        """See `WeightsFile.block_key`."""
        number, own_block = self._locate(block)
        return self._parts[number].key, own_block

    def block_bytes(self, block: int) -> int:
        """See `WeightsFile.block_bytes`."""
        number, own_block = self._locate(block)
        return min(BLOCK_BYTES, self._parts[number].size_bytes - own_block * BLOCK_BYTES)

    def missing_blocks(self) -> dict[int, int]:
        """See `WeightsFile.missing_blocks`."""
        missing: dict[int, int] = {}
        for number, first_block in enumerate(self._first_blocks):
            if self._parts[number].size_bytes:
                with self._opened(number) as file:
                    of_part = file.missing_blocks()
                missing |= {first_block + block: each for block, each in of_part.items()}
        return missing

    def is_cached(self, block: int) -> bool:
        """See `WeightsFile.is_cached`."""
        number, own_block = self._locate(block)
        with self._opened(number) as file:
            return file.is_cached(own_block)

    def prepare(self, ctx: RequestContext) -> None:
        """See `WeightsFile.prepare`; one response has the URLs of all parts."""
        if self._parts:
            with self._opened(0) as file:
                file.prepare(ctx)

    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "PieceFuture":
        """See `WeightsFile.fetch`."""
        number, own_block = self._locate(block)
        with self._opened(number) as file:
            return file.fetch(own_block, ctx, count)

    def _locate(self, block: int) -> tuple[int, int]:
        """Return the number of a block's part, and the number of the block there."""
        number = bisect_right(self._first_blocks, block) - 1
        return number, block - self._first_blocks[number]

    @contextmanager
    def _opened(self, number: int) -> Iterator[WeightsFile]:
        """Open a part; afterwards close the parts that were not used for longest."""
        with self._lock:
            part = self._open.get(number)
            if part is None:
                part = self._open[number] = _OpenPart(self._parts[number].open())
            self._open.move_to_end(number)
            part.users += 1
        try:
            yield part.file
        finally:
            with self._lock:
                part.users -= 1
                surplus = len(self._open) - MAX_OPEN_FILES
                unused = (number for number, each in self._open.items() if not each.users)
                closing = list(islice(unused, surplus)) if surplus > 0 else []
                files = [self._open.pop(number).file for number in closing]
            for file in files:
                file.close()
