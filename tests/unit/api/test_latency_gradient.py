"""What times of answers say of a server: walks by a clock that is turned."""

import heapq
import itertools
import math
import random

import pytest

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.concurrency_limit import ConcurrencyLimiter
from tinkerfs.api.latency_gradient import LatencyGradient
from tinkerfs.context import DEMAND, Priority

NEVER = 1e9
LISTING, INFO = endpoints.RUN_CHECKPOINTS, endpoints.WEIGHTS_INFO


def answered(budget, status=200, endpoint=LISTING):
    with budget.acquire(endpoint, NEVER, DEMAND) as turn:
        turn.status = status


class Walk:
    """Guesses, as many at once as they may be, at a server with workers, by a clock that is turned.

    Args:
        workers: how many calls the server serves at once; the others queue.
        service: how long it serves the nth call, seconds.
        network: how long a call and its answer are under way, given the time since the beginning.
        status: of the nth answer; None for none.
        endpoint: of the nth call.
        does_learn: whether what the times of answers say is heeded.
    """

    def __init__(
        self,
        workers,
        service,
        network=lambda _now: 0.0,
        status=lambda _n: 200,
        endpoint=lambda _n: INFO,
        limit=8,
        does_learn=True,
    ):
        self.time, self.began = FakeTime(), FakeTime().monotonic
        self.budget = ConcurrencyLimiter(limit, self.time.clock)
        if not does_learn:
            self.budget._pace.record = lambda *_args, **_kwargs: None
        self.service, self.network, self.status, self.endpoint = service, network, status, endpoint
        self.free = [0.0] * workers
        self.flying = []
        self.calls = 0
        self.allowed = []  # after each answer

    def run(self, answers):
        """Go on for some answers; return how long they took, seconds."""
        began = self.time.monotonic
        for _ in range(answers):
            while self.begin(Priority(is_demand=False)):
                pass
            self.land()
        return self.time.monotonic - began

    def look(self):
        """Make one call that is waited for; return how long it took, seconds."""
        while self.begin(Priority(is_demand=False)):
            pass
        began, number = self.time.monotonic, self.begin(DEMAND)
        while self.land() != number:
            pass
        return self.time.monotonic - began

    def begin(self, interest):
        number, now = self.calls + 1, self.time.monotonic
        turn = self.budget.acquire(self.endpoint(number), now, interest)
        try:
            given = turn.__enter__()
        except errors.RequestTimeout:
            return None
        self.calls = number
        way_s = self.network(now - self.began) / 2
        worker = min(range(len(self.free)), key=self.free.__getitem__)
        self.free[worker] = max(self.free[worker], now + way_s) + self.service(number)
        heapq.heappush(self.flying, (self.free[worker] + way_s, number, turn, given))
        return number

    def land(self):
        at, number, turn, given = heapq.heappop(self.flying)
        self.time.advance(max(at - self.time.monotonic, 0.0))
        given.status = self.status(number)
        turn.__exit__(None, None, None)
        self.allowed.append(self.budget.limit)
        return number


def lognormal(middle_s, spread, seed=1):
    chance = random.Random(seed)
    return lambda _n: middle_s * math.exp(chance.gauss(0, spread))


def both(answers, workers, service, **facts):
    """Return a walk, and how much longer it took than one that heeds no times."""
    walk = Walk(workers, service(), **facts)
    took_s = walk.run(answers)
    return walk, took_s / Walk(workers, service(), **facts, does_learn=False).run(answers)


@pytest.mark.parametrize("network_s", [0.0, 0.01])
def test_at_a_server_that_queues_who_waits_waits_less_and_a_walk_no_longer(network_s):
    facts = {"service": lambda _n: 0.02, "network": lambda _now: network_s}
    before, after = Walk(1, **facts, does_learn=False), Walk(1, **facts)
    took_s = [walk.run(2000) for walk in (before, after)]
    assert took_s[1] == pytest.approx(took_s[0], rel=0.001)
    assert before.look() == pytest.approx(8 * 0.02, abs=0.021)
    assert after.look() <= 5 * 0.02 + 0.001
    assert set(after.allowed[200:]) == {5}
    assert min(after.allowed) == 5


def test_that_holds_as_long_as_the_queue_does_and_no_longer():
    walk = Walk(1, lambda _n: 0.02)
    assert walk.run(20_000) > 300
    assert walk.budget.limit == 5
    walk.free = [0.0] * 99  # the server has got room
    walk.run(3 * 32 + 40)
    assert walk.budget.limit == 8
    steps = itertools.pairwise(walk.allowed[-200:])
    assert all(after - before in (0, 1) for before, after in steps)


