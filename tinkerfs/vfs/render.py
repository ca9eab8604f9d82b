"""What the files hold: pure functions, model -> bytes."""

import json
from datetime import UTC, datetime, timedelta

import msgspec

from tinkerfs.api import models, raw_json

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def line(text: str) -> bytes:
    """Return a text and a newline; surrogate escapes as the bytes they stand for."""
    try:
        return f"{text}\n".encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return f"{text}\n".encode("utf-8", "surrogatepass")


def json_file(raw: bytes) -> bytes:
    """Return a JSON record indented, every number and unknown field as it came, and a newline."""
    try:
        return msgspec.json.format(raw, indent=2) + b"\n"
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        # Half of a surrogate pair, which stands for a byte that is no UTF-8: msgspec takes none.
        return json.dumps(json.loads(raw), indent=2).encode() + b"\n"
    except (ValueError, RecursionError):
        return raw + b"\n"


def json_values(values: object) -> bytes:
    """Return plain values as indented JSON and a newline."""
    # A path may hold non-UTF-8 bytes: as an escape of JSON's own they survive.
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def run_info(run: models.TrainingRun) -> bytes:
    """Return a training run's info.json."""
    return json_file(run.raw)


def checkpoint_info(record: models.Checkpoint, weights_info: bytes | None) -> bytes:
    """Return a checkpoint's info.json: the weights info, and over it the listing's record."""
    if weights_info is None:
        return json_file(record.raw)
    return json_file(raw_json.merge_objects(weights_info, record.raw))


def session_info(found: models.SessionSummary, session: models.Session) -> bytes:
    """Return a session's info.json: what the listing told, and over it the session's record."""
    return json_file(raw_json.merge_objects(found.raw, session.raw))


def rfc3339_ns(time_ns: int) -> str:
    """Return a time (nanoseconds since 1970) as RFC 3339 in UTC, with a fraction if it has one."""
    seconds, fraction_ns = divmod(time_ns, 1_000_000_000)
    whole = (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{fraction_ns:09d}".rstrip("0") if fraction_ns else ""
    return f"{whole}{fraction}Z"
