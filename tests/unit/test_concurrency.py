"""One execution in flight per key."""

import threading
from concurrent.futures import Future

import pytest

from tinkerfs.concurrency import SingleFlight


@pytest.fixture
def flights():
    return SingleFlight()


class Work:
    """Work that counts its executions, and waits while it is held."""

    def __init__(self, result="result"):
        self.result = result
        self.calls = 0
        self.held = threading.Event()

    def __call__(self):
        self.calls += 1
        assert self.held.wait(10)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def run(flights, work, key="key"):
    return flights.run(key, work, "test", Future())


def test_concurrent_callers_share_one_execution(flights):
    work = Work()
    futures = [run(flights, work) for _ in range(5)]
    assert flights.get("key") is futures[0]
    assert flights.in_flight() == futures[:1]
    work.held.set()
    assert {future.result(10) for future in futures} == {"result"}
    assert work.calls == 1


def test_other_key_has_its_own_execution(flights):
    work = Work()
    futures = [run(flights, work, key) for key in "ab"]
    work.held.set()
    assert [future.result(10) for future in futures] == ["result"] * 2
    assert work.calls == 2


@pytest.mark.parametrize("result", ["result", ValueError("failed"), SystemExit("ended")])
def test_key_is_free_before_waiters_wake(flights, result):
    work = Work(result)
    in_flight = []
    future = run(flights, work)
    future.add_done_callback(lambda _future: in_flight.extend(flights.in_flight()))
    work.held.set()
    if isinstance(result, str):
        assert future.result(10) == result
    else:
        with pytest.raises(type(result)):
            future.result(10)
    assert in_flight == []
    assert run(flights, work) is not future


def test_work_that_ends_at_once_frees_its_key(flights):
    for _ in range(100):
        run(flights, lambda: None).result(10)
        assert flights.get("key") is None


def test_cache_check_and_run_under_one_lock_load_once(flights):
    lock, cache, loads = threading.Lock(), {}, []

    def load():
        loads.append(1)
        with lock:
            cache["key"] = "value"

    def get():
        with lock:
            future = None if "key" in cache else run(flights, load)
        if future is not None:
            future.result(10)

    for _ in range(50):
        cache.clear()
        loads.clear()
        threads = [threading.Thread(target=get) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(loads) == 1


def test_forgotten_execution_ends_for_its_waiters(flights):
    old, new = Work("old"), Work("new")
    first = run(flights, old)
    flights.forget("key")
    assert flights.get("key") is None
    second = run(flights, new)
    old.held.set()
    assert first.result(10) == "old"
    assert flights.get("key") is second, "the end of the old execution leaves the new one"
    flights.forget_all()
    assert flights.in_flight() == []
    new.held.set()
    assert second.result(10) == "new"


def test_key_is_free_after_no_thread_could_start(flights, monkeypatch):
    def fail(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            run(flights, lambda: "never")
    assert run(flights, lambda: "result").result(10) == "result"
