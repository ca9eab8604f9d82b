"""Extra workers during blocking sections, without a kernel."""

import queue
import threading
import time
from contextlib import ExitStack

import pytest

from tinkerfs.fuse import worker_pool
from tinkerfs.fuse.worker_pool import SessionWorkers


class Libfuse:
    """A fake libfuse. Its requests are functions, or return values of the receiving call."""

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
def workers(libfuse, monkeypatch):
    monkeypatch.setattr(worker_pool, "_declared", lambda _library, _major: libfuse)
    monkeypatch.setattr(worker_pool, "_context_function", lambda _path: None)
    workers = SessionWorkers(None, 3)
    workers._session = 1
    return workers


def extra_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fuse-extra"]


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_blocked_request_does_not_delay_others(libfuse, workers):
    served = threading.Semaphore(0)
    with workers.blocking():
        for _ in range(3):
            libfuse.requests.put(served.release)
        for _ in range(3):
            assert served.acquire(timeout=10)
        assert len(extra_threads()) == 1
    libfuse.requests.put(served.release)
    assert served.acquire(timeout=10)
    wait_until(lambda: not extra_threads())
    assert libfuse.freed.qsize() == 1


def test_extra_worker_can_block_too(libfuse, workers):
    may_continue, ended = threading.Event(), threading.Semaphore(0)

    def request():
        with workers.blocking():
            may_continue.wait(10)
        ended.release()

    for _ in range(5):
        libfuse.requests.put(request)
    with workers.blocking():
        wait_until(lambda: len(extra_threads()) == 6)
        may_continue.set()
        for _ in range(5):
            assert ended.acquire(timeout=10)
    libfuse.requests.put(0)
    wait_until(lambda: not extra_threads())


def test_next_blocking_section_reuses_extra_worker(libfuse, workers):
    for _ in range(10):
        with workers.blocking():
            assert len(extra_threads()) == 1
    libfuse.requests.put(0)
    wait_until(lambda: not extra_threads())


def test_extra_workers_are_bounded(libfuse, workers, monkeypatch):
    monkeypatch.setattr(worker_pool, "MAX_EXTRA_WORKERS", 3)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(workers.blocking())
        assert len(extra_threads()) == 3
    for _ in range(3):
        libfuse.requests.put(0)
    wait_until(lambda: not extra_threads())


def test_blocking_without_new_threads_just_blocks(libfuse, workers, monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with workers.blocking():
            assert workers._extra_workers == 0
    with workers.blocking():
        assert len(extra_threads()) == 1
    libfuse.requests.put(0)
    wait_until(lambda: not extra_threads())


def test_blocking_before_mounting_starts_no_worker(workers):
    workers._session = None
    with workers.blocking():
        assert extra_threads() == []


def test_background_reads_are_fewer_than_extra_workers():
    from tinkerfs.fuse.binding import MAX_BACKGROUND

    assert MAX_BACKGROUND < worker_pool.MAX_EXTRA_WORKERS
