"""Start of a background process, and its readiness notification."""

import os
import sys

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.fuse import daemonize

PREAMBLE = "from tinkerfs.fuse.daemonize import ReadinessNotifier; notifier = ReadinessNotifier(); "


def start(code):
    return daemonize.start_in_background([sys.executable, "-c", PREAMBLE + code])


def test_ready_process_detaches_and_keeps_running():
    pid = start("notifier.ready(); import time; time.sleep(60)")
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in (0, 1, 2)} == {"/dev/null"}
        assert os.getsid(pid) == pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_failed_process_reports_reason():
    with pytest.raises(StartupError, match=r"^no key: ü$"):
        start("notifier.failed('no key: ü')")


def test_exit_without_report_raises_error():
    with pytest.raises(StartupError, match="ended with status 3"):
        start("import os; os._exit(3)")


def test_pipe_descriptor_is_not_inherited():
    with pytest.raises(StartupError, match=r"^False$"):
        start(
            "import os; fd = notifier._fd;"
            "notifier.failed(str(os.get_inheritable(fd) or 'TINKERFS_READY_FD' in os.environ))"
        )


def test_notifier_without_parent_does_nothing():
    notifier = daemonize.ReadinessNotifier({})
    assert not notifier.has_parent
    directory = os.getcwd()
    notifier.ready()
    notifier.failed("nothing happens")
    assert os.getcwd() == directory
