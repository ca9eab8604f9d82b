"""Which file of the cache holds which bytes of a remote file (pure).

A member of an archive has a data file of its own, which begins with the member's first byte. Once
all its bytes are cached, that file equals the member, and the kernel can read it directly. The
other bytes are in data file 0, at their offsets in the remote file.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias

#: Unit of sequential downloads. Many concurrent requests of this size hide the latency of a
#: typical store, and a single one still completes soon.
BLOCK_BYTES = 4 << 20

#: Unit of checksums and of random downloads, a divisor of `BLOCK_BYTES`. A small read downloads and
#: verifies one unit, and an interrupted download keeps all complete units.
UNIT_BYTES = 256 << 10
UNITS_PER_BLOCK = BLOCK_BYTES // UNIT_BYTES

#: Maximum space on disk for one block beyond its bytes: the other files of its directory.
OVERHEAD_BYTES = 16 << 10

#: A smaller member has no data file of its own, because every data file costs a descriptor.
MIN_PIECE_BYTES = 1 << 20
#: Maximum number of members with a data file of their own, the largest ones.
MAX_PIECES = 64


#: The number of a data file, an offset in it, and a length. A plain tuple, because each read needs
#: one.
Part: TypeAlias = tuple[int, int, int]


def units_of(start: int, stop: int) -> range:
    """Return the units that contain the bytes [start, stop) of the remote file."""
    return range(start // UNIT_BYTES, -(-stop // UNIT_BYTES))


def units_of_block(index: int) -> range:
    """Return the units of a whole block."""
    return range(index * UNITS_PER_BLOCK, (index + 1) * UNITS_PER_BLOCK)


class DataLayout:
    """The data files of a remote file. Immutable, so thread-safe.

    Args:
        pieces: the ranges [start, stop) with data files of their own: 1, 2 and so on, in this
            order. Sorted, and not overlapping.
    """

    __slots__ = ("_pieces", "_starts")

    def __init__(self, pieces: Iterable[tuple[int, int]] = ()) -> None:
        self._pieces = tuple(pieces)
        self._starts = [start for start, _stop in self._pieces]

    def split(self, offset: int, length: int) -> list[Part]:
        """Return where the bytes [offset, offset + length) of the remote file are, in order."""
        if not self._pieces:
            return [(0, offset, length)]
        parts: list[Part] = []
        stop = offset + length
        while offset < stop:
            number = bisect_right(self._starts, offset)
            start, end = self._pieces[number - 1] if number else (0, 0)
            if offset < end:
                part = (number, offset - start, min(end, stop) - offset)
            else:
                limit = self._starts[number] if number < len(self._starts) else stop
                part = (0, offset, min(limit, stop) - offset)
            parts.append(part)
            offset += part[2]
        return parts

    def file_of(self, start: int, stop: int, size_bytes: int) -> int | None:
        """Return the number of the data file that holds [start, stop) and nothing else.

        Args:
            size_bytes: length of the remote file.
        """
        if (start, stop) in self._pieces:
            return self._pieces.index((start, stop)) + 1
        return 0 if not self._pieces and (start, stop) == (0, size_bytes) else None

    def encode(self) -> bytes:
        """Return the layout as stored on disk."""
        return json.dumps(self._pieces).encode()


def choose_layout(members: Iterable[tuple[int, int]]) -> DataLayout:
    """Return the layout of an archive from the ranges [start, stop) of its members."""
    large = {each for each in members if each[1] - each[0] >= MIN_PIECE_BYTES}
    largest = sorted(large, key=lambda each: each[0] - each[1])[:MAX_PIECES]
    pieces: list[tuple[int, int]] = []
    for start, stop in sorted(largest):
        if not pieces or pieces[-1][1] <= start:  # a hard link is a second name of the same bytes
            pieces.append((start, stop))
    return DataLayout(pieces)


def decode_layout(data: bytes) -> DataLayout:
    """Return a layout as `DataLayout.encode` stored it.

    Raises:
        ValueError: it is not one.
    """
    pieces, end = [], 0
    for piece in json.loads(data):
        start, stop = piece
        if not (isinstance(start, int) and isinstance(stop, int) and end <= start < stop):
            raise ValueError("the ranges overlap")
        pieces.append((start, stop))
        end = stop
    return DataLayout(pieces)
