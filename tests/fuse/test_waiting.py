"""A wait holds up nobody else, and whoever waits can be stopped."""

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
#: What "at once" is allowed to take on a machine that does other things too.
AT_ONCE_S = 2.0


def settle(processes):
    """Let every process come to its wait; they all live."""
    time.sleep(1.0)
    assert all(process.poll() is None for process in processes)


@pytest.mark.parametrize("what", ["slow/read-{}", "slow/open-{}", "slow/list-{}"])
def test_64_waits_hold_up_nothing(memory, what):
    command = ("ls",) if "list" in what else ("cat",)
    with running([(*command, memory / what.format(i)) for i in range(READERS)]) as readers:
        settle(readers)
        started = time.monotonic()
        assert run("ls", "-l", memory).returncode == 0
        assert run("ls", "-l", memory / "folder").returncode == 0
        assert (memory / "hello").read_text() == "hello\n"
        assert len((memory / "cached-1048576").read_bytes()) == 1 << 20
        assert time.monotonic() - started < AT_ONCE_S


def test_64_waits_for_page_cache_hold_up_no_other_read(memory):
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
def test_ctrl_c_ends_a_wait(memory, command):
    with running([(*command[:-1], memory / command[-1])]) as (process,):
        assert interrupt_after(process, 0.7) < AT_ONCE_S


def test_a_lookup_waits_5_s_at_most(memory):
    started = time.monotonic()
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.stat(memory / "slow/stat-1")
    assert failure.value.errno == errno.ETIMEDOUT
    assert 4.5 < time.monotonic() - started < 7


def test_other_waits_end_with_the_time_out(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--timeout=1"):
        for what in ("slow/read-1", "slow/list-1"):
            started = time.monotonic()
            look = os.listdir if "list" in what else Path.read_bytes
            with pytest.raises(OSError) as failure:  # noqa: PT011
                look(mountpoint / what)
            assert failure.value.errno == errno.ETIMEDOUT
            assert time.monotonic() - started < 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_mount_within_2_s_while_reads_hang(mountpoint, binding, number):
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


def test_a_signal_ends_the_mount_while_somebody_holds_it(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon, contextlib.ExitStack() as stack:
        held = os.open(mountpoint / "hello", os.O_RDONLY)
        stack.enter_context(contextlib.suppress(OSError))  # close says ENOTCONN
        stack.callback(os.close, held)
        started = time.monotonic()
        daemon.terminate()
        assert daemon.wait(10) == 0
        assert time.monotonic() - started < 2
        assert not os.path.ismount(mountpoint)


def test_an_unmount_from_outside_ends_the_process(mountpoint, binding):
    with memory_mount(mountpoint, binding) as daemon:
        assert run("umount", mountpoint).returncode == 0
        assert daemon.wait(5) == 0
