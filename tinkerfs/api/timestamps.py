"""Times as servers write them, read tolerantly (pure).

Records carry ISO 8601 or Unix seconds; headers carry RFC 9110 dates and delays. What cannot be read
is None: a time that is wrong costs that field and nothing else.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime

_ISO = re.compile(
    r"\s*(\d{4})-(\d\d)-(\d\d)"
    r"(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    r"\s*(?:([Zz]|UTC|GMT)|([+-])(\d\d)(?::?(\d\d))?)?)?\s*",
    re.ASCII,
)
#: Longer text is not read: `_ISO` tries each way to share out a run of spaces.
_MAX_LENGTH = 100
_EPOCH = datetime(1970, 1, 1)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
#: Up to whole seconds, and up to microseconds.
_USUAL_LENGTHS = (19, 26)
_NS = 1_000_000_000

#: What fits 64 signed bits of nanoseconds (years 1677 to 2262): SQLite keeps no more. A time
#: outside is None, as is the year 9999 that some servers write for "never".
_LEAST_NS, _MOST_NS = -(2**63), 2**63 - 1


def parse_time_ns(value: object) -> int | None:
    """Return a record's time in nanoseconds since 1970 (UTC), None where it is none.

    Args:
        value: ISO 8601 text with `Z`, an offset or no zone (UTC then), with or without fractions
            (kept to the nanosecond); or Unix seconds, whole or not.
    """
    if isinstance(value, str):
        ns = _iso_ns(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    elif isinstance(value, int):
        ns = value * _NS
    elif math.isfinite(value):
        # Apart, because a float near 1.7e18 has steps of 256 ns.
        whole = math.floor(value)
        ns = whole * _NS + round((value - whole) * _NS)
    else:
        return None
    return ns if ns is not None and _LEAST_NS <= ns <= _MOST_NS else None


def canonical_timestamp(time_ns: int) -> str:
    """Return a time (nanoseconds since 1970) as most servers write it, but for its zone.

    That is ISO 8601 in UTC, with six digits of a second where it is no whole one.
    """
    seconds, fraction_ns = divmod(time_ns, _NS)
    when = _EPOCH + timedelta(0, seconds, fraction_ns // 1000)
    text = when.isoformat()
    return f"{text}.000000" if 0 < fraction_ns < 1000 else text


def _iso_ns(text: str) -> int | None:
    return _usual_ns(text) or _any_iso_ns(text)


def _usual_ns(text: str) -> int | None:
    """Read what `usual_text` writes, in a fifth of the time that any other ISO 8601 takes."""
    text = text.removesuffix("Z")
    if len(text) not in _USUAL_LENGTHS or text[11:13] == "24":  # to some Pythons, tomorrow
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
    year, month, day, hour, minute, second, fraction, _, sign, zone_hour, zone_minute = (
        match.groups()
    )
    try:
        days = date(int(year), int(month), int(day)).toordinal() - _EPOCH_DAY
    except ValueError:
        return None
    if hour is None:
        return days * 86400 * _NS
    hours, minutes, seconds = int(hour), int(minute), int(second or 0)
    if hours > 23 or minutes > 59 or seconds > 60:  # 60: a leap second
        return None
    total_s = days * 86400 + hours * 3600 + minutes * 60 + seconds
    if sign is not None:
        zone_s = int(zone_hour) * 3600 + int(zone_minute or 0) * 60
        total_s += zone_s if sign == "-" else -zone_s
    return total_s * _NS + (int(fraction[:9].ljust(9, "0")) if fraction else 0)


def parse_http_date_s(text: str) -> float | None:
    """Return an HTTP date (RFC 9110, 5.6.7) in seconds since 1970, None where it is none."""
    try:
        when = parsedate_to_datetime(text[:_MAX_LENGTH])
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def parse_retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return how long the server asks to wait, seconds (0 or more), None where it does not say.

    Args:
        headers: the answer's headers; `retry-after-ms` goes before `Retry-After`, which is a number
            of seconds or an HTTP date (Tinker SDK; RFC 9110, 10.2.3).
        now_s: seconds since 1970, against which a date is taken.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            wait_s = float(text) * unit_s
        except ValueError:
            then_s = parse_http_date_s(text) if name == "retry-after" else None
            if then_s is not None:
                return max(then_s - now_s, 0.0)
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    return None
