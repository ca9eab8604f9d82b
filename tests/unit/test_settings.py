"""Parsing of durations."""

import pytest

from tinkerfs.config import parse_duration_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("1.5", 1.5),
        (".5", 0.5),
        ("250ms", 0.25),
        ("15m", 900),
        ("24h", 86400),
        ("7 d", 604800),
    ],
)
def test_parse_duration_returns_seconds(text, seconds):
    assert parse_duration_s(text) == seconds
