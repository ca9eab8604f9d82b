"""Programs on a pseudo-terminal, and key presses of a user."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_ROWS, _COLUMNS = 40, 160
_READ_BYTES = 65536
#: Escape sequences for cursor, colours, titles and character sets.
_CONTROL = re.compile(
    rb"\x1b(?:\[[0-9;?>=]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()].|[=>78cM])"
)


class Terminal:
    """A program on a terminal of 40 x 160 characters, and its output so far."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self._raw = b""
        self._seen = 0

    @property
    def shown(self) -> str:
        """The output in the order of writing, without escape sequences."""
        return _CONTROL.sub(b"", self._raw).decode(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 20.0) -> None:
        """Wait until a text is shown after the last one that was awaited."""
        deadline = time.monotonic() + timeout_s
        while (at := self.shown.find(text, self._seen)) < 0:
            assert self._read(deadline), f"no {text!r} in: {self.shown[self._seen :]!r}"
        self._seen = at + len(text)

    def send(self, keys: str) -> None:
        """Type keys."""
        os.write(self._master, keys.encode())

    def end(self, timeout_s: float = 20.0) -> int:
        """Wait until the program exits, and return its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 1.0))

    def _read(self, deadline: float) -> bool:
        """Read some output; return False after the end of the output or at the deadline."""
        ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0.0))
        if not ready:
            return False
        try:
            read = os.read(self._master, _READ_BYTES)
        except OSError:  # EIO: the other side is closed
            return False
        self._raw += read
        return bool(read)


@contextmanager
def terminal(
    command: Sequence[str | Path], cwd: Path, env: Mapping[str, str]
) -> Iterator[Terminal]:
    """Run a program on a new terminal in a new session; kill its remaining processes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={"TERM": "xterm", "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"], **env},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        os.close(master)
