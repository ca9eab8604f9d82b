"""Listings of several pages on real mounts, read before the later pages have arrived."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.account import account, api_calls, every_binding, make_account

__all__ = ["account", "make_account"]

pytestmark = every_binding

RUNS, PAGE = 450, 100
LISTED = "GET training_runs"


@pytest.fixture
def cold(make_account):
    return make_account(runs=RUNS, checkpoints=1)


def later_pages(account, **effects):
    return account.server.faults.add(LISTED, times=None, after=1, **effects)


def test_first_names_are_readable_before_the_last_page(cold):
    held = later_pages(cold, hang=True)
    with os.scandir(cold.path("runs")) as entries:
        names = [next(entries).name for _ in range(PAGE)]
        assert cold.eventually(lambda: api_calls(cold.server)[LISTED] > 1)
        held.release()
        names += [entry.name for entry in entries]
    assert sorted(names) == sorted(cold.server.account.run_ids)
    assert api_calls(cold.server) == {LISTED: -(-RUNS // PAGE)}


def test_pipe_receives_first_names_before_the_last_page(cold):
    # The first pages fill the output buffer of ls, which it fills before it writes to a pipe.
    held = cold.server.faults.add(
        LISTED, times=None, hang=True, when=lambda entry: entry.query["offset"] == "400"
    )
    listing = cold.start("ls", "-f", "runs")
    with listing:
        names = {listing.stdout.readline().strip() for _ in range(20)}
        assert len(names - {".", ".."}) >= 18
        held.release()
        names |= {line.strip() for line in listing.stdout}
    assert names == {".", "..", *cold.server.account.run_ids}
    assert listing.returncode == 0


def test_long_listing_sends_only_page_requests(cold):
    later_pages(cold, latency_s=0.4)
    done = cold.sh("ls -lf runs; find runs -maxdepth 1 -newermt 2000-01-01 | wc -l")
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1] == str(RUNS + 1)
    assert api_calls(cold.server) == {LISTED: -(-RUNS // PAGE)}


def test_failed_page_raises_error_after_earlier_pages(cold):
    held = threading.Event()
    later_pages(
        cold,
        call=lambda: held.wait(10),
        status=500,
        headers={"x-should-retry": "false"},
    )
    with os.scandir(cold.path("runs")) as entries:
        for _ in range(PAGE):
            next(entries)
        held.set()
        with pytest.raises(OSError, match="Input/output error"):
            list(entries)
    assert "500" in cold.errors()
    cold.server.faults.clear()
    cold.refresh()
    assert len(os.listdir(cold.path("runs"))) == RUNS


STOPPED = """
import os
entries = os.scandir("runs")
for number in range(1, 101):
    next(entries)
print(number, flush=True)
next(entries)
"""


def test_ctrl_c_interrupts_readdir_waiting_for_a_page(cold):
    held = later_pages(cold, hang=True)
    listing = cold.start("python3", "-c", STOPPED)
    with listing:
        assert listing.stdout.readline() == "100\n"
        listing.send_signal(signal.SIGINT)
        assert listing.wait(5) == -signal.SIGINT
        listing.stderr.read()
    assert cold.sh("timeout 5 ls -d README.md checkpoints published").returncode == 0
    held.release()
    assert len(os.listdir(cold.path("runs"))) == RUNS


INTERRUPTED = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.readdir.restype = ctypes.c_void_p
libc.fdopendir.restype = ctypes.c_void_p
directory = ctypes.c_void_p(libc.fdopendir(os.open("runs", os.O_RDONLY | os.O_DIRECTORY)))
signal.signal(signal.SIGALRM, lambda *_: None)
signal.alarm(1)
names = 0
while True:
    ctypes.set_errno(0)
    if libc.readdir(directory):
        names += 1
    elif ctypes.get_errno() == 0:
        break
    else:
        assert ctypes.get_errno() == 4, ctypes.get_errno()
        print("interrupted", flush=True)
        input()
print(names - 2)
"""


def test_readdir_continues_after_an_interrupt(cold):
    held = later_pages(cold, hang=True)
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", INTERRUPTED],
        cwd=cold.root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout.readline() == "interrupted\n"
        held.release()
        assert reader.communicate("\n" * 9, timeout=30)[0] == f"{RUNS}\n"