@pytest.mark.parametrize("workers", [4, 99])
@pytest.mark.parametrize("limit", [1, 2, 8])
def test_a_server_with_room_is_asked_as_much_as_allowed(workers, limit):
    walk, longer = both(2000, workers, lambda: lambda _n: 0.05, limit=limit)
    assert set(walk.allowed) == {limit}
    assert longer == 1


def test_a_server_that_is_far_away_is_asked_as_much_as_keeps_it_busy():
    walk = Walk(1, lambda _n: 0.02, network=lambda _now: 0.2)
    walk.run(2000)
    assert set(walk.allowed) == {8}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 4, 99])
@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0, 1.5])
def test_answers_that_differ_do_not_slow_a_walk(spread, workers, seed):
    _, longer = both(4000, workers, lambda: lognormal(0.05, spread, seed))
    assert longer < 1.04


def test_a_few_long_listings_among_short_ones_are_no_queue():
    def service(number):
        return 2.0 if number % 100 == 0 else 0.05

    walk, longer = both(4000, 99, lambda: service)
    assert set(walk.allowed) == {8}
    assert longer == 1


def test_a_few_quick_answers_among_slow_ones_are_no_queue():
    def service(number):
        return 0.01 if number % 50 == 0 else 0.1

    assert both(4000, 99, lambda: service)[1] < 1.01


def test_slow_endpoints_among_quick_ones_are_no_queue():
    def service(number):
        return 0.5 if number // 40 % 2 else 0.02

    def endpoint(number):
        return LISTING if number // 40 % 2 else INFO

    walk, _ = both(2000, 99, lambda: service, endpoint=endpoint)
    assert set(walk.allowed) == {8}


def test_first_connections_that_take_long_hide_no_queue():
    def network(now):  # the first call connects, the second does not, those beside it do
        return 0.3 if now < 0.01 or 0.33 < now < 0.35 else 0.0

    walk = Walk(1, lambda _n: 0.02, network=network)
    for _ in range(2):
        walk.begin(DEMAND)
        walk.land()
    walk.run(400)
    assert walk.budget.limit == 5


def test_a_network_that_became_slower_costs_a_few_tries_and_no_more():
    def network(now):
        return 0.02 if now < 10 else 0.2

    walk, longer = both(14_000, 99, lambda: lambda _n: 0.0, network=network)
    fewer = [number for number, allowed in enumerate(walk.allowed) if allowed < 8]
    assert 0 < len(fewer) <= 3 * 40
    assert set(walk.allowed[-500:]) == {8}
    assert longer < 1.015


def test_a_queue_that_a_network_took_the_place_of_is_none_any_more():
    walk = Walk(1, lambda _n: 0.02, network=lambda now: 0.5 if now > 20 else 0.0)
    walk.run(1000)
    assert walk.allowed[-1] == 5
    walk.free = [0.0] * 99
    walk.run(100)
    assert walk.allowed[-1] == 8


@pytest.mark.parametrize("status", [404, 500, 503, None])
def test_failures_tell_nothing_of_the_time_that_answers_take(status):
    walk = Walk(
        99,
        lambda number: 0.001 if number % 2 else 0.1,
        status=lambda number: status if number % 2 else 200,
    )
    walk.run(500)
    assert set(walk.allowed) == {8}


def test_builds_of_archives_tell_nothing_of_the_time_that_answers_take():
    budget = ConcurrencyLimiter(8, FakeTime().clock)
    answered(budget, endpoint=endpoints.ARCHIVE)
    answered(budget, endpoint=INFO)
    assert set(budget._pace._quickest) == {INFO.label}


def test_a_429_halves_what_a_queue_left_and_both_grow_back():
    walk = Walk(1, lambda _n: 0.02)
    walk.run(400)
    assert walk.budget.limit == 5
    for allowed in (4, 2):
        answered(walk.budget, 429)
        assert walk.budget.limit == allowed
    walk.run(400)
    assert walk.budget.limit == 5


def test_calls_from_before_a_change_tell_nothing_of_it():
    pace = LatencyGradient(8)
    pace.record("listing", 0.0, 0.02, is_full=False)
    for number in range(64):
        pace.record("listing", number, number + 0.2, is_full=True)
    assert pace.allowed == 5
    for _ in range(64):
        pace.record("listing", 63.0, 63.4, is_full=True)
    assert pace.allowed == 5
    for number in range(64, 96):
        pace.record("listing", number, number + 0.2, is_full=True)
    assert pace.allowed == 8
