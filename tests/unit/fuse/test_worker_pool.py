"""The threads that stand in for those that wait, without a kernel."""

import queue
import threading
import time
from contextlib import ExitStack

import pytest

from tinkerfs.fuse import worker_pool
from tinkerfs.fuse.worker_pool import SessionWorkers


class Libfuse:
    """Hands out requests: a function each, or what receiving one returns instead."""

    def __init__(self):
        self.requests = queue.Queue()
        self.request = threading.local()
        self.freed = queue.Queue()

    def fuse_session_receive_buf(self, _session, _buffer):
        self.request.now = self.requests.get(timeout=10)
        return 1 if callable(self.request.now) else self.request.now

    def fuse_session_process_buf(self, _session, _buffer, _channel):
        self.request.now()

    def free(self, memory):
        self.freed.put(memory)


@pytest.fixture
def libfuse():
    return Libfuse()


@pytest.fixture
def mounted(libfuse, monkeypatch):
    monkeypatch.setattr(worker_pool, "_declared", lambda _library, _major: libfuse)
    mounted = SessionWorkers(None, 3)
    mounted._session = 1
    return mounted


def spares():
    return [thread for thread in threading.enumerate() if thread.name == "spare"]


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_while_one_waits_others_are_served(libfuse, mounted):
    served = threading.Semaphore(0)
    with mounted.blocking():
        for _ in range(3):
            libfuse.requests.put(served.release)
        for _ in range(3):
            assert served.acquire(timeout=10)
        assert len(spares()) == 1
    libfuse.requests.put(served.release)
    assert served.acquire(timeout=10)
    wait_until(lambda: not spares())
    assert libfuse.freed.qsize() == 1


def test_who_stands_in_may_wait_too(libfuse, mounted):
    may_go_on, ended = threading.Event(), threading.Semaphore(0)

    def request():
        with mounted.blocking():
            may_go_on.wait(10)
        ended.release()

    for _ in range(5):
        libfuse.requests.put(request)
    with mounted.blocking():
        wait_until(lambda: len(spares()) == 6)
        may_go_on.set()
        for _ in range(5):
            assert ended.acquire(timeout=10)
    libfuse.requests.put(0)
    wait_until(lambda: not spares())


def test_a_wait_that_follows_another_uses_the_thread_that_is_there(libfuse, mounted):
    for _ in range(10):
        with mounted.blocking():
            assert len(spares()) == 1
    libfuse.requests.put(0)
    wait_until(lambda: not spares())


def test_there_is_a_bound(libfuse, mounted, monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_EXTRA_WORKERS", 3)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(mounted.blocking())
        assert len(spares()) == 3
    for _ in range(3):
        libfuse.requests.put(0)
    wait_until(lambda: not spares())


def test_where_there_can_be_no_more_threads_it_just_waits(libfuse, mounted, monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with mounted.blocking():
            assert mounted._spares == 0
    with mounted.blocking():
        assert len(spares()) == 1
    libfuse.requests.put(0)
    wait_until(lambda: not spares())


def test_before_the_mount_answers_nobody_stands_in(mounted):
    mounted._session = None
    with mounted.blocking():
        assert spares() == []


def test_waiting_reads_cannot_take_every_thread():
    from tinkerfs.fuse.binding import MAX_BACKGROUND

    assert MAX_BACKGROUND < worker_pool.MAX_EXTRA_WORKERS
