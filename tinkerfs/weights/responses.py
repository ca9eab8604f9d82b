"""Validate the head of a store's response against the request (pure)."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.retry import FailureKind
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT, TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES

if TYPE_CHECKING:
    from tinkerfs.weights.http import StreamedResponse

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})", re.IGNORECASE)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """The range of a file that a response contains.

    Attributes:
        start: offset of the first byte.
        stop: offset after the last byte; `UNKNOWN_BYTES` for the end of a file of unknown length.
        total_bytes: length of the file; None if the response does not state it.
        is_full_body: whether the store has ignored the requested range.
    """

    start: int
    stop: int
    total_bytes: int | None
    is_full_body: bool


def parse_content_range(
    response: "StreamedResponse", start: int, stop: int, size_bytes: int | None
) -> ContentRange:
    """Return the range of the file that a response with status 200 or 206 contains.

    The range [start, stop) was requested; `size_bytes` is the length of the file, None if unknown.
    The body is not read.

    Raises:
        TransferInterrupted: the body is encoded, or the range is not the requested one.
    """
    headers = response.headers
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise invalid_response(response, "it has a content encoding that was not requested")
    transfer_coding = headers.get("transfer-encoding")
    is_chunked = transfer_coding is not None
    if transfer_coding is not None and transfer_coding.strip().lower() != "chunked":
        raise invalid_response(response, "its transfer coding is not chunked")
    # Content-Length is ignored next to a transfer coding (RFC 9112, 6.3).
    length = "" if is_chunked else headers.get("content-length", "").strip()
    if length and not _LENGTH.fullmatch(length):
        raise invalid_response(response, "its length is not a number")
    if response.status == 206:
        return _parse_partial(response, start, stop, length)
    if length:
        return ContentRange(0, int(length), int(length), is_full_body=True)
    # Only chunks show whether a body without a length is complete.
    if not is_chunked:
        raise invalid_response(response, "it does not state how long the file is")
    end = UNKNOWN_BYTES if size_bytes is None else size_bytes
    return ContentRange(0, end, None, is_full_body=True)


def _parse_partial(
    response: "StreamedResponse", start: int, stop: int, length: str
) -> ContentRange:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
    if found is None:
        raise invalid_response(response, "it does not state which range it contains")
    begin, end = int(found[1]), int(found[2]) + 1
    total_bytes = None if found[3] == "*" else int(found[3])
    if begin != start or not start < end <= stop or (length and int(length) != end - begin):
        raise invalid_response(response, f"it contains another range than {start} to {stop}")
    if total_bytes is not None and end > total_bytes:
        raise invalid_response(response, "its range exceeds the file")
    return ContentRange(begin, end, total_bytes, is_full_body=False)


def unsatisfied_size(response: "StreamedResponse") -> int | None:
    """Return the file length in a response with status 416, None if absent."""
    found = _UNSATISFIED.fullmatch(response.headers.get("content-range", "").strip())
    return None if found is None else int(found[1])


def invalid_response(response: "StreamedResponse", reason: str) -> TransferInterrupted:
    """Return the retryable error of a response that fails validation."""
    message = f"invalid response from {response.host}: {reason}"
    return TransferInterrupted(
        errors.ProtocolError(message, endpoint=STORE_ENDPOINT, status=response.status),
        FailureKind.UNUSABLE_RESPONSE,
    )
