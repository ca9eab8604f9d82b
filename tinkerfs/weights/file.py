"""Positional reads of open files of weights."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Self

from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import RequestContext
from tinkerfs.weights.block_math import block_range
from tinkerfs.weights.readahead import ReadaheadPlan, ReadaheadState
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, tensor_end_offsets
from tinkerfs.weights.tar_index import Member, Segment

if TYPE_CHECKING:
    from tinkerfs.weights.flights import PieceFuture


class WeightsFile(ABC):
    """An open file of weights. Thread-safe; reads are positional; a context manager.

    Attributes:
        key: unique for a file and its version.
        mtime_ns: nanoseconds since 1970.
    """

    key: str
    size_bytes: int
    mtime_ns: int

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the file."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release the file. Call it once; no other method may be called afterwards."""

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); see `read_into`."""
        data = bytearray(max(min(size, self.size_bytes - offset), 0))
        self.read_into(memoryview(data), offset, ctx)
        return bytes(data)

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill `buffer` with the bytes at `offset`; return how many were read.

        Fewer bytes than requested are read only at the end of the file. The buffer is not used
        after the return. `ctx` cancels the wait.

        Raises:
            ApiError: the download fails.
            OSError: ESTALE if the archive has changed or is gone; EIO if it is corrupt; EINTR if
                the caller was interrupted; see also `SignedUrlCache.url`.
        """

    @abstractmethod
    def blocks(self) -> dict[int, int]:
        """Return how many bytes of the file each block holds.

        Bytes that need no download are in no block, such as those of holes.
        """

    @abstractmethod
    def block_key(self, block: int) -> tuple[str, int]:
        """Return what identifies a block; files over the same bytes share it."""

    @abstractmethod
    def block_bytes(self, block: int) -> int:
        """Return the length of a block, including bytes of other members."""

    @abstractmethod
    def missing_blocks(self) -> dict[int, int]:
        """Return how many bytes of the file each block lacks on disk; omit blocks that lack none.

        Send no request.
        """

    def cached_bytes(self) -> int:
        """Return how many bytes are on disk; those in no block count as on disk."""
        return self.size_bytes - sum(self.missing_blocks().values())

    @abstractmethod
    def is_cached(self, block: int) -> bool:
        """Return whether a whole block is on disk; send no request."""

    def backing_fd(self, ctx: RequestContext, max_verified_bytes: float = math.inf) -> int | None:
        """Return a new descriptor of a local file with the same bytes, which the caller closes.

        None if there is none, if not all of it is cached, or if it is longer than
        `max_verified_bytes` and was not verified before. The checksum of 1 GiB takes 0.3 s.
        """
        del ctx, max_verified_bytes
        return None

    @abstractmethod
    def prepare(self, ctx: RequestContext) -> None:
        """Get a signed URL for later fetches; wait until the archive is built.

        Raises:
            ApiError: the request fails.
            OSError: ESTALE if the checkpoint is gone; see also `SignedUrlCache.url`.
        """

    @abstractmethod
    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "PieceFuture":
        """Start to download a block, or join its download; see `RemoteFile.fetch`.

        `count` is the number of blocks that one request may download, from this one on.
        """


