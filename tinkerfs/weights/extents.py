"""Lay out a file from ranges of another file, own bytes and zeros (pure).

A virtual file has no storage of its own. A list of extents says where each of its bytes comes from,
and a read collects them. So a file with another header, or with tensors in another order, costs the
memory of its extents and no copy of the data.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

#: Fills a buffer with the bytes of the source at an offset.
ReadSource: TypeAlias = Callable[[memoryview, int], None]


@dataclass(frozen=True, slots=True)
class OwnBytes:
    """Bytes of the virtual file itself."""

    data: bytes

    @property
    def length(self) -> int:
        """The length in bytes."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes [start, start + length) of the source."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Zeros:
    """Bytes that are 0."""

    length: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the source, each between zeros: one block of a block-diagonal matrix.

    Attributes:
        start: offset of the first row in the source; the rows are adjacent there.
        count: number of rows.
        row_bytes: length of a row in the source.
        before, after: zeros before and after each row.
    """

    start: int
    count: int
    row_bytes: int
    before: int
    after: int

    @property
    def width(self) -> int:
        """The length of a row with its zeros."""
        return self.before + self.row_bytes + self.after

    @property
    def length(self) -> int:
        """The length in bytes."""
        return self.count * self.width


Extent: TypeAlias = OwnBytes | Range | Zeros | Rows


class ExtentMap:
    """The extents of a virtual file. Immutable, so thread-safe.

    Attributes:
        size_bytes: size of the virtual file.
    """

    __slots__ = ("_ends", "_extents", "size_bytes")

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = tuple(_merge_adjacent(extents))
        self._ends: list[int] = []
        self.size_bytes = 0
        for extent in self._extents:
            self.size_bytes += extent.length
            self._ends.append(self.size_bytes)

    def __len__(self) -> int:
        """Return the number of extents."""
        return len(self._extents)

    @property
    def own_bytes(self) -> int:
        """The number of bytes at the start that are in no source."""
        first = self._extents[0] if self._extents else None
        return first.length if isinstance(first, OwnBytes) else 0

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents in their order, adjacent ones merged."""
        return self._extents

    def read_into(self, buffer: memoryview, offset: int, read_source: ReadSource) -> int:
        """Fill `buffer` with the bytes at `offset`; return how many, fewer only at the end."""
        size = max(min(len(buffer), self.size_bytes - offset), 0)
        position = 0
        for extent, start, length in self._pieces(offset, offset + size):
            _fill(buffer[position : position + length], extent, start, read_source)
            position += length
        return size

    def source_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the source that hold the bytes [start, stop), in their order."""
        for extent, begin, length in self._pieces(start, stop):
            if isinstance(extent, Range):
                yield extent.start + begin, extent.start + begin + length
            elif isinstance(extent, Rows):
                first, last = begin // extent.width, -(-(begin + length) // extent.width)
                yield (
                    extent.start + first * extent.row_bytes,
                    extent.start + last * extent.row_bytes,
                )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Extent, int, int]]:
        """Yield (extent, offset in it, length) for the bytes [start, stop)."""
        for index in range(bisect_right(self._ends, start), len(self._extents)):
            if start >= stop:
                return
            extent, end = self._extents[index], self._ends[index]
            length = min(end, stop) - start
            yield extent, start - (end - extent.length), length
            start += length


def _fill(buffer: memoryview, extent: Extent, start: int, read_source: ReadSource) -> None:
    """Fill `buffer` with the bytes of an extent from `start` on."""
    if isinstance(extent, Range):
        read_source(buffer, extent.start + start)
    elif isinstance(extent, OwnBytes):
        buffer[:] = extent.data[start : start + len(buffer)]
    elif isinstance(extent, Zeros):
        buffer[:] = bytes(len(buffer))
    else:
        first = start // extent.width
        last = -(-(start + len(buffer)) // extent.width)
        rows = bytearray((last - first) * extent.row_bytes)
        read_source(memoryview(rows), extent.start + first * extent.row_bytes)
        before, after, row_bytes = bytes(extent.before), bytes(extent.after), extent.row_bytes
        padded = b"".join(
            before + rows[at : at + row_bytes] + after for at in range(0, len(rows), row_bytes)
        )
        skipped = start - first * extent.width
        buffer[:] = padded[skipped : skipped + len(buffer)]


def _merge_adjacent(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield the extents without empty ones, and with adjacent ranges and zeros merged."""
    last: Extent | None = None
    for extent in extents:
        if not extent.length:
            continue
        if isinstance(last, Range) and isinstance(extent, Range):
            if last.start + last.length == extent.start:
                last = Range(last.start, last.length + extent.length)
                continue
        elif isinstance(last, Zeros) and isinstance(extent, Zeros):
            last = Zeros(last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
