"""The latency gradient in simulated walks with a fake clock."""

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


def complete_request(limiter, status=200, endpoint=LISTING):
    with limiter.acquire(endpoint, NEVER, DEMAND) as permit:
        permit.status = status


class Walk:
    """A simulated walk: as many prefetches as the limiter grants, at a server with workers.

    Args:
        workers: number of requests that the server processes at once; it queues the others.
        service: returns the processing time of the nth request, seconds.
        network: returns the round-trip time at a time since the start, seconds.
        status: returns the status of the nth response; None without a response.
        endpoint: returns the endpoint of the nth request.
        is_adaptive: whether the limiter uses the latency gradient.
    """

    def __init__(
        self,
        workers,
        service,
        network=lambda _now: 0.0,
        status=lambda _n: 200,
        endpoint=lambda _n: INFO,
        limit=8,
        is_adaptive=True,
    ):
        self.time, self.started_at = FakeTime(), FakeTime().monotonic
        self.limiter = ConcurrencyLimiter(limit, self.time.clock)
        if not is_adaptive:
            self.limiter._gradient.record = lambda *_args, **_kwargs: None
        self.service, self.network, self.status, self.endpoint = service, network, status, endpoint
        self.free_at = [0.0] * workers
        self.in_flight = []
        self.requests = 0
        self.limits = []  # after each response

    def run(self, responses):
        """Receive a number of responses; return the elapsed time, seconds."""
        started_at = self.time.monotonic
        for _ in range(responses):
            while self.start(Priority(is_demand=False)):
                pass
            self.receive()
        return self.time.monotonic - started_at

    def measure_demand(self):
        """Send one demand request; return its latency, seconds."""
        while self.start(Priority(is_demand=False)):
            pass
        started_at, number = self.time.monotonic, self.start(DEMAND)
        while self.receive() != number:
            pass
        return self.time.monotonic - started_at

    def start(self, priority):
        number, now = self.requests + 1, self.time.monotonic
        manager = self.limiter.acquire(self.endpoint(number), now, priority)
        try:
            permit = manager.__enter__()
        except errors.RequestTimeout:
            return None
        self.requests = number
        one_way_s = self.network(now - self.started_at) / 2
        worker = min(range(len(self.free_at)), key=self.free_at.__getitem__)
        self.free_at[worker] = max(self.free_at[worker], now + one_way_s) + self.service(number)
        arrival = self.free_at[worker] + one_way_s
        heapq.heappush(self.in_flight, (arrival, number, manager, permit))
        return number

    def receive(self):
        arrival, number, manager, permit = heapq.heappop(self.in_flight)
        self.time.advance(max(arrival - self.time.monotonic, 0.0))
        permit.status = self.status(number)
        manager.__exit__(None, None, None)
        self.limits.append(self.limiter.limit)
        return number


def lognormal(median_s, spread, seed=1):
    generator = random.Random(seed)
    return lambda _n: median_s * math.exp(generator.gauss(0, spread))


def compare(responses, workers, service, **options):
    """Return a walk, and the ratio of its duration to that of a walk with a fixed limit."""
    walk = Walk(workers, service(), **options)
    elapsed_s = walk.run(responses)
    fixed = Walk(workers, service(), **options, is_adaptive=False)
    return walk, elapsed_s / fixed.run(responses)


@pytest.mark.parametrize("network_s", [0.0, 0.01])
def test_queueing_server_halves_limit_and_demand_latency(network_s):
    options = {"service": lambda _n: 0.02, "network": lambda _now: network_s}
    fixed, adaptive = Walk(1, **options, is_adaptive=False), Walk(1, **options)
    elapsed_s = [walk.run(2000) for walk in (fixed, adaptive)]
    assert elapsed_s[1] == pytest.approx(elapsed_s[0], rel=0.001)
    assert fixed.measure_demand() == pytest.approx(8 * 0.02, abs=0.021)
    assert adaptive.measure_demand() <= 5 * 0.02 + 0.001
    assert set(adaptive.limits[200:]) == {5}
    assert min(adaptive.limits) == 5


def test_limit_is_restored_after_queueing_ends():
    walk = Walk(1, lambda _n: 0.02)
    assert walk.run(20_000) > 300
    assert walk.limiter.limit == 5
    walk.free_at = [0.0] * 99  # the server stops queueing
    walk.run(3 * 32 + 40)
    assert walk.limiter.limit == 8
    steps = itertools.pairwise(walk.limits[-200:])
    assert all(after - before in (0, 1) for before, after in steps)


