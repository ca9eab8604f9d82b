"""Stacks of the threads of a mount's daemon, for a debug bundle.

A thread of the daemon writes them to an anonymous file on a signal, and another process of the same
user reads that file through /proc. So they are available while every other thread waits. The stacks
have functions and line numbers, and no values.
"""

import faulthandler
import os
import signal
import threading
import time
from typing import Final

#: A real-time signal, which nothing else uses: Ctrl-\ (SIGQUIT) still ends a foreground mount.
_SIGNAL: Final = signal.SIGRTMIN
_NAME: Final = "tinkerfs-stacks"
#: How /proc shows the anonymous file.
_LINK: Final = f"/memfd:{_NAME} (deleted)"

_POLL_S: Final = 0.05


def enable() -> None:
    """Let this process write the stacks of its threads when `read_stacks` requests them.

    Must be called before any other thread starts. An earlier thread would not block the signal, and
    its default action would end the process.
    """
    # A reader may find the file at once, so the signal is blocked first.
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    # A reader truncates the file, after which the next stacks must be at its start.
    appending = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    os.close(fd)
    threading.Thread(target=_write_on_request, args=(appending,), daemon=True).start()


def _write_on_request(fd: int) -> None:
    while True:
        signal.sigwait({_SIGNAL})
        # With the GIL held, no other thread changes its stack meanwhile. A signal handler in C
        # has no GIL, and could read a stack that no longer exists.
        faulthandler.dump_traceback(fd, all_threads=True)


def read_stacks(pid: int, *, timeout_s: float = 1.0) -> str | None:
    """Return the stacks of the threads of a daemon; None if they are unavailable.

    Another user's process is not signalled.
    """
    try:
        if os.stat(f"/proc/{pid}").st_uid not in (0, os.geteuid()):
            return None
        path = next(
            path
            for name in os.listdir(f"/proc/{pid}/fd")
            if os.readlink(path := f"/proc/{pid}/fd/{name}") == _LINK
        )
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, StopIteration):
        return None
    with open(fd, "r+b") as file:
        if os.fstat(fd).st_nlink:  # not an anonymous file
            return None
        os.ftruncate(fd, 0)
        try:
            os.kill(pid, _SIGNAL)
        except OSError:
            return None
        deadline, length = time.monotonic() + timeout_s, -1
        # The stacks are complete when the file has not grown for a while.
        while time.monotonic() < deadline and (length <= 0 or os.fstat(fd).st_size != length):
            length = os.fstat(fd).st_size
            time.sleep(_POLL_S)
        return file.read().decode("utf-8", "replace") or None
