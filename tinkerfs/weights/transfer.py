"""Transfer bytes of a remote file in order; resume it, never mix versions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.retry import RetryBudget
from tinkerfs.weights.responses import ContentRange, invalid_response
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT, TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES, Version

if TYPE_CHECKING:
    from tinkerfs.weights.http import StreamedResponse

#: Bytes that a resumed transfer requests again, to verify that the version is the same.
OVERLAP_BYTES = 4096

#: Progress that restarts the retry budget. So a slow transfer that makes progress is never aborted,
#: and a dead store is reported within the timeout.
PROGRESS_BYTES = 64 << 10

_WITHOUT_END = 1 << 62


class _Source(Protocol):
    def send(
        self, start: int, stop: int, retry_budget: RetryBudget, *, is_resumed: bool = False
    ) -> "RangeResponse": ...

    def report_stale(self, reason: str) -> OSError: ...

    def record_sample(self, start: int, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """A valid response, with the range and the version of the file that it contains."""

    http: "StreamedResponse"
    content_range: ContentRange
    version: Version

    def chunks(self) -> Iterator[bytes]:
        """Yield the body.

        The last chunk is yielded only after the end of the body has been received.

        Raises:
            TransferInterrupted: the body breaks off, or has another length than stated.
        """
        offset, stop = self.content_range.start, self.content_range.stop
        chunks = self.http.chunks()
        for chunk in chunks:
            offset += len(chunk)
            is_last = stop != UNKNOWN_BYTES and offset >= stop
            if is_last and (offset > stop or next(chunks, None) is not None):
                raise invalid_response(self.http, "its body is longer than stated")
            yield chunk
        if offset < stop:
            raise TransferInterrupted(
                errors.ConnectionFailed("the store sent too few bytes", endpoint=STORE_ENDPOINT)
            )


class Transfer:
    """Bytes of a file, in order as they arrive. Not thread-safe; a context manager.

    Args:
        source: sends the request for the rest after an interruption or a short response.
        response: the first response; it begins `len(before)` bytes before `start`.
        before: the known bytes that precede `start`.

    Attributes:
        start: offset of the first byte.
        stop: offset after the last byte; far beyond the file's end while its length is unknown.
        version: of the file; it includes the length at the end of the transfer.
        is_full_body: whether the store does not support range requests and sends the whole file.
    """

    def __init__(
        self,
        source: _Source,
        response: RangeResponse,
        start: int,
        stop: int,
        retry_budget: RetryBudget,
        before: bytes = b"",
    ) -> None:
        self.version = response.version
        self.is_full_body = response.content_range.is_full_body
        size_bytes = self.version.size_bytes
        end = _WITHOUT_END if size_bytes == UNKNOWN_BYTES else size_bytes
        self.start = 0 if self.is_full_body else start
        self.stop = end if self.is_full_body else min(stop, end)
        self._source = source
        self._response = response
        self._retry_budget = retry_budget
        self._progress_bytes = 0
        # A strong ETag distinguishes versions. Without one, only the bytes themselves do.
        self._verifies_overlap = not self.version.is_exact
        self._tail = b"" if self.is_full_body else before
        self._digest = hashlib.sha256() if self.is_full_body and self._verifies_overlap else None

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes [start, stop).

        Raises:
            ApiError: all attempts fail.
            OSError: ESTALE if the file has changed or is gone.
        """
        offset = self.start
        while offset < self.stop:
            is_interrupted = False
            try:
                for chunk in self._chunks(offset):
                    fresh = chunk[: self.stop - offset]
                    if offset == self.start:
                        self._source.record_sample(offset, fresh)
                    offset += len(fresh)
                    self._record(fresh)
                    yield fresh
                    # The body is read to its end, because only then its connection is reused.
                    if offset == self.stop < self._response.content_range.stop:
                        break
                if self.stop == _WITHOUT_END:
                    self.stop = offset
                    self.version = replace(self.version, size_bytes=offset)
            except TransferInterrupted as interruption:
                is_interrupted = True
                if offset < self.stop:
                    interruption.wait_or_raise(self._retry_budget)
            finally:
                self._response.http.close()
            if offset < self.stop:
                start = offset - len(self._tail)
                self._response = self._source.send(
                    start, self.stop, self._retry_budget, is_resumed=is_interrupted
                )

    def _chunks(self, resume_offset: int) -> Iterator[bytes]:
        """Yield the bytes from `resume_offset` on; verify those before it.

        Raises:
            TransferInterrupted: as `RangeResponse.chunks`.
            OSError: ESTALE if the bytes before the offset differ from those received before.
        """
        offset = self._response.content_range.start
        # If the whole file arrives again, all of it is compared; otherwise only the overlap.
        digest = self._digest if offset == 0 else None
        repeated, tail = hashlib.sha256(), b""
        for received in self._response.chunks():
            old = received[: max(resume_offset - offset, 0)]
            offset += len(received)
            if old and self._verifies_overlap:
                tail = (tail + old[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]
                if digest is not None:
                    repeated.update(old)
                if offset >= resume_offset and not (
                    tail.endswith(self._tail)
                    and (digest is None or digest.digest() == repeated.digest())
                ):
                    raise self._source.report_stale("the store has another version now")
            if len(received) > len(old):
                yield received[len(old) :]

    def _record(self, chunk: bytes) -> None:
        if self._verifies_overlap:
            self._tail = (self._tail + chunk[-OVERLAP_BYTES:])[-OVERLAP_BYTES:]
        if self._digest is not None:
            self._digest.update(chunk)
        self._progress_bytes += len(chunk)
        if self._progress_bytes >= PROGRESS_BYTES:
            self._progress_bytes = 0
            self._retry_budget.restart()

    def close(self) -> None:
        """Close the connection, unless the body has been read to its end."""
        self._response.http.close()

    def __enter__(self) -> Self:
        """Return the transfer itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the transfer."""
        self.close()
