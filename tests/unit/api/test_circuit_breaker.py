import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api.circuit_breaker import (
    OUTAGE,
    UNSUPPORTED,
    UNSUPPORTED_KIND,
    UNSUPPORTED_LISTING,
    UNSUPPORTED_TTL_S,
    CircuitBreakers,
)

NEVER = 1e9


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def breakers(time):
    return CircuitBreakers(time.clock)


def attempt(breakers, error=None, label="GET x", during=lambda: None):
    """Send a request that raises `error`; return its deadline or the error."""
    try:
        with breakers.guard(OUTAGE, label, NEVER) as deadline:
            during()
            if error is not None:
                raise error
    except errors.ApiError as raised:
        return raised
    return deadline


def fail_repeatedly(breakers, error=None, count=3):
    for _ in range(count):
        assert not attempt(breakers, error or errors.ServerError("500")).is_local


@pytest.mark.parametrize(
    ("error", "count"),
    [
        (errors.ServerError("500"), 3),
        (errors.ProtocolError("HTML"), 3),
        (errors.ConnectionFailed("refused"), 2),
        (errors.RequestTimeout("hangs"), 2),
    ],
)
def test_guard_after_repeated_failures_raises_last_error_locally(breakers, error, count):
    fail_repeatedly(breakers, error, count)
    local_error = attempt(breakers)
    assert local_error.is_local
    assert (type(local_error), local_error.message) == (type(error), error.message)


@pytest.mark.parametrize(
    "error", [errors.NotFound("no"), errors.RateLimited("slowly"), errors.Unauthorized("key")]
)
def test_guard_non_tripping_errors_keep_breaker_closed(breakers, error):
    fail_repeatedly(breakers, error, 10)


def test_guard_ignores_local_errors(breakers, time):
    for _ in range(5):
        assert attempt(breakers, errors.RequestTimeout("no permit").as_local()).is_local
    assert attempt(breakers) == NEVER
    fail_repeatedly(breakers, count=3)
    time.advance(1.01)
    attempt(breakers, errors.RequestTimeout("no permit").as_local())
    assert isinstance(attempt(breakers, errors.ServerError("500")), errors.ServerError)
    assert attempt(breakers).is_local


def test_guard_success_resets_failure_count(breakers):
    fail_repeatedly(breakers, count=2)
    assert attempt(breakers) == NEVER
    fail_repeatedly(breakers, count=3)


def test_guard_keeps_breakers_of_endpoints_separate(breakers):
    fail_repeatedly(breakers)
    assert attempt(breakers).is_local
    assert attempt(breakers, label="GET y") == NEVER


def test_reset_closes_open_breaker(breakers):
    fail_repeatedly(breakers)
    assert attempt(breakers).is_local
    breakers.reset()
    assert attempt(breakers) == NEVER


def test_guard_open_allows_one_probe_per_interval(breakers, time):
    fail_repeatedly(breakers)
    errors_during_probe = []

    def during_probe():
        time.advance(10)
        errors_during_probe.append(attempt(breakers))

    assert attempt(breakers).is_local
    time.advance(1.01)
    assert not attempt(breakers, errors.ServerError("still"), during=during_probe).is_local
    assert errors_during_probe[0].is_local
    assert attempt(breakers).is_local
    time.advance(1.01)
    assert isinstance(attempt(breakers), float)
    assert attempt(breakers) == NEVER


def test_failure_sent_before_opening_allows_no_second_probe(breakers, time):
    early_request = breakers.guard(OUTAGE, "GET x", NEVER)
    early_request.__enter__()
    fail_repeatedly(breakers)
    time.advance(1.01)

    def fail_early_request():
        error = errors.ServerError("late")
        assert not early_request.__exit__(errors.ServerError, error, None)
        time.advance(1.01)
        assert attempt(breakers).is_local

    assert not attempt(breakers, errors.ServerError("probe"), during=fail_early_request).is_local


def test_is_open_until_a_probe_succeeds(breakers, time):
    assert not breakers.is_open(OUTAGE, "GET x")
    fail_repeatedly(breakers)
    assert breakers.is_open(OUTAGE, "GET x")
    time.advance(1.01)
    assert breakers.is_open(OUTAGE, "GET x")
    assert isinstance(attempt(breakers), float)
    assert not breakers.is_open(OUTAGE, "GET x")


def test_probe_timeout_is_twice_the_slowest_success(breakers, time):
    hangs = errors.RequestTimeout("hangs")
    fail_repeatedly(breakers, hangs, 2)
    time.advance(1.01)
    started = time.clock.monotonic()
    ended = attempt(breakers, during=lambda: time.advance(1.5))
    assert ended == pytest.approx(started + 2)
    fail_repeatedly(breakers, hangs, 2)
    time.advance(1.01)
    started = time.clock.monotonic()
    assert attempt(breakers) == pytest.approx(started + 3)


