"""What a server lacks: learnt of refusals, asked for again rarely."""

import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api.capabilities import UNSUPPORTED_THRESHOLD, UNSUPPORTED_TTL_S, CapabilityCache


@pytest.fixture
def hands():
    return FakeTime()


@pytest.fixture
def lacks(hands):
    return CapabilityCache(hands.clock)


def ask(lacks, error=None, what="it", refusal=errors.UnsupportedEndpoint, **options):
    """Ask once; return whether the server was asked, and what failure the caller got."""
    asked, failure = False, None
    try:
        with lacks.guard(what, refusal, **options):
            asked = True
            if error is not None:
                raise error
    except errors.ApiError as raised:
        failure = raised
    assert asked or failure.is_local
    return asked, failure and type(failure)


MISSING = errors.UnsupportedEndpoint("Not Found")


def test_after_so_many_refusals_in_a_row_nobody_is_asked_for_a_while(lacks, hands):
    for _ in range(UNSUPPORTED_THRESHOLD):
        assert ask(lacks, MISSING) == (True, errors.UnsupportedEndpoint)
    for _ in range(5):
        assert ask(lacks) == (False, errors.UnsupportedEndpoint)
    assert ask(lacks, what="another") == (True, None)
    hands.advance(UNSUPPORTED_TTL_S - 1)
    assert ask(lacks) == (False, errors.UnsupportedEndpoint)
    hands.advance(2)
    assert ask(lacks, MISSING) == (True, errors.UnsupportedEndpoint)
    assert ask(lacks) == (False, errors.UnsupportedEndpoint)
    hands.advance(UNSUPPORTED_TTL_S + 1)
    assert ask(lacks) == (True, None)


def test_one_refusal_is_enough_where_it_can_be_about_nothing_else(lacks):
    assert ask(lacks, MISSING, refusals=1) == (True, errors.UnsupportedEndpoint)
    assert ask(lacks, refusals=1) == (False, errors.UnsupportedEndpoint)


def test_what_has_worked_is_there_whatever_is_said_later(lacks):
    for _ in range(UNSUPPORTED_THRESHOLD - 1):
        ask(lacks, MISSING)
    assert ask(lacks) == (True, None)
    for _ in range(UNSUPPORTED_THRESHOLD * 2):
        assert ask(lacks, MISSING) == (True, errors.UnsupportedEndpoint)


def test_other_failures_say_nothing_of_it(lacks):
    for _ in range(UNSUPPORTED_THRESHOLD * 2):
        assert ask(lacks, errors.ServerError("down")) == (True, errors.ServerError)
        assert ask(lacks, errors.BadRequest("odd name")) == (True, errors.BadRequest)
    for _ in range(UNSUPPORTED_THRESHOLD):
        ask(lacks, errors.BadRequest("no"), "kind", errors.BadRequest)
    assert ask(lacks, None, "kind", errors.BadRequest) == (False, errors.BadRequest)


def test_it_can_be_forgotten(lacks):
    for _ in range(UNSUPPORTED_THRESHOLD):
        ask(lacks, MISSING)
    lacks.reset()
    assert ask(lacks) == (True, None)
