import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.demo.ranges import UnsatisfiableRange, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-", (0, 1000)),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-499", (0, 500)),
        ("bytes=500-999", (500, 1000)),
        ("bytes=999-", (999, 1000)),
        ("bytes=500-5000", (500, 1000)),
        ("bytes=-500", (500, 1000)),
        ("bytes=-1", (999, 1000)),
        ("bytes=-5000", (0, 1000)),
        ("BYTES=1-2", (1, 3)),
        ("bytes= 1-2 ", (1, 3)),
        ("bytes=0-0,-1", None),
        ("bytes=1-2, 5-6", None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=", None),
        ("bytes", None),
        ("bytes=a-b", None),
        ("bytes=+1-2", None),
        ("bytes=\u0661-\u0662", None),
        ("items=0-1", None),
    ],
)
def test_parse_range_of_examples_and_malformed_headers(header, expected):
    assert parse_range(header, 1000) == expected


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-1001", "bytes=-0"])
def test_parse_range_past_the_end_raises(header):
    with pytest.raises(UnsatisfiableRange):
        parse_range(header, 1000)


def test_parse_range_of_empty_content():
    assert parse_range("bytes=-5", 0) is None
    for header in ("bytes=0-", "bytes=0-0", "bytes=-0"):
        with pytest.raises(UnsatisfiableRange):
            parse_range(header, 0)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_parse_range_agrees_with_slicing(size, first, last):
    data = bytes(range(size))
    try:
        found = parse_range(f"bytes={first}-{last}", size)
    except UnsatisfiableRange:
        assert data[first:] == b""
    else:
        if found is None:
            assert last < first
        else:
            assert data[slice(*found)] == data[first : last + 1] != b""
