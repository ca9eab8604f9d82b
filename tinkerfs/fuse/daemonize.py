"""Start a mount in the background: one process serves it, and its parent waits until it is ready.

libfuse would fork, and threads do not survive a fork. So the command starts itself again in a new
session. The new process reports over a pipe that the mount is ready, or the reason of a failure.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from tinkerfs.errors import StartupError

#: Environment variable that contains the inherited file descriptor of the pipe.
VARIABLE: Final = "TINKERFS_READY_FD"

_READY: Final = b"ready\n"


class ReadinessNotifier:
    """The serving process's end of the pipe; does nothing if no parent waits.

    It leaves the working directory of the parent, which the mount must not keep busy.
    """

    def __init__(self, environ: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        number = environ.pop(VARIABLE, "")
        self._fd = int(number) if number.isdigit() else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)
            os.chdir("/")

    @property
    def has_parent(self) -> bool:
        """Whether a parent process waits, and prints the reason of a failure."""
        return self._fd is not None

    def ready(self) -> None:
        """Report that the mount is ready, and detach from the terminal."""
        if self._fd is None:
            return
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        self._send(_READY)

    def failed(self, reason: str) -> None:
        """Report the reason why mounting failed."""
        self._send(b"failed " + reason.encode("utf-8", "backslashreplace"))

    def _send(self, message: bytes) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, message)
        except BrokenPipeError:
            pass  # the parent no longer waits
        finally:
            os.close(self._fd)
            self._fd = None


def start_in_background(
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    pass_fds: Sequence[int] = (),
) -> int:
    """Start a command that serves a mount; return its process id when the mount is ready.

    Ctrl-C while waiting terminates the command.

    Args:
        command: the command.
        environ: its environment; None for the one of this process.
        pass_fds: descriptors that it inherits under the same numbers.

    Raises:
        StartupError: mounting failed; the message is the one that the command reported.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        try:
            child = subprocess.Popen(  # noqa: S603  (this program)
                command,
                env={**(os.environ if environ is None else environ), VARIABLE: str(writer)},
                pass_fds=(writer, *pass_fds),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            message = pipe.read()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if message == _READY:
        pid = child.pid
        child.returncode = 0  # prevents the ResourceWarning about a process that still runs
        return pid
    status = child.wait()
    if message.startswith(b"failed "):
        raise StartupError(message.removeprefix(b"failed ").decode("utf-8", "replace"))
    raise StartupError(
        f"the serving process ended with status {status} before the mount was ready"
        " (hint: run it with --foreground to see more)"
    )
