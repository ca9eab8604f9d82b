"""Parser of Range headers for byte ranges (RFC 9110, section 14)."""

import re

_SPEC = re.compile(r"(\d*)-(\d*)", re.ASCII)


class UnsatisfiableRange(Exception):
    """The range contains no byte of the content: the response status is 416."""


def parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return the bytes `[start, stop)` that a `Range` header requests.

    Returns:
        The range, truncated to the content. None if the server should ignore the header: another
        unit, several ranges, invalid syntax, or a suffix of empty content.

    Raises:
        UnsatisfiableRange: The range starts at or after the end, or is `-0`.
    """
    unit, _, specs = header.partition("=")
    match = _SPEC.fullmatch(specs.strip())
    if unit.strip().lower() != "bytes" or match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        if int(last) == 0:
            raise UnsatisfiableRange
        return (max(0, size_bytes - int(last)), size_bytes) if size_bytes else None
    if last and int(last) < int(first):
        return None
    if int(first) >= size_bytes:
        raise UnsatisfiableRange
    return int(first), min(int(last) + 1, size_bytes) if last else size_bytes
