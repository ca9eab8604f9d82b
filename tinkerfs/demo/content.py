"""Immutable byte sequences that are computed on read and need no memory.

A few objects describe an archive of many gigabytes, and reading a range computes only that range.
All classes are immutable and therefore thread-safe.
"""

import bisect
import functools
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

CHUNK_BYTES = 256 * 1024
"""Size of the chunks that are sent: large enough for speed, small enough for 200 readers."""


class Content(Protocol):
    """An immutable sequence of bytes of known length."""

    @property
    def size_bytes(self) -> int:
        """The length in bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`, with `0 <= start <= stop <= size_bytes`."""


def iter_chunks(content: Content, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes `[start, stop)` in chunks of at most `CHUNK_BYTES`."""
    while start < stop:
        end = min(stop, start + CHUNK_BYTES)
        yield content.read(start, end)
        start = end


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes in memory."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        """The length in bytes."""
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        return self.data[start:stop]


# An odd number of float32 values, so that blocks of any power of two start at different offsets in
# the pattern. A reader that confuses two blocks therefore gets different bytes.
_PATTERN_BYTES = 4 * 262_147


@functools.cache
def _pattern() -> bytes:
    rng = random.Random("tinkerfs demo weights")
    pattern = bytearray(rng.randbytes(_PATTERN_BYTES))
    # Set sign and high exponent bits of little-endian float32, for small and finite values.
    pattern[3::4] = bytes(rng.choices((0x3C, 0xBC), k=_PATTERN_BYTES // 4))
    return bytes(pattern)


@dataclass(frozen=True, slots=True)
class Noise:
    """Pseudo-random float32 values from one fixed and infinite sequence.

    Attributes:
        size_bytes: The length in bytes.
        phase: Index of the first value in the sequence.
    """

    size_bytes: int
    phase: int

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        pattern = _pattern()
        at = (self.phase * 4 + start) % _PATTERN_BYTES
        wanted = stop - start
        first = pattern[at : at + wanted]
        if len(first) == wanted:
            return first
        whole, rest = divmod(wanted - len(first), _PATTERN_BYTES)
        return first + pattern * whole + pattern[:rest]


class Concat:
    """Concatenation of several contents."""

    __slots__ = ("_ends", "_parts", "size_bytes")

    def __init__(self, parts: Sequence[Content]) -> None:
        self._parts = tuple(part for part in parts if part.size_bytes)
        self._ends = list(accumulate(part.size_bytes for part in self._parts))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        chunks: list[bytes] = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[index], self._ends[index]
            begin = end - part.size_bytes
            until = min(stop, end)
            chunks.append(part.read(start - begin, until - begin))
            start = until
            index += 1
        return b"".join(chunks)


_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_STORED_BYTES = 0xFFFF


class GzipStored:
    """A content in gzip format (RFC 1952) with stored blocks, so of known length.

    The trailing checksum is computed when it is first read, in one pass over the content.
    """

    __slots__ = ("__dict__", "_blocks", "_content", "size_bytes")

    def __init__(self, content: Content) -> None:
        self._content = content
        self._blocks = max(1, -(-content.size_bytes // _STORED_BYTES))
        self.size_bytes = len(_GZIP_HEADER) + 5 * self._blocks + content.size_bytes + 8

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        head, step = len(_GZIP_HEADER), _STORED_BYTES + 5
        body_end = self.size_bytes - 8
        chunks: list[bytes] = [_GZIP_HEADER[start:stop]] if start < head else []
        at = max(start, head)
        while at < min(stop, body_end):
            index = (at - head) // step
            begin = head + index * step
            block = self._block(index)
            chunks.append(block[at - begin : stop - begin])
            at = begin + len(block)
        if stop > body_end:
            trailer = struct.pack("<II", self._crc, self._content.size_bytes & 0xFFFFFFFF)
            chunks.append(trailer[max(0, start - body_end) : stop - body_end])
        return b"".join(chunks)

    def _block(self, index: int) -> bytes:
        """Return a stored block (RFC 1951, section 3.2.4)."""
        begin = index * _STORED_BYTES
        data = self._content.read(begin, min(begin + _STORED_BYTES, self._content.size_bytes))
        is_last = index == self._blocks - 1
        return struct.pack("<BHH", is_last, len(data), len(data) ^ 0xFFFF) + data

    @functools.cached_property
    def _crc(self) -> int:
        crc = 0
        for chunk in iter_chunks(self._content, 0, self._content.size_bytes):
            crc = zlib.crc32(chunk, crc)
        return crc
