"""An open file with a layout over a file of weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import RequestContext
from tinkerfs.weights.extents import ExtentMap
from tinkerfs.weights.file import MemberFile
from tinkerfs.weights.readahead import ReadaheadPlan, ReadaheadState
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.tar_index import Member, Segment


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a virtual file.

    Attributes:
        extents: over the bytes of the source.
        key: unique among all layouts over a version of the source.
    """

    extents: ExtentMap
    key: str


class VirtualFile(MemberFile):
    """An open virtual file. Its blocks are those of its source, so it shares their cache.

    Args:
        file: holds the bytes of the source; already acquired, released by `close`.
        source: the segments of `file` that make up the source.
        layout: the layout of this file over the source.
    """

    def __init__(self, file: RemoteFile, source: Member, layout: Layout) -> None:
        super().__init__(file, source)
        self.key = f"{file.key} {layout.key}"
        self.size_bytes = layout.extents.size_bytes
        self._extents = layout.extents
        self._own_bytes = layout.extents.own_bytes
        self._readahead = ReadaheadState(self.size_bytes, self._own_bytes)

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """See `MemberFile.read_into`.

        A long header of this file says nothing about the reads of its source, so a read of it
        prefetches nothing.
        """
        if offset + len(buffer) <= self._own_bytes:
            self._fill(buffer, offset, ctx, BLOCK_BYTES)
            return len(buffer)
        return super().read_into(buffer, offset, ctx)

    def peek(self, start: int, stop: int) -> bytes | None:
        """See `MemberFile.peek`."""
        data = bytearray(max(min(stop, self.size_bytes) - start, 0))
        try:
            self._extents.read_into(memoryview(data), start, self._peek_source)
        except _NotCachedError:
            return None
        return bytes(data)

    def backing_fd(self, ctx: RequestContext, max_verified_bytes: float = 0) -> None:
        """Return None: the bytes of the file are in no local file."""

    def _peek_source(self, buffer: memoryview, start: int) -> None:
        data = super().peek(start, start + len(buffer))
        if data is None:
            raise _NotCachedError
        buffer[:] = data

    def _fill(
        self, buffer: memoryview, start: int, ctx: RequestContext, granule_bytes: int
    ) -> None:
        # Adjacent bytes may come from distant parts of the source, by one request after the other.
        # Whole blocks then hold more of what is read next.
        del granule_bytes
        fill = partial(super()._fill, ctx=ctx, granule_bytes=BLOCK_BYTES)
        self._extents.read_into(buffer, start, fill)

    def _stored_segments(self) -> Iterator[Segment]:
        for start, stop in self._extents.source_ranges(0, self.size_bytes):
            yield from (each for each in self._segments_in(start, stop) if each.is_stored)

    def _fetch_ahead(self, plan: ReadaheadPlan) -> None:
        for start, stop in self._extents.source_ranges(plan.start, plan.stop):
            for segment in self._segments_in(start, stop):
                if not segment.is_stored:
                    continue
                end = segment.archive_offset + segment.length
                reached = self._file.fetch_ahead(segment.archive_offset, end, plan.request_bytes)
                if reached < end:
                    return
        self._readahead.mark_fetched(plan.stop)


class _NotCachedError(Exception):
    """Bytes of the source are not cached."""
