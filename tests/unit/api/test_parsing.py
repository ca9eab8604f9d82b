import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.api.test_raw_json import json_values
from tinkerfs.api import parsing
from tinkerfs.api.models import Checkpoint, Page, SignedUrl
from tinkerfs.errors import ProtocolError

CHECKPOINT = {
    "checkpoint_id": "weights/0001",
    "checkpoint_type": "training",
    "time": "2026-11-23T10:20:30Z",
    "tinker_path": "tinker://r/weights/0001",
    "size_bytes": 17,
    "public": True,
    "expires_at": 1795429231.5,
    "later": {"a": [1]},
}
RUN = {
    "training_run_id": "r:train:0",
    "base_model": "Qwen/Qwen3-8B",
    "is_lora": True,
    "lora_rank": 32,
    "last_request_time": "2026-11-23T10:20:30",
    "last_checkpoint": CHECKPOINT,
    "last_sampler_checkpoint": None,
    "later": 1,
}
FIELDS = sorted({*CHECKPOINT, *RUN})


def text_of(value):
    return json.dumps(value).encode()


def listing(*records, **fields):
    return text_of({"checkpoints": records, "training_runs": records, **fields})


def test_parse_checkpoints_returns_all_fields():
    page = parsing.parse_checkpoints(
        listing(CHECKPOINT, cursor={"offset": 0, "limit": 50, "total_count": 120})
    )
    raw = text_of(CHECKPOINT)
    assert page == Page(
        items=(
            Checkpoint.from_fields(
                "weights/0001",
                checkpoint_type="training",
                time_ns=1795429230 * 10**9,
                tinker_path="tinker://r/weights/0001",
                size_bytes=17,
                is_public=True,
                expires_at_ns=1795429231_500_000_000,
                raw=raw,
            ),
        ),
        total_count=120,
        limit=50,
        received=1,
    )


def test_parse_training_runs_returns_all_fields():
    (run,) = parsing.parse_training_runs(listing(RUN)).items
    assert (run.run_id, run.base_model, run.lora_rank) == ("r:train:0", "Qwen/Qwen3-8B", 32)
    assert run.is_lora is True
    assert run.last_request_time_ns == 1795429230 * 10**9
    assert run.last_checkpoint.checkpoint_id == "weights/0001"
    assert run.last_sampler_checkpoint is None
    assert run.raw == text_of(RUN)
    assert parsing.parse_training_run(text_of(RUN)) == run


@pytest.mark.parametrize("name", sorted(set(CHECKPOINT) - {"checkpoint_id"}))
@pytest.mark.parametrize("value", [None, ..., [], {}, "\ud800", -1, 10**30, 1.5, False, "9" * 40])
def test_parse_checkpoints_omits_only_invalid_field(name, value):
    record = {k: v for k, v in CHECKPOINT.items() if k != name}
    if value is not ...:
        record[name] = value
    page = parsing.parse_checkpoints(listing(record, CHECKPOINT))
    assert [item.checkpoint_id for item in page.items] == ["weights/0001"] * 2
    valid = page.items[1]
    attributes = {"time": "time_ns", "public": "is_public", "expires_at": "expires_at_ns"}
    fields = {"checkpoint_id", *Checkpoint.__struct_fields__}
    for field in fields - {attributes.get(name, name), "json_template"}:
        assert getattr(page.items[0], field) == getattr(valid, field)
    assert json.loads(page.items[0].raw) == record


def test_parse_checkpoints_shares_json_template():
    records = [
        CHECKPOINT
        | {
            "checkpoint_id": f"weights/{number:04}",
            "tinker_path": f"tinker://r{number % 2}/weights/{number:04}",
            "time": time,
            "size_bytes": 10**6 + number,
            "expires_at": time,
        }
        for number, time in enumerate(["2026-11-23T14:20:30Z", "2026-11-23T14:20:30.000125Z"] * 5)
    ]
    items = parsing.parse_checkpoints(listing(*records)).items
    assert [item.raw for item in items] == [text_of(record) for record in records]
    assert len({id(item.json_template) for item in items}) == 1


