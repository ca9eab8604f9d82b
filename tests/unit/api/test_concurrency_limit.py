"""The concurrency limiter: limits, precedence, and reactions to the server's statuses."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.concurrency_limit import ConcurrencyLimiter
from tinkerfs.context import DEMAND, Priority

NEVER = 1e9
LISTING, INFO = endpoints.RUN_CHECKPOINTS, endpoints.WEIGHTS_INFO
ARCHIVE = "GET archive"


@pytest.fixture
def time():
    return FakeTime()


class Requests:
    """Requests under a limiter, each on its own thread until the test ends it."""

    def __init__(self, limiter):
        self.limiter = limiter
        self.started = []
        self._changed = threading.Condition()
        self._threads = []

    def start(self, name, endpoint=LISTING, priority=DEMAND, status=200, deadline=NEVER):
        ended = threading.Event()

        def run():
            with self.limiter.acquire(endpoint, deadline, priority) as permit:
                with self._changed:
                    self.started.append(name)
                    self._changed.notify_all()
                assert ended.wait(10)
                permit.status = status

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append((thread, ended))

        def end():
            ended.set()
            thread.join(10)

        return end

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.started) >= count, 10), self.started

    def wait_until_queued(self, count):
        while len(self.limiter._queue) < count:
            assert not threading.Event().wait(0.001)

    def end(self):
        for _, ended in self._threads:
            ended.set()
        for thread, _ in self._threads:
            thread.join(10)


@contextmanager
def requests_under(limiter):
    requests = Requests(limiter)
    try:
        yield requests
    finally:
        requests.end()


def complete_request(limiter, status=200, retry_after_s=None, endpoint=LISTING):
    with limiter.acquire(endpoint, NEVER, DEMAND) as permit:
        permit.status, permit.retry_after_s = status, retry_after_s


def prefetch():
    return Priority(is_demand=False)


# --- limit ------------------------------------------------------------------------------------


def test_requests_in_flight_never_exceed_concurrency(demo_server, client_of):
    server = demo_server(runs=20)
    client = client_of(server, concurrency=3)
    rule = server.faults.add("GET training_runs/{run}", times=None, hang=True)
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(client.training_run, run_id) for run_id in server.account.run_ids]
        rule.wait_for(2)
        rule.release()
        assert len({future.result().run_id for future in futures}) == 20
    assert server.journal.max_in_flight() <= 3
    assert server.journal.count() == 20


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=24))
def test_acquire_grants_all_permits_within_limit(limit, jobs):
    limiter = ConcurrencyLimiter(limit, FakeTime().clock)
    lock, now, max_in_flight = threading.Lock(), [0], [0]

    def work(is_demand, is_info):
        endpoint = INFO if is_info else LISTING
        with limiter.acquire(endpoint, NEVER, Priority(is_demand)) as permit:
            with lock:
                now[0] += 1
                max_in_flight[0] = max(max_in_flight[0], now[0])
            permit.status = 200
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=work, args=each) for each in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert max_in_flight[0] <= limit


def test_all_training_runs_fetches_pages_at_the_limit(demo_server, client_of):
    server = demo_server(runs=1000, checkpoints=0, latency_s=0.02)
    client = client_of(server, concurrency=4)
    rule = server.faults.add("GET training_runs", after=1, times=None, hold_until=3)
    assert len(client.all_training_runs()) == 1000
    rule.remove()
    assert server.journal.count() == 10
    assert server.journal.max_in_flight() == 4


# --- precedence ----------------------------------------------------------------------------------


def test_acquire_grants_demand_before_prefetch(time):
    with requests_under(ConcurrencyLimiter(1, time.clock)) as requests:
        end = requests.start("first")
        requests.wait_for(1)
        requests.start("prefetch", priority=prefetch())
        requests.wait_until_queued(1)
        end_demand = requests.start("demand")
        requests.wait_until_queued(2)
        end()
        requests.wait_for(2)
        end_demand()
        requests.wait_for(3)
        assert requests.started == ["first", "demand", "prefetch"]


def test_promoted_prefetch_is_granted_as_demand(time):
    with requests_under(ConcurrencyLimiter(1, time.clock)) as requests:
        end = requests.start("first")
        requests.wait_for(1)
        priorities = [prefetch(), prefetch()]
        for name, priority in zip(("prefetch", "promoted"), priorities, strict=True):
            requests.start(name, priority=priority)
            requests.wait_until_queued(1 + (name == "promoted"))
        priorities[1].promote()
        end()
        requests.wait_for(2)
        assert requests.started == ["first", "promoted"]


def test_prefetches_leave_one_permit_for_demand(time):
    with requests_under(ConcurrencyLimiter(4, time.clock)) as requests:
        priorities = [prefetch() for _ in range(6)]
        for number, priority in enumerate(priorities):
            requests.start(f"prefetch {number}", priority=priority)
        requests.wait_for(3)
        requests.wait_until_queued(3)
        requests.start("demand", INFO)
        requests.wait_for(4)
        assert requests.started[3] == "demand"


def test_promoted_prefetch_makes_room_for_another(time):
    with requests_under(ConcurrencyLimiter(2, time.clock)) as requests:
        promoted = prefetch()
        requests.start("promoted", INFO, priority=promoted)
        requests.wait_for(1)
        requests.start("prefetch", priority=prefetch())
        requests.wait_until_queued(1)
        promoted.promote()
        requests.wait_for(2)


def test_unresponsive_endpoint_leaves_one_permit_for_others(time):
    with requests_under(ConcurrencyLimiter(4, time.clock)) as requests:
        for number in range(8):
            requests.start(f"info {number}", INFO)
        requests.wait_for(3)
        requests.wait_until_queued(5)
        requests.start("listing", LISTING)
        requests.wait_for(4)
        assert requests.started[3] == "listing"


def test_responsive_endpoint_may_hold_all_permits(time):
    with requests_under(ConcurrencyLimiter(4, time.clock)) as requests:
        end = requests.start("info", INFO)
        for number in range(6):
            requests.start(f"info {number}", INFO)
        requests.wait_for(3)
        requests.wait_until_queued(4)
        end()
        requests.wait_for(5)  # four are in flight


def test_archive_requests_need_no_permit(server, client_of):
    client = client_of(server, concurrency=2)
    rule = server.faults.add(ARCHIVE, times=None, hang=True)
    refs = [
        CheckpointRef(run_id=run.id, path_id=c.id, listed_id=c.id, exists=True)
        for run in server.account.runs()
        for c in run.checkpoints
        if not c.id.startswith("external")
    ][:20]
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(client.archive, ref) for ref in refs]
        rule.wait_for(20)
        assert len(client.all_training_runs()) == 10
        rule.release()
        assert all(future.result().url for future in futures)


def test_acquire_after_deadline_raises_local_timeout(time):
    with requests_under(ConcurrencyLimiter(1, time.clock)) as requests:
        requests.start("first")
        requests.wait_for(1)
        with (
            pytest.raises(errors.RequestTimeout, match="1 other requests are in flight") as caught,
            requests.limiter.acquire(INFO, time.clock.monotonic(), DEMAND),
        ):
            pass
        assert caught.value.is_local


# --- statuses and Retry-After ------------------------------------------------------------


def test_status_429_halves_limit_and_successes_restore_it(time):
    limiter = ConcurrencyLimiter(8, time.clock)
    limits = []
    for _ in range(4):
        complete_request(limiter, 429)
        limits.append(limiter.limit)
    assert limits == [4, 2, 1, 1]
    for _ in range(200):
        before = limiter.limit
        complete_request(limiter)
        assert limiter.limit - before in (0, 1)
    assert limiter.limit == 8


def test_burst_of_429_halves_limit_once(time):
    with requests_under(ConcurrencyLimiter(8, time.clock)) as requests:
        ends = [requests.start(f"{n}", status=429) for n in range(7)]
        requests.wait_for(7)
        for end in ends:
            end()
        assert requests.limiter.limit == 4


@given(st.integers(1, 16), st.lists(st.sampled_from([200, 404, 429, 500, 503]), max_size=80))
def test_limit_stays_between_one_and_maximum(limit, statuses):
    limiter = ConcurrencyLimiter(limit, FakeTime().clock)
    for status in statuses:
        before = limiter.limit
        complete_request(limiter, status)
        assert 1 <= limiter.limit <= limit
        if status == 429:
            assert limiter.limit == max(before // 2, 1)
        elif status >= 500:
            assert limiter.limit == before


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_delays_all_requests(time, status):
    with requests_under(ConcurrencyLimiter(8, time.clock)) as requests:
        complete_request(requests.limiter, status, retry_after_s=60)
        for name, endpoint in [("info", INFO), ("archive", endpoints.ARCHIVE)]:
            requests.start(name, endpoint)
        requests.wait_until_queued(2)
        time.advance(59.9)
        requests.start("listing", LISTING)
        requests.wait_until_queued(3)
        assert requests.started == []
        time.advance(0.2)
        requests.wait_for(3)


@pytest.mark.parametrize(("status", "kind"), [(429, "RateLimited"), (503, "ServerError")])
def test_acquire_with_deadline_before_retry_after_fails_locally(time, status, kind):
    limiter = ConcurrencyLimiter(8, time.clock)
    complete_request(limiter, status, retry_after_s=60)
    with (
        pytest.raises(getattr(errors, kind), match="another 60 s") as caught,
        limiter.acquire(LISTING, time.clock.monotonic() + 30, DEMAND),
    ):
        pass
    assert caught.value.is_local
    time.advance(31)
    with ExitStack() as stack, pytest.raises(errors.ApiError):
        stack.enter_context(limiter.acquire(LISTING, time.clock.monotonic() + 5, DEMAND))


def test_archive_not_ready_does_not_pause_requests(time):
    limiter = ConcurrencyLimiter(8, time.clock)
    complete_request(limiter, 503, retry_after_s=60, endpoint=endpoints.ARCHIVE)
    complete_request(limiter)


def test_retry_after_of_one_endpoint_pauses_all(server, client_of, time):
    client = client_of(server, clock=time.clock, timeout_s=30.0)
    server.faults.add("GET training_runs", status=429, headers={"Retry-After": "60"})
    with pytest.raises(errors.RateLimited):
        client.all_training_runs()
    run_id = server.account.run_ids[0]
    server.journal.clear()
    for method in (client.training_run, client.list_checkpoints):
        with pytest.raises(errors.RateLimited, match="asked for no requests"):
            method(run_id)
    assert server.journal.count() == 0
    time.advance(61)
    assert client.training_run(run_id).run_id == run_id
    assert client.list_checkpoints(run_id)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_rate_limited_server_receives_all_requests_eventually(
    demo_server,
    client_of,
    concurrency,
):
    server = demo_server(runs=1000, checkpoints=0)
    client = client_of(server, concurrency=concurrency)
    journal = server.journal
    server.faults.add(
        "GET training_runs",
        times=None,
        when=lambda _entry: journal.in_flight() > 2,
        status=429,
        headers={"retry-after-ms": "5"},
    )
    assert len(client.all_training_runs()) == 1000
