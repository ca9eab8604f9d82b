"""The word by which a serving process lets the one that started it go."""

import os
import sys

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.fuse import daemonize

PREAMBLE = "from tinkerfs.fuse.daemonize import Announcer; announcer = Announcer(); "


def start(code):
    return daemonize.start_in_background([sys.executable, "-c", PREAMBLE + code])


def test_who_is_ready_lets_the_caller_go_and_lives_on():
    pid = start("announcer.ready(); import time; time.sleep(60)")
    try:
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{n}") for n in (0, 1, 2)} == {"/dev/null"}
        assert os.getsid(pid) == pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_who_refuses_says_why():
    with pytest.raises(StartupError, match=r"^no key: ü$"):
        start("announcer.failed('no key: ü')")


def test_who_dies_is_missed():
    with pytest.raises(StartupError, match="ended with status 3"):
        start("import os; os._exit(3)")


def test_the_descriptor_is_not_handed_on():
    with pytest.raises(StartupError, match=r"^False$"):
        start(
            "import os; fd = announcer._fd;"
            "announcer.failed(str(os.get_inheritable(fd) or 'TINKERFS_READY_FD' in os.environ))"
        )


def test_nobody_waits_for_a_mount_in_the_foreground():
    announcer = daemonize.ReadinessNotifier({})
    assert not announcer.has_parent
    folder = os.getcwd()
    announcer.ready()
    announcer.failed("nothing happens")
    assert os.getcwd() == folder
