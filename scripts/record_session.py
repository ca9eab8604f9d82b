"""Type commands into a shell on a terminal; save what the terminal shows.

    python -m scripts.record_session TARGET

The shell and its commands are real. They run as an ordinary user with an empty home, which needs
root. TARGET.cast is a recording in asciinema's format, version 2, and TARGET.svg a picture of the
whole session.
"""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from scripts.ordinary_user import ENVIRONMENT, as_user

WIDTH, HEIGHT = 104, 32
COMMANDS = (
    "mkdir ~/tinker && tinkerfs demo --detach ~/tinker",
    "cd ~/tinker && ls",
    "ls -lt runs | head -4",
    'cd "runs/$(ls -t runs | head -1)" && ls -l',
    "ls -lhS checkpoints/weights               # sizes on the server, largest first",
    "jq '.base_model, .lora_rank, .size_bytes' latest_sampler/info.json",
    "echo 1 > latest_sampler/published         # publish it",
    "echo 30d > latest/expires_at; cat latest/expires_at",
    'curl -so ~/archive.tar "$(cat latest_sampler/archive_url)"; tar tvf ~/archive.tar',
    "rm -r checkpoints/weights/0001            # delete that checkpoint, permanently",
    "rm -rf ~/tinker/runs 2>&1 | head -1       # an accident: nothing is lost",
    "tail -1 ~/tinker/.tinkerfs/changes",
    "cd && tinkerfs umount ~/tinker",
)
KEY_S, PAUSE_S, TIMEOUT_S = 0.03, 1.0, 60.0
#: The shell prints this before each prompt, with the exit status; terminals do not show it.
MARK = re.compile(r"\x1b]133;D;(\d+)\x07")


class Terminal:
    """A shell on a terminal; records its output."""

    def __init__(self) -> None:
        bash = "echo 'set enable-bracketed-paste off' >~/.inputrc; exec bash --norc --noprofile -i"
        shell = as_user("sh", "-ec", bash)
        environment = {
            **ENVIRONMENT,
            "PROMPT_COMMAND": r"printf '\e]133;D;%s\a' $?",
            "PS1": "$ ",
            "TERM": "xterm-256color",
        }
        pid, self._fd = pty.fork()
        if pid == 0:
            os.execvpe(shell[0], shell, environment)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        self._pid = pid
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started_s = time.monotonic()
        self.events: list[tuple[float, str]] = []

    def run(self, command: str) -> None:
        """Type a command; wait for the next prompt."""
        for key in command:
            os.write(self._fd, key.encode())
            self._read(KEY_S)
        os.write(self._fd, b"\r")
        self.wait_for_prompt()
        self._read(PAUSE_S)

    def wait_for_prompt(self) -> None:
        """Record output until the next prompt.

        Raises:
            RuntimeError: the last command failed, or there was no prompt within a minute.
        """
        first, deadline = len(self.events), time.monotonic() + TIMEOUT_S
        while True:
            self._read(0.1)
            output = "".join(text for _, text in self.events[first:])
            if found := MARK.search(output):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"no prompt: {output}")
        if found[1] != "0":
            raise RuntimeError(f"exit status {found[1]}: {output}")

    def _read(self, seconds: float) -> None:
        """Record output for some seconds."""
        end = time.monotonic() + seconds
        while (rest_s := end - time.monotonic()) > 0:
            if select.select([self._fd], [], [], rest_s)[0]:
                text = self._decoder.decode(os.read(self._fd, 65536))
                self.events.append((time.monotonic() - self._started_s, text))

    def close(self) -> None:
        """End the shell."""
        os.close(self._fd)
        os.waitpid(self._pid, 0)


def recording_of(events: list[tuple[float, str]]) -> str:
    """Return a recording in asciinema's format."""
    header = {"version": 2, "width": WIDTH, "height": HEIGHT, "title": "tinkerfs"}
    lines = [json.dumps(header)]
    lines += [json.dumps([round(at_s, 3), "o", text]) for at_s, text in events if text]
    return "\n".join(lines) + "\n"


def picture_of(events: list[tuple[float, str]]) -> str:
    """Return the whole session as an SVG image."""
    text = "".join(text for _, text in events).replace("\r\n", "\n")
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=WIDTH, record=True, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(text.removesuffix("$ ").rstrip()))
        picture: str = console.export_svg(title="tinkerfs", unique_id="session")
        return picture


def main() -> int:
    """Record the session; save both files."""
    target = sys.argv[1]
    terminal = Terminal()
    try:
        terminal.wait_for_prompt()
        for command in COMMANDS:
            terminal.run(command)
    finally:
        terminal.close()
    events = [(at_s, MARK.sub("", text)) for at_s, text in terminal.events]
    Path(f"{target}.cast").write_text(recording_of(events))
    Path(f"{target}.svg").write_text(picture_of(events))
    return 0


if __name__ == "__main__":
    sys.exit(main())
