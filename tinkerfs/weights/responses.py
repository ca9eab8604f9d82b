"""What the head of a store's response says of its body, held against the request (pure)."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.weights.connections import STORE_ENDPOINT
from tinkerfs.weights.retry import TransferInterrupted
from tinkerfs.weights.version import UNKNOWN_BYTES

if TYPE_CHECKING:
    from tinkerfs.weights.pools import Response

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})", re.IGNORECASE)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a file a response holds.

    Attributes:
        start: of its first byte.
        stop: after its last byte; `UNKNOWN_BYTES` for the end of a file whose length is unknown.
        total_bytes: length of the file; None if the response does not state it.
        is_whole: the store ignored the range.
    """

    start: int
    stop: int
    total_bytes: int | None
    is_whole: bool


def part_of(response: "Response", start: int, stop: int, size_bytes: int | None) -> Part:
    """Return the part that a response with status 200 or 206 holds.

    Args:
        response: its body is not read.
        start: first byte that was asked for.
        stop: after the last byte that was asked for.
        size_bytes: length of the file; None if unknown.

    Raises:
        Lost: it is coded, or not about what was asked for.
    """
    headers = response.headers
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise unusable(response, "it is coded, which was not asked for")
    transfer_coding = headers.get("transfer-encoding")
    is_chunked = transfer_coding is not None
    if transfer_coding is not None and transfer_coding.strip().lower() != "chunked":
        raise unusable(response, "its transfer coding is not chunked")
    # Beside a transfer coding a Content-Length means nothing (RFC 9112, 6.3).
    length = "" if is_chunked else headers.get("content-length", "").strip()
    if length and not _LENGTH.fullmatch(length):
        raise unusable(response, "its length is not a number")
    if response.status == 206:
        return _ranged(response, start, stop, length)
    if length:
        return Part(0, int(length), int(length), is_whole=True)
    # Only chunks show whether a body without a length is complete.
    if not is_chunked:
        raise unusable(response, "it does not say how long the file is")
    end = UNKNOWN_BYTES if size_bytes is None else size_bytes
    return Part(0, end, None, is_whole=True)


def _ranged(response: "Response", start: int, stop: int, length: str) -> Part:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
    if found is None:
        raise unusable(response, "it does not say which part of the file it is")
    begin, end = int(found[1]), int(found[2]) + 1
    total_bytes = None if found[3] == "*" else int(found[3])
    if begin != start or not start < end <= stop or (length and int(length) != end - begin):
        raise unusable(response, f"it is another part than {start} to {stop}")
    if total_bytes is not None and end > total_bytes:
        raise unusable(response, "it is longer than the file")
    return Part(begin, end, total_bytes, is_whole=False)


def size_of_unsatisfied(response: "Response") -> int | None:
    """Return the length of the file that a response with status 416 states, None for none."""
    found = _UNSATISFIED.fullmatch(response.headers.get("content-range", "").strip())
    return None if found is None else int(found[1])


def unusable(response: "Response", reason: str) -> TransferInterrupted:
    """Return the failure of a response that cannot be used; another one may be better."""
    message = f"the answer of {response.host} cannot be used: {reason}"
    return TransferInterrupted(
        errors.ProtocolError(message, endpoint=STORE_ENDPOINT, status=response.status)
    )
