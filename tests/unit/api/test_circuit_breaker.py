import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api.circuit_breaker import CircuitBreakers

NEVER = 1e9


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def breakers(time):
    return CircuitBreakers(time.clock)


def attempt(breakers, error=None, label="GET x", during=lambda: None):
    """Make a call that ends so; return when it would have given up, or what was raised."""
    try:
        with breakers.guard(label, NEVER) as deadline:
            during()
            if error is not None:
                raise error
    except errors.ApiError as raised:
        return raised
    return deadline


def break_it(breakers, error=None, count=3):
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
def test_after_repeated_failures_calls_fail_at_once_with_the_last_one(breakers, error, count):
    break_it(breakers, error, count)
    assert not attempt(breakers, error).is_local  # the first probe comes at once
    refused = attempt(breakers)
    assert refused.is_local
    assert (type(refused), refused.message) == (type(error), error.message)


@pytest.mark.parametrize(
    "error", [errors.NotFound("no"), errors.RateLimited("slowly"), errors.Unauthorized("key")]
)
def test_an_answer_is_no_outage(breakers, error):
    break_it(breakers, error, 10)


def test_what_was_not_asked_says_nothing_of_the_endpoint(breakers, time):
    for _ in range(5):
        assert attempt(breakers, errors.RequestTimeout("not its turn").as_local()).is_local
    assert attempt(breakers) == NEVER
    break_it(breakers, count=3)
    attempt(breakers, errors.RequestTimeout("not its turn").as_local())
    time.advance(1.01)
    assert isinstance(attempt(breakers, errors.ServerError("500")), errors.ServerError)
    assert attempt(breakers).is_local


def test_one_success_closes_it(breakers):
    break_it(breakers, count=2)
    assert attempt(breakers) == NEVER
    break_it(breakers, count=3)


def test_an_endpoint_says_nothing_of_another(breakers):
    break_it(breakers, count=4)
    assert attempt(breakers).is_local
    assert attempt(breakers, label="GET y") == NEVER


def test_who_refreshes_asks_again_at_once(breakers):
    break_it(breakers, count=4)
    assert attempt(breakers).is_local
    breakers.reset()
    assert attempt(breakers) == NEVER


def test_one_probe_at_a_time_and_one_a_second(breakers, time):
    break_it(breakers)
    seen = []

    def meanwhile():
        time.advance(10)
        seen.append(attempt(breakers))

    assert not attempt(breakers, errors.ServerError("still"), during=meanwhile).is_local
    assert seen[0].is_local
    assert attempt(breakers).is_local
    time.advance(1.01)
    assert isinstance(attempt(breakers), float)
    assert attempt(breakers) == NEVER


def test_a_probe_is_given_up_soon_but_not_before_a_success_would_come(breakers, time):
    hangs = errors.RequestTimeout("hangs")
    break_it(breakers, hangs, 2)
    started = time.clock.monotonic()
    ended = attempt(breakers, during=lambda: time.advance(1.5))
    assert ended == pytest.approx(started + 2)
    break_it(breakers, hangs, 2)
    started = time.clock.monotonic()
    assert attempt(breakers) == pytest.approx(started + 3)


# --- builds --------------------------------------------------------------------------------------


def build(breakers, time, error=None, takes_s=0.0):
    """Make a call of an endpoint that builds; return when it would give up, or what was raised."""
    try:
        with breakers.guard("GET archive", NEVER, is_build=True) as deadline:
            time.advance(takes_s)
            if error is not None:
                raise error
    except errors.ApiError as raised:
        return raised
    return deadline


def test_build_that_times_out_says_nothing_of_its_endpoint(breakers, time):
    for _ in range(5):
        assert not build(breakers, time, errors.RequestTimeout("held"), takes_s=40).is_local
    assert build(breakers, time) == NEVER


def test_build_without_connection_counts_as_failed(breakers, time):
    for _ in range(3):
        unconnected = errors.RequestTimeout("no connection")
        unconnected.is_unsent = True
        assert not build(breakers, time, unconnected).is_local
    assert build(breakers, time).is_local


def test_build_that_is_a_probe_has_all_its_time(breakers, time):
    for _ in range(3):
        build(breakers, time, errors.ServerError("500"))
    time.advance(1)
    assert build(breakers, time, takes_s=40) == NEVER
    assert build(breakers, time) == NEVER


def test_build_that_is_a_probe_leaves_the_next_one_to_others(breakers, time):
    for _ in range(3):
        build(breakers, time, errors.ServerError("500"))
    time.advance(1)
    with breakers.guard("GET archive", NEVER, is_build=True):
        assert build(breakers, time).is_local
        time.advance(1)
        assert build(breakers, time) == NEVER
