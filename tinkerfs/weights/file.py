"""One open file of weights: positional reads, put together from where its bytes are."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Self

from tinkerfs.context import RequestContext
from tinkerfs.weights.block_math import BLOCK_BYTES, block_range
from tinkerfs.weights.readahead import ReadaheadPlan, ReadaheadState
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, tensor_end_offsets
from tinkerfs.weights.tar_index import Member, Segment

if TYPE_CHECKING:
    from concurrent.futures import Future


class WeightsFile:
    """One open file. Thread-safe; reads are positional; a context manager.

    Args:
        file: holds its bytes, in use; released by `close`.
        member: where they are in it.

    Attributes:
        key: another version of the file has another one.
        size_bytes: its length.
        mtime_ns: nanoseconds since 1970.
    """

    def __init__(self, file: RemoteFile, member: Member) -> None:
        self.key = file.key
        self.size_bytes = member.size_bytes
        self.mtime_ns = member.mtime_ns
        self._file = file
        self._segments = member.segments
        #: As all but sparse files are, which spares the walk over pieces.
        self._is_in_one_piece = (
            len(member.segments) == 1
            and member.segments[0].offset == 0
            and member.segments[0].length == member.size_bytes
        )
        self._ahead = ReadaheadState(member.size_bytes)

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of it; to be called once, and no other method after."""
        self._file.release()

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); as `read_into`."""
        data = bytearray(max(min(size, self.size_bytes - offset), 0))
        self.read_into(memoryview(data), offset, ctx)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill `buffer` with the bytes from `offset` on, and return how many there are.

        Args:
            buffer: of bytes; not used once this has returned.
            offset: in the file; fewer bytes than asked for come only at its end.
            ctx: tells when to give up.

        Raises:
            ApiError: they cannot be had.
            OSError: ESTALE when the checkpoint or its archive is gone or another one; EIO when it
                is damaged; EINTR when the caller gave up; as `Archives.url`.
        """
        size = min(len(buffer), self.size_bytes - offset)
        if size <= 0:
            return 0
        ahead = self._ahead.on_read(offset, size)
        if ahead.start < ahead.stop:  # before the wait for these, so that it comes meanwhile
            self._fetch_ahead(ahead)
        if size < len(buffer):
            buffer = buffer[:size]
        self._fill(buffer, offset, ctx)
        if self._ahead.needs_tensor_offsets():
            self._load_tensor_offsets()
        return size

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) where they are all there, without any request."""
        pieces = []
        for piece in self._segments_in(start, stop):
            data = (
                bytes(piece.length) if piece.archive_offset < 0 else self._file.peek(*_span(piece))
            )
            if data is None:
                return None
            pieces.append(data)
        return b"".join(pieces)

    def blocks(self) -> dict[int, int]:
        """Return how many of its bytes each of its blocks holds; holes are in none."""
        found: dict[int, int] = {}
        for segment in self._segments:
            start, stop = _span(segment)
            for index in block_range(start, stop):
                begin = index * BLOCK_BYTES
                held_bytes = min(stop, begin + BLOCK_BYTES) - max(start, begin)
                found[index] = found.get(index, 0) + held_bytes
        return found

    def block_bytes(self, block: int) -> int:
        """Return the length of a block, whatever it holds."""
        return self._file.block_bytes(block)

    def kept_bytes(self) -> int:
        """Return how many of its bytes are on disk; holes always are."""
        return self.size_bytes - sum(
            held for index, held in self.blocks().items() if not self.is_cached(index)
        )

    def is_cached(self, block: int) -> bool:
        """Tell whether a block is on disk, without any request."""
        return self._file.is_on_disk(block)

    def prepare(self, ctx: RequestContext) -> None:
        """Have what a fetch needs, waiting for the archive to be built.

        Raises:
            ApiError: it is not to be had.
            OSError: ESTALE when the checkpoint is gone; as `Archives.url`.
        """
        self._file.prepare(ctx)

    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "Future[bytes | None]":
        """Begin to fetch a block, or join who does; as `RemoteFile.fetch`."""
        return self._file.fetch(block, ctx, count)

    def _fill(self, buffer: memoryview, start: int, ctx: RequestContext) -> None:
        if self._is_in_one_piece:
            self._file.read_into(buffer, self._segments[0].archive_offset + start, ctx)
            return
        for piece in self._segments_in(start, start + len(buffer)):
            part = buffer[piece.offset - start :][: piece.length]
            if piece.archive_offset < 0:
                part[:] = bytes(piece.length)
            else:
                self._file.read_into(part, piece.archive_offset, ctx)

    def _load_tensor_offsets(self) -> None:
        """Look for a header of tensors in what is there: who wants one of them has just read it."""
        prefix = self.peek(0, LENGTH_BYTES)
        if prefix is None:
            return
        try:
            stop = LENGTH_BYTES + header_length(prefix, self.size_bytes)
            header = self.peek(LENGTH_BYTES, stop)
            if header is not None:
                self._ahead.set_tensor_offsets(tensor_end_offsets(header, self.size_bytes))
        except ValueError:
            self._ahead.set_tensor_offsets(())

    def _fetch_ahead(self, ahead: ReadaheadPlan) -> None:
        for piece in self._segments_in(ahead.start, ahead.stop):
            if piece.archive_offset < 0:
                continue
            begin, end = _span(piece)
            reached = self._file.fetch_ahead(begin, end, ahead.request_bytes)
            self._ahead.mark_fetched(piece.offset + reached - begin)
            if reached < end:
                return

    def _segments_in(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield where the bytes [start, stop) are, in order; a hole is at -1."""
        at = start
        first = bisect_right(self._segments, start, key=lambda each: each.offset + each.length)
        for segment in islice(self._segments, first, None):
            if segment.offset >= stop:
                break
            if segment.offset > at:
                yield Segment(at, segment.offset - at, -1)
                at = segment.offset
            skipped = at - segment.offset
            length = min(segment.length - skipped, stop - at)
            yield Segment(at, length, segment.archive_offset + skipped)
            at += length
        if at < stop:
            yield Segment(at, stop - at, -1)


def _span(piece: Segment) -> tuple[int, int]:
    return piece.archive_offset, piece.archive_offset + piece.length
