"""How a mount goes into the background: a second process serves, the first waits for its word.

libfuse's own way is to fork, and the threads that exist by then are dead after. So the command
executes itself anew, in a session of its own, and the new process says over a pipe that it is
ready, or in one line why it will not be.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from tinkerfs.errors import StartupError

#: Names the inherited descriptor of the pipe.
VARIABLE: Final = "TINKERFS_READY_FD"

_READY: Final = b"ready\n"


class ReadinessNotifier:
    """The serving process's end of the pipe; mute where nobody waits."""

    def __init__(self, environ: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        number = environ.pop(VARIABLE, "")
        self._fd = int(number) if number.isdigit() else None
        if self._fd is not None:
            os.set_inheritable(self._fd, False)

    @property
    def has_parent(self) -> bool:
        """Whether another process waits for our word, and shows it."""
        return self._fd is not None

    def ready(self) -> None:
        """Say that the mount answers, and let go of the caller's terminal and folder."""
        if self._fd is None:
            return
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        self._say(_READY)

    def failed(self, reason: str) -> None:
        """Say why there will be no mount."""
        self._say(b"failed " + reason.encode("utf-8", "backslashreplace"))

    def _say(self, message: bytes) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, message)
        except BrokenPipeError:
            pass  # whoever waited has given up
        finally:
            os.close(self._fd)
            self._fd = None


def start_in_background(command: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Start a command that serves a mount, and return its process id once it answers.

    The command runs in `/`, so its arguments and its environment may hold no relative path.
    Ctrl-C while waiting ends it again.

    Raises:
        SetupError: it will not; in its own words.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        try:
            child = subprocess.Popen(  # noqa: S603  (ourselves)
                command,
                env={**(os.environ if environ is None else environ), VARIABLE: str(writer)},
                pass_fds=(writer,),
                stdin=subprocess.DEVNULL,
                cwd="/",
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
        child.returncode = 0  # it lives on: no warning about that when the object goes
        return pid
    status = child.wait()
    if message.startswith(b"failed "):
        raise StartupError(message.removeprefix(b"failed ").decode("utf-8", "replace"))
    raise StartupError(
        f"the serving process ended with status {status} before the mount answered;"
        " run it with --foreground to see more"
    )
