"""`tensors.json`: the content of headers in a stable order, within bounds."""

import json
import struct

import pytest

from tinkerfs.weights.safetensors_header import (
    MAX_HEADER_BYTES,
    header_length,
    tensor_end_offsets,
    tensors_json,
)


def header(**tensors):
    return json.dumps(tensors).encode()


def f32(begin, *shape):
    count = 4
    for each in shape:
        count *= each
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + count]}


def render(**files):
    headers = {name.replace("_", "."): (head, 8 + len(head) + 4096) for name, head in files.items()}
    return tensors_json(headers)


def test_tensors_json_has_sorted_tensors_one_per_line():
    one = render(a=header(b=f32(0, 2, 3), a=f32(24, 4), __metadata__={"format": "pt"}))
    two = render(a=header(__metadata__={"format": "pt"}, a=f32(24, 4), b=f32(0, 2, 3)))
    assert one == two
    document = json.loads(one)
    assert document["tensors"] == {
        "a": {"dtype": "F32", "shape": [4], "bytes": 16},
        "b": {"dtype": "F32", "shape": [2, 3], "bytes": 24},
    }
    assert list(document["tensors"]) == ["a", "b"]
    assert (document["tensors_bytes"], document["metadata"]) == (40, {"a": {"format": "pt"}})
    assert sum('"shape"' in line for line in one.decode().splitlines()) == 2


def test_tensors_json_of_several_files_names_the_file():
    document = json.loads(
        render(x_safetensors=header(t=f32(0, 1)), y_safetensors=header(u=f32(0, 1)))
    )
    assert {name: each["file"] for name, each in document["tensors"].items()} == {
        "t": "x.safetensors",
        "u": "y.safetensors",
    }


def test_tensors_json_of_no_file_is_empty():
    assert json.loads(tensors_json({}))["tensors"] == {}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        header(a=7),
        header(a={"dtype": "F32"}),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 5000]}),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}),
        header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}),
        header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}),
    ],
)
def test_tensors_json_of_invalid_header_is_an_error(head):
    with pytest.raises(ValueError, match="a:"):
        render(a=head)


def test_tensor_end_offsets_are_sorted_and_checked():
    head = header(b=f32(16, 2, 3), a=f32(0, 4), __metadata__={"format": "pt"})
    start = 8 + len(head)
    assert tensor_end_offsets(head, start + 40) == [start + 16, start + 40]
    assert tensor_end_offsets(header(), 10) == []
    with pytest.raises(ValueError, match="outside"):
        tensor_end_offsets(head, start + 39)


def test_tensors_json_shows_an_unknown_dtype():
    head = header(a={"dtype": "F3", "shape": [8], "data_offsets": [0, 3]})
    assert json.loads(render(a=head))["tensors"]["a"]["bytes"] == 3


def test_header_length_is_bounded():
    assert header_length(struct.pack("<Q", 5), 100) == 5
    for length, size in ((93, 100), (1 << 63, 1 << 40), (MAX_HEADER_BYTES + 1, 1 << 40)):
        with pytest.raises(ValueError, match="header"):
            header_length(struct.pack("<Q", length), size)
    with pytest.raises(ValueError, match="not a safetensors file"):
        header_length(b"\0\0", 2)
