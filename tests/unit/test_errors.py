import errno
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs import errors

#: The table of the specification, by kind.
WANTED = {
    errors.Unauthorized: errno.EACCES,
    errors.PaymentRequired: errno.EDQUOT,
    errors.NotFound: errno.ENOENT,
    errors.UnsupportedEndpoint: errno.EOPNOTSUPP,
    errors.BadRequest: errno.EINVAL,
    errors.Conflict: errno.EBUSY,
    errors.ResourceNotReady: errno.EBUSY,
    errors.BuildFailed: errno.EIO,
    errors.ClientError: errno.EIO,
    errors.RateLimited: errno.EBUSY,
    errors.ServerError: errno.EIO,
    errors.ConnectionFailed: errno.EHOSTUNREACH,
    errors.RequestTimeout: errno.ETIMEDOUT,
    errors.UntrustedCertificate: errno.EPROTO,
    errors.ProtocolError: errno.EPROTO,
}


def test_every_api_error_has_an_errno():
    assert errors.ERRNO_OF_API_ERROR == WANTED
    kinds = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value)
        and issubclass(value, errors.ApiError)
        and value is not errors.ApiError
    }
    assert kinds == set(WANTED)
    assert errno.EAGAIN not in WANTED.values()


@pytest.mark.parametrize("kind", WANTED)
def test_api_error_becomes_an_os_error_with_its_message(kind):
    cause = kind("the server's words", endpoint="GET training_runs", status=418)
    failure = errors.os_error_from_api(cause, "/runs")
    assert failure.errno == WANTED[kind]
    assert failure.filename == "/runs"
    assert "GET training_runs 418: the server's words" in failure.strerror
    is_missing = kind is errors.UnsupportedEndpoint
    assert ("this server has no such endpoint" in failure.strerror) is is_missing
    assert errors.errno_name(failure) != "ENOTSUP"
    assert failure.__cause__ is cause


def test_rejected_lookup_is_enoent():
    failure = errors.os_error_from_api(errors.BadRequest("bad id"), "/runs/x", is_lookup=True)
    assert failure.errno == errno.ENOENT


def test_as_local_copies_and_marks_the_error():
    cause = errors.NotFound("gone", endpoint="GET x", status=404, retry_after_s=1.5)
    again = cause.as_local()
    assert again.is_local
    assert not cause.is_local
    assert (str(again), again.status, again.retry_after_s) == (str(cause), 404, 1.5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://s.example/a.tar?X-Signature=abc&b=1", "https://s.example/a.tar?[redacted]"),
        ("see (https://s.example/a?sig=1) now", "see (https://s.example/a?[redacted] now"),
        ("https://user:pass@host/x", "https://[redacted]@host/x"),
        ("key tml-abc.DEF-123 is wrong", "key [redacted key] is wrong"),
        ("Bearer eyJhbGci.eyJzdWIi.c2ln!", "Bearer [redacted key]!"),
        ("two\n lines\tand\0more", r"two lines and\x00more"),
    ],
)
def test_redact_removes_secrets_and_newlines(text, wanted):
    assert errors.redact(text) == wanted


@given(st.text())
def test_redact_of_any_text_is_bounded(text):
    once = errors.redact(text)
    assert len(once) <= 500
    assert "\n" not in once