@pytest.mark.parametrize("workers", [4, 99])
@pytest.mark.parametrize("limit", [1, 2, 8])
def test_server_without_queue_keeps_full_limit(workers, limit):
    walk, slowdown = compare(2000, workers, lambda: lambda _n: 0.05, limit=limit)
    assert set(walk.limits) == {limit}
    assert slowdown == 1


def test_distant_server_keeps_full_limit():
    walk = Walk(1, lambda _n: 0.02, network=lambda _now: 0.2)
    walk.run(2000)
    assert set(walk.limits) == {8}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 4, 99])
@pytest.mark.parametrize("spread", [0.3, 0.5, 1.0, 1.5])
def test_varying_latency_does_not_slow_walk(spread, workers, seed):
    _, slowdown = compare(4000, workers, lambda: lognormal(0.05, spread, seed))
    assert slowdown < 1.04


def test_rare_slow_responses_keep_full_limit():
    def service(number):
        return 2.0 if number % 100 == 0 else 0.05

    walk, slowdown = compare(4000, 99, lambda: service)
    assert set(walk.limits) == {8}
    assert slowdown == 1


def test_rare_fast_responses_hardly_slow_walk():
    def service(number):
        return 0.01 if number % 50 == 0 else 0.1

    assert compare(4000, 99, lambda: service)[1] < 1.01


def test_slow_endpoint_among_fast_ones_keeps_full_limit():
    def service(number):
        return 0.5 if number // 40 % 2 else 0.02

    def endpoint(number):
        return LISTING if number // 40 % 2 else INFO

    walk, _ = compare(2000, 99, lambda: service, endpoint=endpoint)
    assert set(walk.limits) == {8}


def test_slow_first_connections_do_not_hide_queue():
    def network(now):  # the 1st request connects, the 2nd does not, concurrent ones do
        return 0.3 if now < 0.01 or 0.33 < now < 0.35 else 0.0

    walk = Walk(1, lambda _n: 0.02, network=network)
    for _ in range(2):
        walk.start(DEMAND)
        walk.receive()
    walk.run(400)
    assert walk.limiter.limit == 5


def test_slower_network_costs_few_experiments():
    def network(now):
        return 0.02 if now < 10 else 0.2

    walk, slowdown = compare(14_000, 99, lambda: lambda _n: 0.0, network=network)
    lowered = [limit for limit in walk.limits if limit < 8]
    assert 0 < len(lowered) <= 3 * 40
    assert set(walk.limits[-500:]) == {8}
    assert slowdown < 1.015


def test_slower_network_after_queue_restores_limit():
    walk = Walk(1, lambda _n: 0.02, network=lambda now: 0.5 if now > 20 else 0.0)
    walk.run(1000)
    assert walk.limits[-1] == 5
    walk.free_at = [0.0] * 99
    walk.run(100)
    assert walk.limits[-1] == 8


@pytest.mark.parametrize("status", [404, 500, 503, None])
def test_failed_requests_are_not_recorded(status):
    walk = Walk(
        99,
        lambda number: 0.001 if number % 2 else 0.1,
        status=lambda number: status if number % 2 else 200,
    )
    walk.run(500)
    assert set(walk.limits) == {8}


def test_archive_requests_are_not_recorded():
    limiter = ConcurrencyLimiter(8, FakeTime().clock)
    complete_request(limiter, endpoint=endpoints.ARCHIVE)
    complete_request(limiter, endpoint=INFO)
    assert set(limiter._gradient._lowest_s) == {INFO.label}


def test_status_429_halves_already_lowered_limit():
    walk = Walk(1, lambda _n: 0.02)
    walk.run(400)
    assert walk.limiter.limit == 5
    for limit in (4, 2):
        complete_request(walk.limiter, 429)
        assert walk.limiter.limit == limit
    walk.run(400)
    assert walk.limiter.limit == 5


def test_record_ignores_requests_of_previous_window():
    gradient = LatencyGradient(8)
    gradient.record("listing", 0.0, 0.02, was_saturated=False)
    for number in range(64):
        gradient.record("listing", number, number + 0.2, was_saturated=True)
    assert gradient.limit == 5
    for _ in range(64):
        gradient.record("listing", 63.0, 63.4, was_saturated=True)
    assert gradient.limit == 5
    for number in range(64, 96):
        gradient.record("listing", number, number + 0.2, was_saturated=True)
    assert gradient.limit == 8
