"""Tolerant parsing of timestamps in API responses. Pure.

Records contain ISO 8601 strings or Unix seconds. An invalid value is parsed as None, so that the
rest of its record stays usable.
"""

import math
import re
from datetime import UTC, datetime, timedelta

_ISO = re.compile(
    r"\s*(\d{4}-\d\d-\d\d)"
    r"(?:[Tt ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    r"\s*(?:[Zz]|UTC|GMT|([+-]\d\d(?::?\d\d)?))?)?\s*",
    re.ASCII,
)
#: Longer strings are rejected, because `_ISO` backtracks over runs of spaces.
_MAX_LENGTH = 100
_EPOCH = datetime(1970, 1, 1)
_EPOCH_UTC = datetime(1970, 1, 1, tzinfo=UTC)
#: Lengths of canonical timestamps with whole seconds and with microseconds.
_CANONICAL_LENGTHS = (19, 26)
_NS = 1_000_000_000

#: Range of signed 64-bit nanoseconds (years 1677 to 2262), as SQLite stores them. Other times are
#: parsed as None, such as the year 9999 that some servers use for "never".
_MIN_NS, _MAX_NS = -(2**63), 2**63 - 1


def parse_time_ns(value: object) -> int | None:
    """Parse a record's timestamp to nanoseconds since 1970; return None if invalid.

    Args:
        value: Unix seconds as an int or float, or an ISO 8601 string. Without a zone the string is
            in UTC. Fractions are exact to the nanosecond.
    """
    if isinstance(value, str):
        ns = _iso_ns(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    elif isinstance(value, int):
        ns = value * _NS
    elif math.isfinite(value):
        # Separately, because the resolution of a float near 1.7e18 is 256 ns.
        whole = math.floor(value)
        ns = whole * _NS + round((value - whole) * _NS)
    else:
        return None
    return ns if ns is not None and _MIN_NS <= ns <= _MAX_NS else None


def canonical_timestamp(time_ns: int) -> str:
    """Format nanoseconds since 1970 as most servers do, but without a zone.

    The format is ISO 8601 in UTC, with six decimals unless the second is whole.
    """
    seconds, fraction_ns = divmod(time_ns, _NS)
    when = _EPOCH + timedelta(0, seconds, fraction_ns // 1000)
    text = when.isoformat()
    return f"{text}.000000" if 0 < fraction_ns < 1000 else text


def _iso_ns(text: str) -> int | None:
    return _canonical_ns(text) or _any_iso_ns(text)


def _canonical_ns(text: str) -> int | None:
    """Parse the format of `canonical_timestamp`, faster than `_any_iso_ns`."""
    text = text.removesuffix("Z")
    if len(text) not in _CANONICAL_LENGTHS or text[11:13] == "24":  # some Pythons accept hour 24
        return None
    if text[7::3][:4] != "-T::" or text[19:20] not in {"", ".", ","}:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    if when.tzinfo is not None:
        return None
    span = when - _EPOCH
    return (span.days * 86400 + span.seconds) * _NS + span.microseconds * 1000


def _any_iso_ns(text: str) -> int | None:
    match = _ISO.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        return None
    day, minute, second, fraction, zone = match.groups(default="")
    if minute[:2] == "24" or second > "60":  # 60: a leap second
        return None
    try:
        span = datetime.fromisoformat(f"{day}T{minute or '00:00'}{zone or 'Z'}") - _EPOCH_UTC
    except ValueError:
        return None
    seconds = span.days * 86400 + span.seconds + int(second or 0)
    return seconds * _NS + int(fraction[:9].ljust(9, "0"))
