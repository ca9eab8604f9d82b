"""Bytes that are computed where they are read, so that nothing large is ever held.

An archive of many gigabytes is described by a few objects here, and any range of it costs only
that range. All classes are immutable, and so safe to share between threads.
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
"""How much is made at a time: enough for speed, little enough for 200 readers at once."""


class Content(Protocol):
    """An immutable sequence of bytes of known length."""

    @property
    def size_bytes(self) -> int:
        """The length."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`, with `0 <= start <= stop <= size_bytes`."""


def iter_chunks(content: Content, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes `[start, stop)` in pieces of at most `CHUNK_BYTES`."""
    while start < stop:
        end = min(stop, start + CHUNK_BYTES)
        yield content.read(start, end)
        start = end


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes as they are."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        """The length."""
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        return self.data[start:stop]


# An odd number of float32 values: blocks of any power of two start at different places of the
# pattern, so a reader that mixes up two blocks gets different bytes, and a test sees it.
_PATTERN_BYTES = 4 * 262_147


@functools.cache
def _pattern() -> bytes:
    rng = random.Random("tinkerfs demo weights")
    pattern = bytearray(rng.randbytes(_PATTERN_BYTES))
    # Sign and high exponent bits of little-endian float32: all values are small and finite.
    pattern[3::4] = bytes(rng.choices((0x3C, 0xBC), k=_PATTERN_BYTES // 4))
    return bytes(pattern)


@dataclass(frozen=True, slots=True)
class Noise:
    """Pseudo-random float32 values; those of two phases are the same sequence, shifted.

    Attributes:
        size_bytes: The length.
        phase: Where in the sequence it starts, any number of values.
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
    """Parts one after another."""

    __slots__ = ("_ends", "_parts", "size_bytes")

    def __init__(self, parts: Sequence[Content]) -> None:
        self._parts = tuple(part for part in parts if part.size_bytes)
        self._ends = list(accumulate(part.size_bytes for part in self._parts))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)`."""
        pieces: list[bytes] = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[index], self._ends[index]
            begin = end - part.size_bytes
            until = min(stop, end)
            pieces.append(part.read(start - begin, until - begin))
            start = until
            index += 1
        return b"".join(pieces)


_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_STORED_BYTES = 0xFFFF


class GzipStored:
    """The gzip form (RFC 1952) of a content, at level 0: stored blocks, so of known length.

    The checksum at the end is computed when it is first read, and takes one pass over the content.
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
        pieces: list[bytes] = [_GZIP_HEADER[start:stop]] if start < head else []
        at = max(start, head)
        while at < min(stop, body_end):
            index = (at - head) // step
            begin = head + index * step
            block = self._block(index)
            pieces.append(block[at - begin : stop - begin])
            at = begin + len(block)
        if stop > body_end:
            trailer = struct.pack("<II", self._crc, self._content.size_bytes & 0xFFFFFFFF)
            pieces.append(trailer[max(0, start - body_end) : stop - body_end])
        return b"".join(pieces)

    def _block(self, index: int) -> bytes:
        """The stored block of RFC 1951, section 3.2.4."""
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