# --- long-running requests -----------------------------------------------------------------------


def attempt_build(breakers, time, error=None, takes_s=0.0):
    """Send a long-running request that raises `error`; return its deadline or the error."""
    try:
        with breakers.guard(OUTAGE, "GET archive", NEVER, is_long_running=True) as deadline:
            time.advance(takes_s)
            if error is not None:
                raise error
    except errors.ApiError as raised:
        return raised
    return deadline


def test_long_running_timeout_keeps_breaker_closed(breakers, time):
    for _ in range(5):
        assert not attempt_build(
            breakers, time, errors.RequestTimeout("delayed"), takes_s=40
        ).is_local
    assert attempt_build(breakers, time) == NEVER


def test_long_running_unsent_timeout_opens_breaker(breakers, time):
    for _ in range(2):
        unsent = errors.RequestTimeout("no connection")
        unsent.request_not_sent = True
        assert not attempt_build(breakers, time, unsent).is_local
    assert attempt_build(breakers, time).is_local


def test_long_running_probe_keeps_whole_deadline(breakers, time):
    for _ in range(3):
        attempt_build(breakers, time, errors.ServerError("500"))
    time.advance(1)
    assert attempt_build(breakers, time, takes_s=40) == NEVER
    assert attempt_build(breakers, time) == NEVER


def test_long_running_probe_does_not_block_next_probe(breakers, time):
    for _ in range(3):
        attempt_build(breakers, time, errors.ServerError("500"))
    time.advance(1)
    with breakers.guard(OUTAGE, "GET archive", NEVER, is_long_running=True):
        assert attempt_build(breakers, time).is_local
        time.advance(1)
        assert attempt_build(breakers, time) == NEVER


# --- unsupported endpoints ----------------------------------------------------------------------


def request(breakers, error=None, capability="x", policy=UNSUPPORTED):
    """Return whether a request was sent, and the class of the error that was raised."""
    is_sent, failure = False, None
    try:
        with breakers.guard(policy, capability):
            is_sent = True
            if error is not None:
                raise error
    except errors.ApiError as raised:
        failure = raised
    assert is_sent or failure.is_local
    return is_sent, failure and type(failure)


MISSING = errors.UnsupportedEndpoint("Not Found")


def test_unsupported_endpoint_fails_locally_until_ttl(breakers, time):
    for _ in range(UNSUPPORTED.threshold):
        assert request(breakers, MISSING) == (True, errors.UnsupportedEndpoint)
    for _ in range(5):
        assert request(breakers) == (False, errors.UnsupportedEndpoint)
    assert request(breakers, capability="another") == (True, None)
    time.advance(UNSUPPORTED_TTL_S - 1)
    assert request(breakers) == (False, errors.UnsupportedEndpoint)
    time.advance(2)
    assert request(breakers, MISSING) == (True, errors.UnsupportedEndpoint)
    assert request(breakers) == (False, errors.UnsupportedEndpoint)
    time.advance(UNSUPPORTED_TTL_S + 1)
    assert request(breakers) == (True, None)


def test_unsupported_listing_fails_after_one_refusal(breakers):
    assert request(breakers, MISSING, policy=UNSUPPORTED_LISTING) == (
        True,
        errors.UnsupportedEndpoint,
    )
    assert request(breakers, policy=UNSUPPORTED_LISTING) == (False, errors.UnsupportedEndpoint)


def test_endpoint_after_success_is_never_unsupported(breakers):
    for _ in range(UNSUPPORTED.threshold - 1):
        request(breakers, MISSING)
    assert request(breakers) == (True, None)
    for _ in range(UNSUPPORTED.threshold * 2):
        assert request(breakers, MISSING) == (True, errors.UnsupportedEndpoint)


def test_other_errors_do_not_mean_unsupported(breakers):
    for _ in range(UNSUPPORTED.threshold * 2):
        assert request(breakers, errors.ServerError("down")) == (True, errors.ServerError)
        assert request(breakers, errors.BadRequest("odd name")) == (True, errors.BadRequest)
    for _ in range(UNSUPPORTED.threshold):
        request(breakers, errors.BadRequest("no"), "kind", UNSUPPORTED_KIND)
    assert request(breakers, None, "kind", UNSUPPORTED_KIND) == (False, errors.BadRequest)


def test_reset_forgets_unsupported_endpoint(breakers):
    for _ in range(UNSUPPORTED.threshold):
        request(breakers, MISSING)
    breakers.reset()
    assert request(breakers) == (True, None)