@pytest.mark.parametrize("record", [1, None, "x", [], {}, {"checkpoint_id": ""}, {"time": 1}])
def test_parse_checkpoints_skips_invalid_record(record):
    page = parsing.parse_checkpoints(listing(CHECKPOINT, record, CHECKPOINT))
    assert (len(page.items), page.received) == (2, 3)


def test_parse_checkpoints_accepts_non_utf8_names():
    body = listing(CHECKPOINT, CHECKPOINT | {"checkpoint_id": "weights/\udcff"})
    raw_byte = body.replace(b"\\udcff", b"\xff")
    for each in (body, raw_byte):
        ids = [item.checkpoint_id for item in parsing.parse_checkpoints(each).items]
        assert ids == ["weights/0001", "weights/\udcff"]
        for item in parsing.parse_checkpoints(each).items:
            assert json.loads(item.raw)["later"] == {"a": [1]}
            assert parsing.parse_checkpoint(item.raw) == item


def test_parse_checkpoints_uses_last_duplicate_key():
    body = b'{"checkpoints":[{"checkpoint_id":"a","checkpoint_id":"b"}]}'
    assert parsing.parse_checkpoints(body).items[0].checkpoint_id == "b"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>no</body></html>",
        b'{"checkpoints": [{"checkpoint_id": "a"}',
        b"[]",
        b"null",
        b"{}",
        b'{"checkpoints": {}}',
        b'{"checkpoints": "none"}',
        b'{"checkpoints":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_parse_checkpoints_of_invalid_body_raises(body):
    with pytest.raises(ProtocolError):
        parsing.parse_checkpoints(body)


def test_parse_checkpoints_accepts_null_list_and_bad_cursor():
    assert parsing.parse_checkpoints(b'{"checkpoints": null, "cursor": null}') == Page(())
    for cursor in ("x", [], {"limit": "a", "total_count": -1}, {"limit": None}):
        assert parsing.parse_checkpoints(listing(CHECKPOINT, cursor=cursor)).total_count is None


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.booleans())
def test_parse_any_record_preserves_raw(fields, is_run):
    parse = parsing.parse_training_runs if is_run else parsing.parse_checkpoints
    good = RUN | CHECKPOINT
    page = parse(listing(good, good | fields, fields))
    assert page.received == 3
    assert page.items[0].raw == text_of(good) or "\\ud" in json.dumps(fields)
    for item in page.items:
        assert json.loads(item.raw) in (good, good | fields, fields)


@given(json_values)
def test_parse_any_response_raises_only_protocol_error(value):
    body = text_of(value)
    for parse in (
        parsing.parse_training_run,
        parsing.parse_training_runs,
        parsing.parse_checkpoints,
        parsing.parse_session_ids,
        parsing.parse_found_sessions,
        parsing.parse_weights_info,
        lambda body: parsing.parse_session("s", body),
        lambda body: parsing.parse_sampler("s", body),
    ):
        try:
            parse(body)
        except ProtocolError:
            continue


def test_parse_small_records_returns_fields():
    info = parsing.parse_weights_info(b'{"base_model":"m","is_lora":true,"lora_rank":"x"}')
    assert (info.base_model, info.is_lora, info.lora_rank) == ("m", True, None)
    session = parsing.parse_session("s", b'{"training_run_ids":["a",1,""],"sampler_ids":null}')
    assert (session.training_run_ids, session.sampler_ids) == (("a",), ())
    sampler = parsing.parse_sampler("p", b'{"base_model":"m"}')
    assert (sampler.sampler_id, sampler.model_path) == ("p", None)
    assert parsing.parse_session_ids(b'{"sessions":["a",{"session_id":"b"},null]}').items == (
        "a",
        "b",
    )
    body = b'{"sessions":[{"session_id":"a","created_at":1},{}],"next_cursor":"c"}'
    found = parsing.parse_found_sessions(body)
    assert [s.session_id for s in found.items] == ["a"]
    assert found.next_cursor == "c"
    with pytest.raises(ProtocolError, match="training_run_id"):
        parsing.parse_training_run(b"{}")


def test_signed_url_repr_hides_url():
    assert "sig" not in repr(SignedUrl("https://store/x?sig=1", 3.0))
