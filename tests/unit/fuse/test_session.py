"""Errors of a failed mount, and the limit of open files."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tinkerfs import errors
from tinkerfs.fuse import session
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.operation_log import OperationLog
from tinkerfs.telemetry import Telemetry


class FailingBinding:
    """A binding that fails to mount."""

    workers = SimpleNamespace(blocking=None)

    def __init__(self, output, failure):
        self._output, self._failure = output, failure

    def mount_options(self, **_options):
        return {}

    def run(self, *_arguments):
        os.write(2, self._output)
        raise self._failure


@pytest.fixture
def _signals_blocked():
    """Block the signals as a mount does; ignore a late SIGUSR1, which would end the tests."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    session.block_signals()
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.signal(signal.SIGUSR1, handler)


@pytest.mark.usefixtures("_signals_blocked")
@pytest.mark.parametrize(
    ("output", "failure", "message"),
    [
        (
            b"fuse: bad mount point\n",
            RuntimeError(1),
            "cannot mount on /x: fuse: bad mount point (hint: ",
        ),
        (b"", RuntimeError(1), "cannot mount on /x: libfuse gave no reason (hint: "),
        (b"", RuntimeError("no wrapper"), "cannot mount on /x: RuntimeError: no wrapper (hint: "),
        (b"", TypeError("3 arguments"), "cannot mount on /x: TypeError: 3 arguments (hint: "),
        (b"fuse: first\n", TypeError("then"), "cannot mount on /x: fuse: first (hint: "),
    ],
)
def test_failed_mount_raises_error_with_reason(output, failure, message, monkeypatch):
    monkeypatch.setattr(session, "Operations", lambda *_a, **_k: None)
    with pytest.raises(errors.StartupError) as refusal:
        session.serve(
            None,
            FailingBinding(output, failure),
            "/x",
            Passthrough(Telemetry()),
            operation_log=OperationLog(),
            timeout_s=1,
            ready=lambda: None,
        )
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [((256, 4096), 4096), ((256, 20_000), 8192), ((9000, 20_000), 9000), ((256, 256), 256)],
)
def test_raise_fd_limit_stays_within_hard_limit(limits, allowed):
    script = (
        "import resource as r\n"
        "from tinkerfs.fuse.session import raise_fd_limit\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, {limits})\n"
        "raise_fd_limit()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{(allowed, limits[1])}\n"
