"""How many threads take the kernel's requests."""

import os
import time

import pytest

from tests.support.mount import memory_mount, running, wait_until
from tinkerfs.fuse.worker_pool import CORE_WORKERS

READERS = 64


def threads(daemon):
    return len(os.listdir(f"/proc/{daemon.pid}/task"))


@pytest.fixture
def one_cpu():
    """Have this process, and what it starts, on one CPU."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("one_cpu")
def test_who_asks_for_one_thing_after_the_other_has_no_threads_started(mountpoint, binding):
    # libfuse's own loop came to 60 to 250 by this, where the scheduler stops who has answered.
    with memory_mount(mountpoint, binding) as daemon:
        fd = os.open(mountpoint / "hello", os.O_RDONLY)
        before = threads(daemon)
        for _ in range(5000):
            assert os.pread(fd, 3, 1) == b"ell"
        os.close(fd)
        assert threads(daemon) == before
        assert before <= CORE_WORKERS + 3


def test_there_is_a_thread_more_for_each_request_that_waits_and_then_no_more(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon:
        before = threads(daemon)
        with running([("cat", mountpoint / f"slow/read-{i}") for i in range(READERS)]):
            wait_until(lambda: threads(daemon) >= before + READERS)
            assert threads(daemon) <= before + READERS + 2
        # Each ends with the next request that it takes.
        deadline = time.monotonic() + 10
        while threads(daemon) > before:
            assert time.monotonic() < deadline
            (mountpoint / "hello").read_text()
        (mountpoint / "hello").read_text()
