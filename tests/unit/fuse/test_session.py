"""Mounting: why it failed is told in one line, whoever knows it."""

import os
import signal
import subprocess
import sys

import pytest

from tinkerfs import errors
from tinkerfs.fuse import session


class FailingBinding:
    """A binding whose loop ends at once."""

    def __init__(self, words, failure):
        self._words, self._failure = words, failure

    def mount_options(self, **_options):
        return {}

    def run(self, *_arguments):
        os.write(2, self._words)
        raise self._failure


@pytest.fixture
def _signals_blocked():
    """Signals as a mount has them; one that woke it late is ignored, not let loose on the tests."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    session.block_signals()
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.signal(signal.SIGUSR1, handler)


@pytest.mark.usefixtures("_signals_blocked")
@pytest.mark.parametrize(
    ("words", "failure", "told"),
    [
        (
            b"fuse: bad mount point\n",
            RuntimeError(1),
            "cannot mount on /x: fuse: bad mount point: ",
        ),
        (b"", RuntimeError(1), "cannot mount on /x: libfuse gave no reason: "),
        (b"", RuntimeError("no wrapper"), "cannot mount on /x: RuntimeError: no wrapper: "),
        (b"", TypeError("3 arguments"), "cannot mount on /x: TypeError: 3 arguments: "),
        (b"fuse: first\n", TypeError("then"), "cannot mount on /x: fuse: first: "),
    ],
)
def test_a_mount_that_fails_says_why(words, failure, told, monkeypatch):
    monkeypatch.setattr(session, "Operations", lambda *_a, **_k: None)
    with pytest.raises(errors.StartupError) as refusal:
        session.serve(None, FailingBinding(words, failure), "/x", timeout_s=1, ready=lambda: None)
    assert str(refusal.value).startswith(told)


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [((256, 4096), 4096), ((256, 20_000), 8192), ((9000, 20_000), 9000), ((256, 256), 256)],
)
def test_a_mount_may_have_enough_files_open(limits, allowed):
    script = (
        "import resource as r\n"
        "from tinkerfs.fuse.session import allow_open_files\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, {limits})\n"
        "allow_open_files()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{(allowed, limits[1])}\n"
