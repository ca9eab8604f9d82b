"""Parses API responses; tolerates new, missing, null and invalid fields. Pure.

An invalid field is omitted, and an invalid record is skipped. Only a response that is not JSON, or
that lacks its list, raises a ProtocolError.

msgspec decodes valid records. A record that msgspec rejects is decoded by `json.loads`, with a type
check per field. Both fill the same structure, from which the record is built.
"""

from collections.abc import Callable
from sys import intern
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from tinkerfs.api.models import (
    Checkpoint,
    Page,
    Sampler,
    Session,
    SessionSearchPage,
    SessionSummary,
    TrainingRun,
    WeightsInfo,
)
from tinkerfs.api.raw_json import (
    DECODE_ERRORS,
    decode_list,
    decode_object,
    dumps,
    is_json,
    loads,
    loads_object,
    normalize_object,
    parse_object,
)
from tinkerfs.api.timestamps import parse_time_ns
from tinkerfs.errors import ProtocolError

T = TypeVar("T")

# Records as msgspec validates them; one that it rejects may have a value of any type elsewhere.


class _WireCheckpoint(msgspec.Struct, gc=False):
    checkpoint_id: str
    checkpoint_type: str | None = None
    time: str | int | float | None = None
    tinker_path: str | None = None
    size_bytes: int | None = None
    public: bool | None = False
    expires_at: str | int | float | None = None


class _WireRun(msgspec.Struct, gc=False):
    training_run_id: str
    base_model: str | None = None
    is_lora: bool | None = None
    lora_rank: int | None = None
    last_request_time: str | int | float | None = None
    last_checkpoint: msgspec.Raw = msgspec.Raw(b"null")
    last_sampler_checkpoint: msgspec.Raw = msgspec.Raw(b"null")


_decode_checkpoint = msgspec.json.Decoder(_WireCheckpoint).decode
_decode_run = msgspec.json.Decoder(_WireRun).decode

_INT64_MAX = 2**63 - 1

#: JSON of a run's last checkpoints; the run's JSON includes their records.
_NO_JSON = b"{}"


def parse_checkpoint(raw: bytes) -> Checkpoint | None:
    """Parse the JSON of a checkpoint; return None for a record without an id."""
    try:
        wire = _decode_checkpoint(raw)
    except DECODE_ERRORS:
        fields = loads_object(raw) or {}
        wire = _WireCheckpoint(
            checkpoint_id=_text(fields, "checkpoint_id") or "",
            checkpoint_type=_text(fields, "checkpoint_type"),
            time=fields.get("time"),
            tinker_path=_text(fields, "tinker_path"),
            size_bytes=fields.get("size_bytes"),
            public=fields.get("public"),
            expires_at=fields.get("expires_at"),
        )
    if not wire.checkpoint_id:
        return None
    return Checkpoint.from_fields(
        wire.checkpoint_id,
        checkpoint_type=wire.checkpoint_type,
        time_ns=parse_time_ns(wire.time),
        tinker_path=wire.tinker_path,
        size_bytes=_size(wire.size_bytes),
        is_public=wire.public is True,
        expires_at_ns=parse_time_ns(wire.expires_at),
        raw=raw,
    )


def _parse_run(raw: bytes) -> TrainingRun | None:
    try:
        wire = _decode_run(raw)
    except DECODE_ERRORS:
        fields = loads_object(raw) or {}
        wire = _WireRun(
            training_run_id=_text(fields, "training_run_id") or "",
            base_model=_text(fields, "base_model"),
            is_lora=_boolean(fields, "is_lora"),
            lora_rank=fields.get("lora_rank"),
            last_request_time=fields.get("last_request_time"),
            last_checkpoint=_to_json(fields.get("last_checkpoint")),
            last_sampler_checkpoint=_to_json(fields.get("last_sampler_checkpoint")),
        )
    if not wire.training_run_id:
        return None
    return TrainingRun(
        run_id=wire.training_run_id,
        base_model=_interned(wire.base_model),
        lora_rank=_size(wire.lora_rank),
        is_lora=wire.is_lora,
        last_request_time_ns=parse_time_ns(wire.last_request_time),
        last_checkpoint=_parse_nested(wire.last_checkpoint),
        last_sampler_checkpoint=_parse_nested(wire.last_sampler_checkpoint),
        raw=raw,
    )


def _to_json(value: object) -> msgspec.Raw:
    return msgspec.Raw(dumps(value))


def _parse_nested(value: msgspec.Raw) -> Checkpoint | None:
    raw = bytes(value)
    record = None if raw == b"null" else parse_checkpoint(raw)
    return None if record is None else replace(record, json_template=_NO_JSON)


def _interned(text: str | None) -> str | None:
    """Return a shared object for equal strings, because many records are alike."""
    return None if text is None else intern(text)