class MemberFile(WeightsFile):
    """An open file that consists of segments of a remote file, such as an archive.

    Args:
        file: holds the bytes; already acquired, released by `close`.
        member: the segments of `file` that make up this file.
    """

    def __init__(self, file: RemoteFile, member: Member) -> None:
        self.key = file.key
        self.size_bytes = member.size_bytes
        self.mtime_ns = member.mtime_ns
        self._file = file
        self._segments = member.segments
        #: None for empty and sparse files; the reads of others skip the segment lookup.
        self._range = member.archive_range
        self._readahead = ReadaheadState(member.size_bytes)

    def close(self) -> None:
        """See `WeightsFile.close`."""
        self._file.release()

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """See `WeightsFile.read_into`."""
        size = min(len(buffer), self.size_bytes - offset)
        if size <= 0:
            return 0
        if self._readahead.needs_tensor_offsets(offset):
            self._load_tensor_offsets()
        plan = self._readahead.on_read(offset, size)
        if plan.start < plan.stop:  # before the wait for the demand read, so that both overlap
            self._fetch_ahead(plan)
        if size < len(buffer):
            buffer = buffer[:size]
        self._fill(buffer, offset, ctx, plan.granule_bytes)
        return size

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) if all are cached, else None; send no request."""
        parts = []
        for segment in self._segments_in(start, stop):
            data = (
                bytes(segment.length) if not segment.is_stored else self._file.peek(*_span(segment))
            )
            if data is None:
                return None
            parts.append(data)
        return b"".join(parts)

    def blocks(self) -> dict[int, int]:
        """See `WeightsFile.blocks`; holes are in no block."""
        found: dict[int, int] = {}
        for index, start, stop in self._block_parts():
            found[index] = found.get(index, 0) + stop - start
        return found

    def missing_blocks(self) -> dict[int, int]:
        """See `WeightsFile.missing_blocks`."""
        missing: dict[int, int] = {}
        # A file may have many segments in one block, so only those of a partly cached block are
        # looked up one by one.
        cached: dict[int, int] = {}
        for index, start, stop in self._block_parts():
            if index not in cached:
                begin, length = index * BLOCK_BYTES, self.block_bytes(index)
                cached[index] = self._file.cached_bytes(begin, begin + length)
            missing_bytes = stop - start
            if cached[index] == self.block_bytes(index):
                continue
            if cached[index]:
                missing_bytes -= self._file.cached_bytes(start, stop)
            if missing_bytes:
                missing[index] = missing.get(index, 0) + missing_bytes
        return missing

    def block_key(self, block: int) -> tuple[str, int]:
        """See `WeightsFile.block_key`."""
        return self._file.key, block

    def block_bytes(self, block: int) -> int:
        """See `WeightsFile.block_bytes`."""
        return self._file.block_bytes(block)

    def is_cached(self, block: int) -> bool:
        """See `WeightsFile.is_cached`."""
        return self._file.is_on_disk(block)

    def backing_fd(self, ctx: RequestContext, max_verified_bytes: float = math.inf) -> int | None:
        """See `WeightsFile.backing_fd`."""
        if self._range is None:
            return None
        return self._file.backing_fd(*self._range, ctx, max_verified_bytes)

    def prepare(self, ctx: RequestContext) -> None:
        """See `WeightsFile.prepare`."""
        self._file.prepare(ctx)

    def fetch(self, block: int, ctx: RequestContext, count: int = 1) -> "PieceFuture":
        """See `WeightsFile.fetch`."""
        return self._file.fetch(block, ctx, count)

    def _fill(
        self, buffer: memoryview, start: int, ctx: RequestContext, granule_bytes: int
    ) -> None:
        if self._range is not None:
            self._file.read_into(buffer, self._range[0] + start, ctx, granule_bytes)
            return
        for segment in self._segments_in(start, start + len(buffer)):
            view = buffer[segment.offset - start :][: segment.length]
            if not segment.is_stored:
                view[:] = bytes(segment.length)
            else:
                self._file.read_into(view, segment.archive_offset, ctx, granule_bytes)

    def _block_parts(self) -> Iterator[tuple[int, int, int]]:
        """Yield block index, start and stop of the stored bytes of the file in each block."""
        for segment in self._stored_segments():
            start, stop = _span(segment)
            for index in block_range(start, stop):
                begin = index * BLOCK_BYTES
                yield index, max(start, begin), min(stop, begin + BLOCK_BYTES)

    def _stored_segments(self) -> Iterable[Segment]:
        """Return the segments that hold the bytes of the file, some of them repeatedly."""
        return self._segments

    def _load_tensor_offsets(self) -> None:
        """Read the tensor offsets from the header, if it is cached."""
        prefix = self.peek(0, LENGTH_BYTES)
        if prefix is None:
            return
        try:
            stop = LENGTH_BYTES + header_length(prefix, self.size_bytes)
            header = self.peek(LENGTH_BYTES, stop)
            if header is not None:
                self._readahead.set_tensor_offsets(tensor_end_offsets(header, self.size_bytes))
        except ValueError:
            self._readahead.set_tensor_offsets(())

    def _fetch_ahead(self, plan: ReadaheadPlan) -> None:
        for segment in self._segments_in(plan.start, plan.stop):
            if not segment.is_stored:
                continue
            begin, end = _span(segment)
            reached = self._file.fetch_ahead(
                begin, end, plan.request_bytes, plan.ahead_granule_bytes
            )
            self._readahead.mark_fetched(segment.offset + reached - begin)
            if reached < end:
                return

    def _segments_in(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield the segments of [start, stop) in order; a hole has archive offset -1."""
        offset = start
        first = bisect_right(self._segments, start, key=lambda each: each.offset + each.length)
        for segment in islice(self._segments, first, None):
            if segment.offset >= stop:
                break
            if segment.offset > offset:
                yield Segment(offset, segment.offset - offset, -1)
                offset = segment.offset
            skipped = offset - segment.offset
            length = min(segment.length - skipped, stop - offset)
            yield Segment(offset, length, segment.archive_offset + skipped)
            offset += length
        if offset < stop:
            yield Segment(offset, stop - offset, -1)


def _span(segment: Segment) -> tuple[int, int]:
    return segment.archive_offset, segment.archive_offset + segment.length
