import json

import pytest

from tinkerfs.vfs import render


def test_json_file_preserves_numbers_and_order():
    raw = b'{"b":1.10,"a":12345678901234567890123,"z":null}'
    assert render.json_file(raw) == (
        b'{\n  "b": 1.10,\n  "a": 12345678901234567890123,\n  "z": null\n}\n'
    )


@pytest.mark.parametrize("text", ["\ud800", "\udcff\udcfe", "a\udfffb"])
def test_json_file_preserves_unpaired_surrogates(text):
    shown = render.json_file(json.dumps({"name": text}).encode())
    assert json.loads(shown) == {"name": text}
    assert shown.count(b"\n") == 3


def test_json_file_returns_deeply_nested_input_unchanged():
    raw = b"[" * 100_000 + b"]" * 100_000
    assert render.json_file(raw) == raw + b"\n"
