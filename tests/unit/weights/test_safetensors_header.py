"""`tensors.json`: what a header says, in a stable order, and never more than it may."""

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


def made(**files):
    shown = {name.replace("_", "."): (head, 8 + len(head) + 4096) for name, head in files.items()}
    return tensors_json(shown)


def test_tensors_are_told_in_the_order_of_their_names_a_line_each():
    one = made(a=header(b=f32(0, 2, 3), a=f32(24, 4), __metadata__={"format": "pt"}))
    two = made(a=header(__metadata__={"format": "pt"}, a=f32(24, 4), b=f32(0, 2, 3)))
    assert one == two
    told = json.loads(one)
    assert told["tensors"] == {
        "a": {"dtype": "F32", "shape": [4], "bytes": 16},
        "b": {"dtype": "F32", "shape": [2, 3], "bytes": 24},
    }
    assert list(told["tensors"]) == ["a", "b"]
    assert (told["tensors_bytes"], told["metadata"]) == (40, {"a": {"format": "pt"}})
    assert sum('"shape"' in line for line in one.decode().splitlines()) == 2


def test_of_several_files_each_tensor_tells_its_own():
    told = json.loads(made(x_safetensors=header(t=f32(0, 1)), y_safetensors=header(u=f32(0, 1))))
    assert {name: each["file"] for name, each in told["tensors"].items()} == {
        "t": "x.safetensors",
        "u": "y.safetensors",
    }


def test_of_none_there_are_none():
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
def test_a_header_that_lies_is_told(head):
    with pytest.raises(ValueError, match="a:"):
        made(a=head)


def test_where_tensors_end_in_the_file():
    head = header(b=f32(16, 2, 3), a=f32(0, 4), __metadata__={"format": "pt"})
    start = 8 + len(head)
    assert tensor_end_offsets(head, start + 40) == [start + 16, start + 40]
    assert tensor_end_offsets(header(), 10) == []
    with pytest.raises(ValueError, match="outside"):
        tensor_end_offsets(head, start + 39)


def test_a_dtype_that_is_not_known_is_shown():
    head = header(a={"dtype": "F3", "shape": [8], "data_offsets": [0, 3]})
    assert json.loads(made(a=head))["tensors"]["a"]["bytes"] == 3


def test_the_length_of_a_header_is_bounded():
    assert header_length(struct.pack("<Q", 5), 100) == 5
    for length, size in ((93, 100), (1 << 63, 1 << 40), (MAX_HEADER_BYTES + 1, 1 << 40)):
        with pytest.raises(ValueError, match="header"):
            header_length(struct.pack("<Q", length), size)
    with pytest.raises(ValueError, match="not a safetensors file"):
        header_length(b"\0\0", 2)
