"""Delays between attempts, the budget of an operation, and Retry-After."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tinkerfs.retry import (
    JITTER,
    Backoff,
    FailureKind,
    RetryBudget,
    parse_http_date_s,
    parse_retry_after_s,
)

BACKOFF = Backoff(1.0, 10.0)


@pytest.fixture
def time():
    return FakeTime()


def test_backoff_doubles_up_to_its_maximum():
    assert [BACKOFF.delay_s(failures) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert BACKOFF.delay_s(10**9) == 10


def test_backoff_starts_after_the_immediate_retries():
    backoff = Backoff(1.0, 10.0, immediate_retries=2)
    assert [backoff.delay_s(failures) for failures in range(1, 7)] == [0, 0, 1, 2, 4, 8]


def test_budget_delays_are_jittered_backoffs(time):
    budget = RetryBudget(BACKOFF, 1000, clock=time.clock)
    for expected_s in (1, 2, 4, 8, 10, 10):
        assert JITTER[0] * expected_s <= budget.next_delay_s() <= JITTER[1] * expected_s
    delays_s = {budget.next_delay_s() for _ in range(20)}
    assert len(delays_s) > 10


def test_budget_returns_a_requested_delay(time):
    budget = RetryBudget(BACKOFF, 30, clock=time.clock)
    assert budget.next_delay_s(requested_s=7.5) == 7.5
    assert budget.next_delay_s(requested_s=0.0) == 0.0
    assert budget.next_delay_s(requested_s=31.0) is None


def test_budget_limits_attempts(time):
    budget = RetryBudget(BACKOFF, 1000, max_attempts=3, clock=time.clock)
    assert budget.next_delay_s() is not None
    assert budget.next_delay_s() is not None
    assert budget.next_delay_s() is None


def test_budget_limits_failures_of_a_kind(time):
    limits = {FailureKind.UNUSABLE_RESPONSE: 2}
    budget = RetryBudget(BACKOFF, 1000, max_failures=limits, clock=time.clock)
    assert budget.next_delay_s(FailureKind.UNUSABLE_RESPONSE) is not None
    for _ in range(5):
        assert budget.next_delay_s() is not None
    assert budget.next_delay_s(FailureKind.UNUSABLE_RESPONSE) is None


@pytest.mark.parametrize("has_last_attempt", [False, True])
def test_budget_ends_at_the_deadline(time, has_last_attempt):
    budget = RetryBudget(Backoff(8.0, 8.0), 10, has_last_attempt=has_last_attempt, clock=time.clock)
    assert budget.next_delay_s() >= 6
    time.advance(5)
    assert budget.next_delay_s() == (5 if has_last_attempt else None)
    assert budget.next_delay_s(requested_s=6.0) is None
    time.advance(5)
    assert budget.next_delay_s(requested_s=0.0) is None


def test_budget_is_extended_by_a_stall(time):
    budget = RetryBudget(BACKOFF, 10, clock=time.clock)
    time.advance(11)
    assert budget.next_delay_s(FailureKind.STALLED, requested_s=9.0) == 9.0
    assert budget.next_delay_s(requested_s=10.0) is None
    time.advance(9)
    assert budget.next_delay_s(requested_s=0.0) is None


def test_budget_restarts_after_progress(time):
    budget = RetryBudget(BACKOFF, 10, max_attempts=2, clock=time.clock)
    assert budget.next_delay_s(FailureKind.STALLED) <= 1
    time.advance(19)
    budget.restart()
    time.advance(9)
    assert budget.next_delay_s() <= 1
    budget.restart()
    time.advance(10)
    assert budget.next_delay_s() is None


@given(st.text())
def test_parse_any_header_does_not_raise(text):
    parse_http_date_s(text)
    parse_retry_after_s({"retry-after": text, "retry-after-ms": text}, 0.0)


def test_parse_http_date_s_rejects_long_strings():
    """The string is long enough for quadratic time to exceed the test's timeout."""
    assert parse_http_date_s(f"2024-01-01{' ' * 300_000}") is None


def test_parse_http_date_s_returns_seconds_or_none():
    assert parse_http_date_s("Mon, 23 Nov 2026 10:20:30 GMT") == 1795429230
    assert parse_http_date_s("0") is None
    assert parse_http_date_s("Mon, 99 Nov 2026 10:20:30 GMT") is None


@pytest.mark.parametrize(
    ("headers", "delay_s"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "Mon, 23 Nov 2026 10:20:40 GMT"}, 10.0),
        ({"retry-after": "Mon, 23 Nov 2026 10:20:20 GMT"}, 0.0),
        ({"retry-after": "3", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "3", "retry-after-ms": "soon"}, 3.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
    ],
)
def test_parse_retry_after_s_returns_delay(headers, delay_s):
    assert parse_retry_after_s(headers, 1795429230.0) == delay_s
