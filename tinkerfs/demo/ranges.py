"""Range requests as RFC 9110, section 14, defines them for bytes. Pure functions."""

import re

_SPEC = re.compile(r"(\d*)-(\d*)", re.ASCII)


class UnsatisfiableRange(Exception):
    """No byte of what is there was asked for: the answer is 416."""


def parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return the bytes `[start, stop)` that a `Range` header asks for.

    Args:
        header: The header's value.
        size_bytes: Length of what is asked, 0 or more.

    Returns:
        The range, cut to what is there; None where the header is to be ignored and everything
        sent: another unit, several ranges, no valid syntax, or the tail of nothing.

    Raises:
        UnsatisfiableRange: The range lies past the end, or is `-0`.
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
