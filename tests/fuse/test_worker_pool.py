"""Number of worker threads of a real mount."""

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
    """Restrict this process and its children to one CPU."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("one_cpu")
def test_sequential_requests_start_no_threads(mountpoint, binding):
    # The thread pool of libfuse starts 60 to 250 threads here.
    with memory_mount(mountpoint, binding) as daemon:
        fd = os.open(mountpoint / "hello", os.O_RDONLY)
        before = threads(daemon)
        for _ in range(5000):
            assert os.pread(fd, 3, 1) == b"ell"
        os.close(fd)
        assert threads(daemon) == before
        assert before <= CORE_WORKERS + 3


def test_each_blocked_request_adds_a_thread_while_it_blocks(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon:
        before = threads(daemon)
        with running([("cat", mountpoint / f"slow/read-{i}") for i in range(READERS)]):
            wait_until(lambda: threads(daemon) >= before + READERS)
            assert threads(daemon) <= before + READERS + 2
        # Each extra worker ends after its next request.
        deadline = time.monotonic() + 10
        while threads(daemon) > before:
            assert time.monotonic() < deadline
            (mountpoint / "hello").read_text()
        (mountpoint / "hello").read_text()
