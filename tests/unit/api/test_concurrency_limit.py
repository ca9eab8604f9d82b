"""How many calls there are at once, whose turn it is, and what the server says of the pace."""

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


class Calls:
    """Calls under a budget, each on a thread of its own, held until the test ends it."""

    def __init__(self, budget):
        self.budget = budget
        self.begun = []
        self._changed = threading.Condition()
        self._threads = []

    def begin(self, name, endpoint=LISTING, interest=DEMAND, status=200, deadline=NEVER):
        ended = threading.Event()

        def run():
            with self.budget.acquire(endpoint, deadline, interest) as turn:
                with self._changed:
                    self.begun.append(name)
                    self._changed.notify_all()
                assert ended.wait(10)
                turn.status = status

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append((thread, ended))

        def end():
            ended.set()
            thread.join(10)

        return end

    def wait_for(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, 10), self.begun

    def wait_until_queued(self, count):
        while len(self.budget._waiting) < count:
            assert not threading.Event().wait(0.001)

    def end(self):
        for _, ended in self._threads:
            ended.set()
        for thread, _ in self._threads:
            thread.join(10)


@contextmanager
def calls_under(budget):
    calls = Calls(budget)
    try:
        yield calls
    finally:
        calls.end()


def answered(budget, status=200, retry_after_s=None, endpoint=LISTING):
    with budget.acquire(endpoint, NEVER, DEMAND) as turn:
        turn.status, turn.retry_after_s = status, retry_after_s


def guess():
    return Priority(is_demand=False)


# --- how many ------------------------------------------------------------------------------------


def test_there_are_never_more_calls_at_once_than_allowed(demo_server, client_of):
    server = demo_server(runs=20)
    client = client_of(server, concurrency=3)
    rule = server.faults.add("GET training_runs/{run}", times=None, hang=True)
    with ThreadPoolExecutor(20) as pool:
        flights = [pool.submit(client.training_run, run_id) for run_id in server.account.run_ids]
        rule.wait_for(2)
        rule.release()
        assert len({flight.result().run_id for flight in flights}) == 20
    assert server.journal.max_in_flight() <= 3
    assert server.journal.count() == 20


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=24))
def test_every_call_has_its_turn_and_no_more_at_once_than_allowed(limit, works):
    budget = ConcurrencyLimiter(limit, FakeTime().clock)
    lock, now, most = threading.Lock(), [0], [0]

    def work(is_awaited, is_info):
        endpoint = INFO if is_info else LISTING
        with budget.acquire(endpoint, NEVER, Priority(is_awaited)) as turn:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            turn.status = 200
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=work, args=each) for each in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert most[0] <= limit


def test_pages_after_the_first_are_asked_for_as_many_at_once_as_allowed(demo_server, client_of):
    server = demo_server(runs=1000, checkpoints=0, latency_s=0.02)
    client = client_of(server, concurrency=4)
    rule = server.faults.add("GET training_runs", after=1, times=None, hold_until=3)
    assert len(client.all_training_runs()) == 1000
    rule.remove()
    assert server.journal.count() == 10
    assert server.journal.max_in_flight() == 4


# --- whose turn ----------------------------------------------------------------------------------


def test_who_waits_goes_before_what_is_guessed(time):
    with calls_under(ConcurrencyLimiter(1, time.clock)) as calls:
        end = calls.begin("first")
        calls.wait_for(1)
        calls.begin("guess", interest=guess())
        calls.wait_until_queued(1)
        end_waiting = calls.begin("waiting")
        calls.wait_until_queued(2)
        end()
        calls.wait_for(2)
        end_waiting()
        calls.wait_for(3)
        assert calls.begun == ["first", "waiting", "guess"]


def test_a_guess_that_somebody_comes_to_wait_for_is_none_any_more(time):
    with calls_under(ConcurrencyLimiter(1, time.clock)) as calls:
        end = calls.begin("first")
        calls.wait_for(1)
        interests = [guess(), guess()]
        for name, interest in zip(("guess", "wanted"), interests, strict=True):
            calls.begin(name, interest=interest)
            calls.wait_until_queued(1 + (name == "wanted"))
        interests[1].promote()
        end()
        calls.wait_for(2)
        assert calls.begun == ["first", "wanted"]


def test_guesses_leave_a_turn_for_who_waits(time):
    with calls_under(ConcurrencyLimiter(4, time.clock)) as calls:
        interests = [guess() for _ in range(6)]
        for number, interest in enumerate(interests):
            calls.begin(f"guess {number}", interest=interest)
        calls.wait_for(3)
        calls.wait_until_queued(3)
        calls.begin("waiting", INFO)
        calls.wait_for(4)
        assert calls.begun[3] == "waiting"


def test_a_guess_that_is_wanted_makes_room_for_another(time):
    with calls_under(ConcurrencyLimiter(2, time.clock)) as calls:
        wanted = guess()
        calls.begin("wanted", INFO, interest=wanted)
        calls.wait_for(1)
        calls.begin("guess", interest=guess())
        calls.wait_until_queued(1)
        wanted.promote()
        calls.wait_for(2)


def test_an_endpoint_that_does_not_answer_leaves_a_turn_for_the_others(time):
    with calls_under(ConcurrencyLimiter(4, time.clock)) as calls:
        for number in range(8):
            calls.begin(f"info {number}", INFO)
        calls.wait_for(3)
        calls.wait_until_queued(5)
        calls.begin("listing", LISTING)
        calls.wait_for(4)
        assert calls.begun[3] == "listing"


