"""A blocked request does not delay others, and can be interrupted."""

import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.mount import interrupt_after, memory_mount, run, running, wait_until

READERS = 64
#: Upper bound of "at once" on a busy machine, seconds.
AT_ONCE_S = 2.0


def settle(processes):
    """Wait until every process is blocked, and check that all are alive."""
    time.sleep(1.0)
    assert all(process.poll() is None for process in processes)


@pytest.mark.parametrize("what", ["slow/read-{}", "slow/open-{}", "slow/list-{}"])
def test_64_blocked_requests_do_not_delay_others(memory, what):
    command = ("ls",) if "list" in what else ("cat",)
    with running([(*command, memory / what.format(i)) for i in range(READERS)]) as readers:
        settle(readers)
        started = time.monotonic()
        assert run("ls", "-l", memory).returncode == 0
        assert run("ls", "-l", memory / "folder").returncode == 0
        assert (memory / "hello").read_text() == "hello\n"
        assert len((memory / "cached-1048576").read_bytes()) == 1 << 20
        assert time.monotonic() - started < AT_ONCE_S


def test_64_blocked_cached_reads_do_not_delay_other_reads(memory):
    code = "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, int(sys.argv[2]))"
    path = str(memory / "cached-slow")
    commands = [(sys.executable, "-S", "-c", code, path, str(i << 14)) for i in range(READERS)]
    with running(commands) as readers:
        settle(readers)
        started = time.monotonic()
        assert len((memory / "cached-1048576").read_bytes()) == 1 << 20
        assert run("ls", "-l", memory).returncode == 0
        assert time.monotonic() - started < AT_ONCE_S


@pytest.mark.parametrize(
    "command",
    [
        ("ls", "slow/list-1"),
        ("cat", "slow/open-1"),
        ("cat", "slow/read-1"),
        ("stat", "slow/stat-1"),
        (sys.executable, "-c", "import sys; open(sys.argv[1]).read()", "slow/read-1"),
    ],
    ids=["listing", "open", "read", "stat", "python"],
)
def test_ctrl_c_interrupts_a_blocked_request(memory, command):
    with running([(*command[:-1], memory / command[-1])]) as (process,):
        assert interrupt_after(process, 0.7) < AT_ONCE_S


def test_lookup_times_out_after_5_s(memory):
    started = time.monotonic()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.stat(memory / "slow/stat-1")
    assert failure.value.errno == errno.ETIMEDOUT
    assert 4.5 < time.monotonic() - started < 7


def test_other_requests_time_out_after_the_timeout(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--timeout=1"):
        for what in ("slow/read-1", "slow/list-1"):
            started = time.monotonic()
            look = os.listdir if "list" in what else Path.read_bytes
            with pytest.raises(OSError) as failure:  # noqa: PT011
                look(mountpoint / what)
            assert failure.value.errno == errno.ETIMEDOUT
            assert time.monotonic() - started < 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_ends_mount_within_2_s_while_reads_hang(mountpoint, binding, number):
    with memory_mount(mountpoint, binding) as daemon:
        paths = [mountpoint / f"slow/read-{i}" for i in range(READERS)]
        with running([("cat", path) for path in paths]) as readers:
            settle(readers)
            started = time.monotonic()
            daemon.send_signal(number)
            assert daemon.wait(10) == 0
            assert time.monotonic() - started < 2
            assert not os.path.ismount(mountpoint)
            wait_until(lambda: all(reader.poll() is not None for reader in readers))


def test_signal_ends_mount_that_is_in_use(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon, contextlib.ExitStack() as stack:
        held = os.open(mountpoint / "hello", os.O_RDONLY)
        stack.enter_context(contextlib.suppress(OSError))  # close fails with ENOTCONN
        stack.callback(os.close, held)
        started = time.monotonic()
        daemon.terminate()
        assert daemon.wait(10) == 0
        assert time.monotonic() - started < 2
        assert not os.path.ismount(mountpoint)


def test_external_unmount_ends_the_process(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon:
        assert run("umount", mountpoint).returncode == 0
        assert daemon.wait(5) == 0
