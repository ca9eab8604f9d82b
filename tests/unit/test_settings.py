"""The table of options, and parsing of their values."""

from dataclasses import fields

import pytest

from tinkerfs.config import OPTIONS, Settings, parse_duration_s

BY_FLAG = {option.flag: option for option in OPTIONS}


def test_options_and_settings_have_the_same_fields():
    assert [option.field for option in OPTIONS] != []
    assert {option.field for option in OPTIONS} == {field.name for field in fields(Settings)}
    assert len(BY_FLAG) == len(OPTIONS)


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


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("ttl", "soon"),
        ("ttl", "-1"),
        ("ttl", "1e999"),
        ("timeout", "0"),
        ("base-url", "ftp://x"),
        ("base-url", "https://"),
        ("base-url", "https://user:secret@host"),
        ("base-url", "https://host:port"),
        ("base-url", "https://host/?x=1"),
        ("archive-burst", "-1"),
        ("archive-burst", "1.5"),
        ("concurrency", "0"),
        ("concurrency", "65"),
        ("concurrency", "many"),
        ("uid", "root"),
        ("uid", "4294967295"),
        ("umask", "888"),
        ("umask", "1777"),
        ("read-only", "perhaps"),
        ("log-level", "loud"),
        ("cache-dir", ""),
        ("trash", "59m"),
        ("trash", "3650.1d"),
        ("trash", "always"),
    ],
)
def test_parse_of_invalid_text_raises_with_a_message(flag, text):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        BY_FLAG[flag].parse(text)


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("base-url", "https://host/path/", "https://host/path"),
        ("umask", "022", 0o22),
        ("umask", "0o077", 0o77),
        ("read-only", "Yes", True),
        ("read-only", "0", False),
        ("uid", "0", 0),
        ("log-level", "DEBUG", "debug"),
        ("archive-burst", "0", 0),
        ("concurrency", "1", 1),
        ("concurrency", "64", 64),
    ],
)
def test_parse_of_valid_text_returns_the_value(flag, text, value):
    assert BY_FLAG[flag].parse(text) == value