def test_an_endpoint_that_answers_may_have_every_turn(time):
    with calls_under(ConcurrencyLimiter(4, time.clock)) as calls:
        end = calls.begin("info", INFO)
        for number in range(6):
            calls.begin(f"info {number}", INFO)
        calls.wait_for(3)
        calls.wait_until_queued(4)
        end()
        calls.wait_for(5)  # four are under way


def test_builds_of_archives_take_no_turn(server, client_of):
    client = client_of(server, concurrency=2)
    rule = server.faults.add(ARCHIVE, times=None, hang=True)
    refs = [
        CheckpointRef(run_id=run.id, path_id=c.id, listed_id=c.id, exists=True)
        for run in server.account.runs()
        for c in run.checkpoints
        if not c.id.startswith("external")
    ][:20]
    with ThreadPoolExecutor(20) as pool:
        flights = [pool.submit(client.archive, ref) for ref in refs]
        rule.wait_for(20)
        assert len(client.all_training_runs()) == 10
        rule.release()
        assert all(flight.result().url for flight in flights)


def test_who_gets_no_turn_in_time_is_told_so(time):
    with calls_under(ConcurrencyLimiter(1, time.clock)) as calls:
        calls.begin("first")
        calls.wait_for(1)
        with (
            pytest.raises(errors.RequestTimeout, match="1 other calls go on") as caught,
            calls.budget.acquire(INFO, time.clock.monotonic(), DEMAND),
        ):
            pass
        assert caught.value.is_local


# --- what the server says of the pace ------------------------------------------------------------


def test_a_429_halves_what_is_allowed_and_answers_bring_it_back(time):
    budget = ConcurrencyLimiter(8, time.clock)
    allowed = []
    for _ in range(4):
        answered(budget, 429)
        allowed.append(budget.limit)
    assert allowed == [4, 2, 1, 1]
    for _ in range(200):
        before = budget.limit
        answered(budget)
        assert budget.limit - before in (0, 1)
    assert budget.limit == 8


def test_one_burst_of_429_is_one_answer(time):
    with calls_under(ConcurrencyLimiter(8, time.clock)) as calls:
        ends = [calls.begin(f"{n}", status=429) for n in range(7)]
        calls.wait_for(7)
        for end in ends:
            end()
        assert calls.budget.limit == 4


@given(st.integers(1, 16), st.lists(st.sampled_from([200, 404, 429, 500, 503]), max_size=80))
def test_what_is_allowed_stays_between_one_and_the_limit(limit, statuses):
    budget = ConcurrencyLimiter(limit, FakeTime().clock)
    for status in statuses:
        before = budget.limit
        answered(budget, status)
        assert 1 <= budget.limit <= limit
        if status == 429:
            assert budget.limit == max(before // 2, 1)
        elif status >= 500:
            assert budget.limit == before


@pytest.mark.parametrize("status", [429, 503])
def test_no_call_begins_before_the_server_wants_one(time, status):
    with calls_under(ConcurrencyLimiter(8, time.clock)) as calls:
        answered(calls.budget, status, retry_after_s=60)
        for name, endpoint in [("info", INFO), ("archive", endpoints.ARCHIVE)]:
            calls.begin(name, endpoint)
        calls.wait_until_queued(2)
        time.advance(59.9)
        calls.begin("listing", LISTING)
        calls.wait_until_queued(3)
        assert calls.begun == []
        time.advance(0.2)
        calls.wait_for(3)


@pytest.mark.parametrize(("status", "kind"), [(429, "RateLimited"), (503, "ServerError")])
def test_who_cannot_wait_so_long_fails_at_once_without_a_call(time, status, kind):
    budget = ConcurrencyLimiter(8, time.clock)
    answered(budget, status, retry_after_s=60)
    with (
        pytest.raises(getattr(errors, kind), match="another 60 s") as caught,
        budget.acquire(LISTING, time.clock.monotonic() + 30, DEMAND),
    ):
        pass
    assert caught.value.is_local
    time.advance(31)
    with ExitStack() as stack, pytest.raises(errors.ApiError):
        stack.enter_context(budget.acquire(LISTING, time.clock.monotonic() + 5, DEMAND))


def test_an_archive_that_is_being_built_is_no_wish_to_be_left_alone(time):
    budget = ConcurrencyLimiter(8, time.clock)
    answered(budget, 503, retry_after_s=60, endpoint=endpoints.ARCHIVE)
    answered(budget)


def test_a_429_of_one_endpoint_holds_for_the_whole_mount(server, client_of, time):
    client = client_of(server, clock=time.clock, timeout_s=30.0)
    server.faults.add("GET training_runs", status=429, headers={"Retry-After": "60"})
    with pytest.raises(errors.RateLimited):
        client.all_training_runs()
    run_id = server.account.run_ids[0]
    server.journal.clear()
    for ask in (client.training_run, client.list_checkpoints):
        with pytest.raises(errors.RateLimited, match="asked for no calls"):
            ask(run_id)
    assert server.journal.count() == 0
    time.advance(61)
    assert client.training_run(run_id).run_id == run_id
    assert client.list_checkpoints(run_id)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_server_that_is_asked_too_often_gets_every_call_in_the_end(
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
