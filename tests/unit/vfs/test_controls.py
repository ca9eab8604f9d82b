import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.vfs.controls import parse_expiry_s, parse_flag

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize("word", ["1", "true", "yes", "on", " ON\n", "\tYes "])
def test_parse_flag_accepts_words_that_publish(word):
    assert parse_flag(word, "/p") is True


@pytest.mark.parametrize("word", ["0", "false", "no", "off", "False\n"])
def test_parse_flag_accepts_words_that_unpublish(word):
    assert parse_flag(word, "/p") is False


@given(st.text())
def test_parse_flag_of_anything_else_is_einval(text):
    if text.strip().lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        with pytest.raises(OSError, match="publish") as caught:
            parse_flag(text, "/p")
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "/p")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("never\n", None),
        ("3600", 3600),
        ("315360000", 315_360_000),
        ("12h", 43_200),
        ("30d\n", 2_592_000),
        ("2w", 1_209_600),
        ("2027-01-15T10:00:00Z", 7200),
        ("2027-01-15T11:00:00+01:00", 7200),
        ("2027-01-15t10:00:00.9z", 7200),
    ],
)
def test_parse_expiry_returns_seconds_from_now(text, seconds):
    assert parse_expiry_s(text, NOW, "/p") == seconds


@pytest.mark.parametrize(
    "text",
    ["3599", "315360001", "-5", "59m", "2020-01-01T00:00:00Z", "9999-01-01T00:00:00Z"],
)
def test_parse_expiry_outside_the_range_is_erange(text):
    with pytest.raises(OSError, match="between 3600 and 315360000") as caught:
        parse_expiry_s(text, NOW, "/p")
    assert caught.value.errno == errno.ERANGE


@pytest.mark.parametrize(
    "text",
    ["", "soon", "12 parsecs", "2027-01-16", "2027-01-16T10:00:00", "1e9", "11y0", "nan", "0x10"],
)
def test_parse_expiry_of_another_format_is_einval(text):
    with pytest.raises(OSError, match="RFC 3339") as caught:
        parse_expiry_s(text, NOW, "/p")
    assert caught.value.errno == errno.EINVAL
