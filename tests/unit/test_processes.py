import os
import subprocess
import sys

import pytest

from tinkerfs.processes import ProcessId


def test_this_process_runs():
    current = ProcessId.current()
    assert current.pid == os.getpid()
    assert current.is_running()
    assert ProcessId.parse(str(current)) == current


def test_ended_process_does_not_run_even_as_a_zombie():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with open(f"/proc/{child.pid}/stat") as stat:
        started = int(stat.read().rpartition(")")[2].split()[19])
    process = ProcessId(child.pid, started)
    assert process.is_running()
    assert not ProcessId(child.pid, started + 1).is_running()
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_running()
    child.wait()
    assert not process.is_running()


@pytest.mark.parametrize("text", ["", "1", "a:b", "-1:5", "1:"])
def test_invalid_text_is_no_running_process(text):
    assert not ProcessId.parse(text).is_running()