def parse_training_run(body: bytes) -> TrainingRun:
    """Parse the response of the training run endpoint.

    Raises:
        ProtocolError: the response is not a training run.
    """
    raw = normalize_object(body)
    run = _parse_run(raw)
    if run is None:
        raise ProtocolError("the response is not a training run: training_run_id is missing")
    return run


def parse_training_runs(body: bytes) -> Page[TrainingRun]:
    """Parse a page of training runs.

    Raises:
        ProtocolError: the response is not JSON or has no list of runs.
    """
    return _page(body, "training_runs", _parse_run)


def parse_checkpoints(body: bytes) -> Page[Checkpoint]:
    """Parse a page of checkpoints.

    Raises:
        ProtocolError: the response is not JSON or has no list of checkpoints.
    """
    return _page(body, "checkpoints", parse_checkpoint)


def parse_session_ids(body: bytes) -> Page[str]:
    """Parse a page of session ids.

    Raises:
        ProtocolError: the response is not JSON or has no list of sessions.
    """
    return _page(body, "sessions", _session_id)


def _session_id(raw: bytes) -> str | None:
    value = loads(raw)
    if isinstance(value, dict):  # a record, as in the session search of SDK 0.36
        value = value.get("session_id")
    return value if isinstance(value, str) and value else None


def parse_found_sessions(body: bytes) -> SessionSearchPage:
    """Parse a page of a session search.

    Raises:
        ProtocolError: the response is not JSON or has no list of sessions.
    """
    page = _page(body, "sessions", _session_summary)
    return SessionSearchPage(page.items, (loads_object(body) or {}).get("next_cursor"))


def _session_summary(raw: bytes) -> SessionSummary | None:
    fields = loads_object(raw)
    if fields is None or not (session_id := _text(fields, "session_id")):
        return None
    return SessionSummary(
        session_id=session_id,
        display_name=_text(fields, "display_name"),
        project_id=_text(fields, "project_id"),
        created_at_ns=parse_time_ns(fields.get("created_at")),
        raw=raw,
    )


def parse_weights_info(body: bytes) -> WeightsInfo:
    """Parse the response of the weights info endpoint.

    Raises:
        ProtocolError: the response is not a JSON object.
    """
    raw, fields = parse_object(body)
    return WeightsInfo(
        base_model=_text(fields, "base_model"),
        lora_rank=_size(fields.get("lora_rank")),
        is_lora=_boolean(fields, "is_lora"),
        raw=raw,
    )


def parse_session(session_id: str, body: bytes) -> Session:
    """Parse the record of a session, which does not include the session's id.

    Raises:
        ProtocolError: the response is not a JSON object.
    """
    raw, fields = parse_object(body)
    return Session(
        session_id=session_id,
        training_run_ids=_texts(fields.get("training_run_ids")),
        sampler_ids=_texts(fields.get("sampler_ids")),
        raw=raw,
    )


def parse_sampler(sampler_id: str, body: bytes) -> Sampler:
    """Parse the record of a sampler.

    Raises:
        ProtocolError: the response is not a JSON object.
    """
    raw, fields = parse_object(body)
    return Sampler(
        sampler_id=sampler_id,
        base_model=_text(fields, "base_model"),
        model_path=_text(fields, "model_path"),
        raw=raw,
    )


def check_change_response(body: bytes) -> None:
    """Check that a successful response to a change was sent by the API.

    A captive portal sends status 200 and an HTML page although nothing was changed.

    Raises:
        ProtocolError: the body is neither empty nor JSON.
    """
    if body.strip() and not is_json(body):
        raise ProtocolError("the response to a change is neither empty nor JSON")


def _page(body: bytes, name: str, parse: Callable[[bytes], T | None]) -> Page[T]:
    """Parse a listing: the records under `name` and the counts in its cursor."""
    try:
        top = decode_object(body)
        listed = top.get(name)
        records = [] if listed is None else decode_list(listed)
        cursor = loads_object(bytes(top.get("cursor", b"null")))
        is_listed = listed is not None
    except DECODE_ERRORS:
        fields = loads_object(body)
        if fields is None:
            raise ProtocolError("the response is not a JSON object") from None
        found = fields.get(name, ...)
        # A null list is empty: servers written in Go encode it so.
        is_listed = found is None or isinstance(found, list)
        records = [dumps(item) for item in found] if isinstance(found, list) else []
        cursor = fields.get("cursor")
    if not is_listed:
        raise ProtocolError(f"the response has no list of {name}")
    items = tuple(item for raw in records if (item := parse(raw)) is not None)
    counts = cursor if isinstance(cursor, dict) else {}
    return Page(items, _size(counts.get("total_count")), _size(counts.get("limit")), len(records))


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str) and v) if isinstance(value, list) else ()


def _boolean(fields: dict[str, Any], name: str) -> bool | None:
    value = fields.get(name)
    return value if isinstance(value, bool) else None


def _size(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            return None
        value = int(value)
    return value if 0 <= value <= _INT64_MAX else None
