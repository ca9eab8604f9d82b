"""Tolerant JSON decoding, and changes of JSON that keep all other bytes. Pure.

msgspec is fast and strict. It rejects a whole document for one lone surrogate (from a non-UTF-8
name) or for one NaN (written by Python servers). Such documents are decoded by `json.loads`.
"""

import json
import math
from typing import Any

import msgspec

from tinkerfs.errors import ProtocolError

#: Errors that msgspec raises for rejected documents; deep nesting raises a RecursionError.
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_decode_top = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def decode_object(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the top-level fields of a JSON object as raw JSON.

    Raises:
        DECODE_ERRORS: the body is not a JSON object that msgspec accepts.
    """
    if not body.isascii():
        body.decode("utf-8")  # msgspec does not report non-UTF-8 bytes
    return _decode_top(body)


def decode_list(raw: msgspec.Raw) -> list[bytes]:
    """Return the items of a JSON array as raw JSON.

    Raises:
        DECODE_ERRORS: the value is not a JSON array.
    """
    return [bytes(item) for item in _decode_list(raw)]


def parse_object(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return a JSON object as valid UTF-8 JSON and as a dict.

    Raises:
        ProtocolError: the body is not a JSON object.
    """
    raw = normalize_object(body)
    fields = loads_object(raw)
    if fields is None:
        raise ProtocolError("the response is not a JSON object")
    return raw, fields


def with_fields(raw: bytes, **changes: object) -> bytes:
    """Set top-level fields of a JSON object; all other values keep their bytes.

    Raises:
        ProtocolError: `raw` is not a JSON object.
        TypeError: a value cannot be encoded as JSON.
    """
    fields = _raw_fields(raw)
    for name, value in changes.items():
        fields[name] = msgspec.Raw(dumps(value))
    return _joined(fields)


def merge_objects(first: bytes, second: bytes, *, skips_nulls: bool = False) -> bytes:
    """Merge two JSON objects; fields of the second win, and values keep their bytes.

    With `skips_nulls`, a null of the second does not replace a field of the first.

    Raises:
        ProtocolError: an argument is not a JSON object.
    """
    fields, others = _raw_fields(first), _raw_fields(second)
    if skips_nulls:
        others = {k: v for k, v in others.items() if k not in fields or bytes(v) != b"null"}
    return _joined(fields | others)


def _joined(fields: dict[str, msgspec.Raw]) -> bytes:
    return b"{" + b",".join(dumps(k) + b":" + bytes(v) for k, v in fields.items()) + b"}"


def _raw_fields(raw: bytes) -> dict[str, msgspec.Raw]:
    try:
        return decode_object(raw)
    except DECODE_ERRORS:
        fields = loads_object(raw)
        if fields is None:
            raise ProtocolError("the response is not a JSON object") from None
        return {name: msgspec.Raw(dumps(value)) for name, value in fields.items()}


def normalize_object(body: bytes) -> bytes:
    """Return a JSON object as valid UTF-8 JSON, unchanged if it already is.

    Raises:
        ProtocolError: the body is not a JSON object.
    """
    try:
        decode_object(body)
    except DECODE_ERRORS:
        fields = loads_object(body)
        if fields is None:
            raise ProtocolError("the response is not a JSON object") from None
        return dumps(fields)
    return body


def is_json(body: bytes) -> bool:
    """Return whether `body` is any JSON value that Python accepts."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def loads_object(raw: bytes) -> dict[str, Any] | None:
    """Decode a JSON object like `loads`; return None for anything else."""
    value = loads(raw)
    return value if isinstance(value, dict) else None


def loads(raw: bytes) -> Any:
    """Decode JSON more tolerantly than msgspec; return None if that fails, too.

    Non-UTF-8 bytes become surrogate escapes (PEP 383), as in file names. NaN, infinities and
    integers of 100 or more digits become None.
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
    """Encode a value as ASCII JSON, which keeps lone surrogates as escapes."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
