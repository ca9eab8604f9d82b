"""JSON text of servers: read tolerantly, changed without touching what is not meant (pure).

msgspec is quick and exact, but refuses a whole text for one lone surrogate in a string, which a
name that is no UTF-8 brings in, and for one NaN, which Python servers write. What it refuses goes
through `json.loads`.
"""

import json
import math
from typing import Any

import msgspec

from tinkerfs.errors import ProtocolError

#: What msgspec raises for a text that it refuses; deep nesting is a RecursionError.
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_decode_top = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def decode_object(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the top-level fields of a JSON object, each as its own bytes.

    Raises:
        REFUSALS: it is none, or one that only `loads` may read.
    """
    if not body.isascii():
        body.decode("utf-8")  # msgspec skips bytes that are no UTF-8 unseen
    return _decode_top(body)


def decode_list(raw: msgspec.Raw) -> list[bytes]:
    """Return the items of a JSON array, each as its own bytes.

    Raises:
        REFUSALS: it is none.
    """
    return [bytes(item) for item in _decode_list(raw)]


def parse_object(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return an answer that is one JSON object: its bytes, valid JSON in UTF-8, and its fields.

    Raises:
        ProtocolError: it is none.
    """
    raw = checked_object(body)
    fields = loads_object(raw)
    if fields is None:
        raise ProtocolError("the answer is not a JSON object")
    return raw, fields


def with_fields(raw: bytes, **changes: object) -> bytes:
    """Return a JSON object with some top-level fields set; the values of others keep their bytes.

    Raises:
        ProtocolError: `raw` is not a JSON object.
        TypeError: a value cannot be JSON.
    """
    fields = _raw_fields(raw)
    for name, value in changes.items():
        fields[name] = msgspec.Raw(dumps(value))
    return _joined(fields)


def merge_objects(first: bytes, second: bytes) -> bytes:
    """Return the fields of two JSON objects in one; the second wins, values keep their bytes.

    Raises:
        ProtocolError: one of them is not a JSON object.
    """
    return _joined(_raw_fields(first) | _raw_fields(second))


def _joined(fields: dict[str, msgspec.Raw]) -> bytes:
    return b"{" + b",".join(dumps(k) + b":" + bytes(v) for k, v in fields.items()) + b"}"


def _raw_fields(raw: bytes) -> dict[str, msgspec.Raw]:
    try:
        return decode_object(raw)
    except DECODE_ERRORS:
        fields = loads_object(raw)
        if fields is None:
            raise ProtocolError("the answer is not a JSON object") from None
        return {name: msgspec.Raw(dumps(value)) for name, value in fields.items()}


def checked_object(body: bytes) -> bytes:
    """Return the body where it is a JSON object in UTF-8, else the same object written as one.

    Raises:
        ProtocolError: it is no JSON object at all.
    """
    try:
        decode_object(body)
    except DECODE_ERRORS:
        fields = loads_object(body)
        if fields is None:
            raise ProtocolError("the answer is not a JSON object") from None
        return dumps(fields)
    return body


def is_json(body: bytes) -> bool:
    """Return whether `body` is JSON, as Python reads it: any value."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def loads_object(raw: bytes) -> dict[str, Any] | None:
    """Read a JSON object as `loads` does; None where it is none."""
    value = loads(raw)
    return value if isinstance(value, dict) else None


def loads(raw: bytes) -> Any:
    """Read JSON as Python does, more tolerant than msgspec; None where even that fails.

    Bytes that are no UTF-8 become surrogate escapes (PEP 383), as they travel in file names; NaN,
    infinities and numbers too long to be read become null.
    """
    try:
        text = raw.decode("utf-8-sig", "surrogateescape")
        return json.loads(text, parse_constant=_null, parse_float=_float, parse_int=_int)
    except (ValueError, RecursionError):
        return None


def _null(_: str) -> None:
    return None


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _int(text: str) -> int | None:
    return int(text) if len(text) < 100 else None


def dumps(value: object) -> bytes:
    """Write JSON in ASCII, so that a lone surrogate stays an escape, which JSON readers take."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
