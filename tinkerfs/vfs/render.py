"""Content of generated files: pure functions from records to bytes."""

import json
from datetime import UTC, datetime, timedelta

import msgspec

from tinkerfs.api import models, raw_json

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def line(text: str) -> bytes:
    """Return a text and a newline as bytes; surrogate escapes become raw bytes."""
    try:
        return f"{text}\n".encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return f"{text}\n".encode("utf-8", "surrogatepass")


def json_file(raw: bytes) -> bytes:
    """Return indented JSON and a newline; numbers and unknown fields are unchanged."""
    try:
        return msgspec.json.format(raw, indent=2) + b"\n"
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        # msgspec rejects unpaired surrogates, which represent non-UTF-8 bytes.
        return json.dumps(json.loads(raw), indent=2).encode() + b"\n"
    except (ValueError, RecursionError):
        return raw + b"\n"


def json_values(values: object) -> bytes:
    """Return plain values as indented JSON and a newline."""
    # A path may contain non-UTF-8 bytes, which a JSON escape sequence preserves.
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def run_info(run: models.TrainingRun) -> bytes:
    """Return a training run's info.json."""
    return json_file(run.raw)


def checkpoint_info(record: models.Checkpoint, weights_info: bytes | None) -> bytes:
    """Return a checkpoint's info.json: the weights info, overridden by the record.

    A null of the record, such as an unknown `base_model`, does not hide a value.
    """
    if weights_info is None:
        return json_file(record.raw)
    return json_file(raw_json.merge_objects(weights_info, record.raw, skips_nulls=True))


def session_info(summary: models.SessionSummary, session: models.Session) -> bytes:
    """Return a session's info.json: its summary, overridden by its record."""
    return json_file(raw_json.merge_objects(summary.raw, session.raw))


def rfc3339_ns(time_ns: int) -> str:
    """Return a time (nanoseconds since 1970) as RFC 3339 in UTC."""
    seconds, fraction_ns = divmod(time_ns, 1_000_000_000)
    whole = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{fraction_ns:09d}".rstrip("0") if fraction_ns else ""
    return f"{whole}{fraction}Z"
