import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.api import raw_json
from tinkerfs.errors import ProtocolError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4)
    ),
    max_leaves=12,
)
objects = st.dictionaries(st.text(st.characters(exclude_categories=())), json_values, max_size=6)


def text_of(value):
    return json.dumps(value).encode()


def test_with_fields_preserves_other_values():
    raw = b'{"a": 1.00, "b" : [1,  2], "u": "\\u00e9", "big": 123456789012345678901234567890}'
    changed = raw_json.with_fields(raw, b=True, new=None)
    assert changed == (
        b'{"a":1.00,"b":true,"u":"\\u00e9","big":123456789012345678901234567890,"new":null}'
    )


def test_merge_objects_second_wins():
    merged = raw_json.merge_objects(b'{"a":1.0,"b":{"x": 1}}', b'{"b":2e0,"c":[ ]}')
    assert merged == b'{"a":1.0,"b":2e0,"c":[ ]}'


def test_merge_objects_skipping_nulls_keeps_values_of_the_first():
    merged = raw_json.merge_objects(
        b'{"a":1,"b":2}', b'{"a":null,"b":3,"c":null}', skips_nulls=True
    )
    assert merged == b'{"a":1,"b":3,"c":null}'


@given(objects, objects)
def test_merge_objects_equals_dict_merge(first, second):
    merged = raw_json.merge_objects(text_of(first), text_of(second))
    assert json.loads(merged) == first | second


@given(objects, json_values)
def test_with_fields_sets_field(fields, value):
    changed = raw_json.with_fields(text_of(fields), public=value)
    assert json.loads(changed) == fields | {"public": value}


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b'{"a":', b"<html>", b'{"a":1}x', b"\xff"])
def test_functions_reject_non_objects(raw):
    for function in (raw_json.normalize_object, raw_json.parse_object, raw_json.with_fields):
        with pytest.raises(ProtocolError):
            function(raw)
    with pytest.raises(ProtocolError):
        raw_json.merge_objects(b"{}", raw)


@given(st.binary() | st.text().map(str.encode))
def test_parse_object_of_any_bytes_raises_only_protocol_error(body):
    try:
        raw, fields = raw_json.parse_object(body)
    except ProtocolError:
        return
    assert json.loads(raw) == fields


def test_parse_object_accepts_what_msgspec_rejects():
    body = b'\xef\xbb\xbf{"a": "\\udcff", "b": NaN, "c": 1e999, "d": "\xff", "e": ' + b"9" * 5000
    raw, fields = raw_json.parse_object(body + b"}")
    assert fields == {"a": "\udcff", "b": None, "c": None, "d": "\udcff", "e": None}
    assert json.loads(raw) == fields


def test_parse_object_rejects_deep_nesting():
    bomb = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    with pytest.raises(ProtocolError):
        raw_json.parse_object(bomb)
