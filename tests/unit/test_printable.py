"""External text for users: no secrets, no terminal controls, in linear time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.printable import escape_control_chars, hide_secret, redacted, redacted_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\x1b[31mü", r"a\nb\x1b[31mü"),
        ("bell\x07 \x9b31m c1", r"bell\x07 \x9b31m c1"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("zero\u200bwidth\u2028line", r"zero\u200bwidth\u2028line"),
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
        ("plain ü 漢", "plain ü 漢"),
    ],
)
def test_escape_control_chars_escapes_terminal_controls(text, expected):
    assert escape_control_chars(text) == expected


@given(st.text())
def test_escape_control_chars_result_is_printable(text):
    assert escape_control_chars(text).isprintable()
    assert redacted(text, limit=100).isprintable()
    assert len(redacted(text, limit=100)) <= 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTPS://s.example/a?Sig=c0ffee", "HTTPS://s.example/a?[redacted]"),
        ("s3://b/k?X-Amz-Signature=c0ffee)", "s3://b/k?[redacted]"),
        ("https://h/p#c0ffee", "https://h/p?[redacted]"),
        (r"https:\/\/h\/p?c0ffee", r"https:\/\/h\/p?[redacted]"),
        ("socks5://me:c0ffee@h:1", "socks5://[redacted]@h:1"),
        ("HTTP://me@c0ffee@h/x@y", "HTTP://[redacted]@h/x@y"),
        ("GET /b/k?X-Amz-Signature=c0ffee&b=1 x", "GET /b/k?[redacted] x"),
        ("X-Amz-Date=1&X-Amz-Signature=c0ffee", "[redacted query]"),
        ("Signature=c0ffee", "Signature=[redacted]"),
        ("wrong: X-Amz-Security-Token=c0ffee", "wrong: X-Amz-Security-Token=[redacted]"),
        ("u%3FX-Goog-Signature%3Dc0ffee", "u%3FX-Goog-Signature%3D[redacted]"),
        ("sig=c0ffee", "sig=[redacted]"),
        ("k_tml-c0ffee", "k_[redacted key]"),
        ("TML-c0ffee", "[redacted key]"),
        ("keytml-c0ffee0123456789abcdef", "key[redacted key]"),
        ("k_eyJhbGci.eyJzdWIi.c0ffee", "k_[redacted key]"),
        ("an html-page, really?", "an html-page, really?"),
        ("limit=3 of 5", "limit=3 of 5"),
    ],
)
def test_redacted_removes_secrets_of_every_kind(text, expected):
    assert redacted(text, limit=500) == expected


def test_redacted_text_truncated_in_a_secret_hides_it():
    for start in range(380, 401):
        text = "x " * (start // 2) + "eyJhbGciOiJI.c0ffee" + "f" * 400
        assert "c0ffee" not in redacted(text, limit=50)


@pytest.mark.parametrize(
    "unit",
    [
        *("http://", "a", "a=", "a&", "?a", "?", "eyJ", "eyJaaaa.", "tml-", "tml", "sig", "=&"),
        *("%3D", ":", ":/", "\\/", " ", "\n", "\x1b", "https://h?", "@", "a=b&"),
    ],
)
def test_redacted_of_any_repetition_is_quick(unit):
    # With quadratic time one of them would take minutes.
    assert len(redacted(unit * (2_000_000 // len(unit)), limit=20_000)) <= 20_000


def test_hidden_secret_of_any_form_is_redacted():
    hide_secret("opaque+key/0123", "key")
    hide_secret("opaque+key/0123-and-longer", "key")
    for text in ("opaque+key/0123", "opaque%2Bkey%2F0123", "opaque+key/0123-and-longer"):
        assert redacted(f"the key '{text}' is invalid", limit=100) == (
            "the key '[redacted key]' is invalid"
        )
    hide_secret("short", "key")
    assert redacted("a short word", limit=100) == "a short word"


def test_password_stays_hidden_after_many_tokens():
    hide_secret("a-password", "proxy")
    for number in range(100):
        hide_secret(f"opaque-token-{number:04}", "token")
    text = redacted("a-password opaque-token-0099", limit=100)
    assert text == "[redacted key] [redacted key]"


def test_redacted_lines_keep_lines_and_indentation():
    text = "first\n    at https://s/x?sig=c0ffee\n\n\tlast\n"
    assert redacted_lines(text, limit=50) == "first\n    at https://s/x?[redacted]\n\n\tlast\n"
