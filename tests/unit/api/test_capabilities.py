"""The capability cache learns from refusals and forgets after a TTL."""

import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api.capabilities import UNSUPPORTED_THRESHOLD, UNSUPPORTED_TTL_S, CapabilityCache


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def cache(time):
    return CapabilityCache(time.clock)


def request(cache, error=None, capability="x", refusal=errors.UnsupportedEndpoint, **options):
    """Return whether a request was sent, and the class of the error that was raised."""
    is_sent, failure = False, None
    try:
        with cache.guard(capability, refusal, **options):
            is_sent = True
            if error is not None:
                raise error
    except errors.ApiError as raised:
        failure = raised
    assert is_sent or failure.is_local
    return is_sent, failure and type(failure)


MISSING = errors.UnsupportedEndpoint("Not Found")


def test_guard_after_threshold_refusals_fails_locally_until_ttl(cache, time):
    for _ in range(UNSUPPORTED_THRESHOLD):
        assert request(cache, MISSING) == (True, errors.UnsupportedEndpoint)
    for _ in range(5):
        assert request(cache) == (False, errors.UnsupportedEndpoint)
    assert request(cache, capability="another") == (True, None)
    time.advance(UNSUPPORTED_TTL_S - 1)
    assert request(cache) == (False, errors.UnsupportedEndpoint)
    time.advance(2)
    assert request(cache, MISSING) == (True, errors.UnsupportedEndpoint)
    assert request(cache) == (False, errors.UnsupportedEndpoint)
    time.advance(UNSUPPORTED_TTL_S + 1)
    assert request(cache) == (True, None)


def test_guard_with_threshold_one_fails_after_one_refusal(cache):
    assert request(cache, MISSING, threshold=1) == (True, errors.UnsupportedEndpoint)
    assert request(cache, threshold=1) == (False, errors.UnsupportedEndpoint)


def test_guard_after_success_never_becomes_unsupported(cache):
    for _ in range(UNSUPPORTED_THRESHOLD - 1):
        request(cache, MISSING)
    assert request(cache) == (True, None)
    for _ in range(UNSUPPORTED_THRESHOLD * 2):
        assert request(cache, MISSING) == (True, errors.UnsupportedEndpoint)


def test_guard_ignores_other_errors(cache):
    for _ in range(UNSUPPORTED_THRESHOLD * 2):
        assert request(cache, errors.ServerError("down")) == (True, errors.ServerError)
        assert request(cache, errors.BadRequest("odd name")) == (True, errors.BadRequest)
    for _ in range(UNSUPPORTED_THRESHOLD):
        request(cache, errors.BadRequest("no"), "kind", errors.BadRequest)
    assert request(cache, None, "kind", errors.BadRequest) == (False, errors.BadRequest)


def test_reset_forgets_unsupported_capability(cache):
    for _ in range(UNSUPPORTED_THRESHOLD):
        request(cache, MISSING)
    cache.reset()
    assert request(cache) == (True, None)
