"""Identify processes of this host, also after they have ended."""

import os
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process: its number and its start time, as a number is used again.

    Attributes:
        pid: process id.
        started: start time in ticks since the boot of the host (proc(5), /proc/pid/stat).
    """

    pid: int
    started: int

    @classmethod
    def current(cls) -> Self:
        """Return the id of this process."""
        return cls(os.getpid(), _start_time(os.getpid()) or 0)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form; an invalid text is a process that does not run."""
        pid, _, started = text.partition(":")
        return cls(int(pid), int(started)) if pid.isdigit() and started.isdigit() else cls(0, 0)

    def is_running(self) -> bool:
        """Return whether the process runs; False for one of another PID namespace."""
        return self.pid > 0 and _start_time(self.pid) == self.started

    def __str__(self) -> str:
        """Return the text form."""
        return f"{self.pid}:{self.started}"


def _start_time(pid: int) -> int | None:
    """Return the start time of a process, None if it does not run."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
