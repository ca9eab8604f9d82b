"""What all parts of the bench use: rows, mounts, counts of calls, medians."""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tinkerfs.demo.server import DemoServer

TINKERFS = (sys.executable, "-m", "tinkerfs")
BINDINGS = ("fusepy", "mfusepy2", "mfusepy3")
RUNS_OF_A_TIMED_THING = 5


class Bench:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._binding: str | None = None

    @contextmanager
    def under(self, binding: str) -> Iterator[None]:
        """Say that the rows that are added meanwhile are of a binding."""
        self._binding = binding
        yield
        self._binding = None

    def add(
        self,
        what: str,
        figure: float,
        unit: str,
        bound: float | None = None,
        *,
        goal: float | None = None,
        beside: Mapping[str, float] | None = None,
    ) -> None:
        """Add a row, and print it.

        Args:
            what: was counted or measured.
            figure: what came out.
            unit: of the figure, the bound and the goal.
            bound: the most it may be; over it the run fails.
            goal: the most it should be; over it the run says so, and goes on.
            beside: what the figure was made from, by name.
        """
        row = {"what": what, "binding": self._binding, "figure": figure, "unit": unit}
        row |= {"bound": bound, "ok": bound is None or figure <= bound}
        if goal is not None:
            row |= {"goal": goal, "met": figure <= goal}
        if beside is not None:
            row["beside"] = dict(beside)
        self.rows.append(row)
        verdict = "" if bound is None else f"  (at most {bound:g}: {'ok' if row['ok'] else 'OVER'})"
        if goal is not None:
            verdict += f"  (goal {goal:g}: {'met' if row['met'] else 'MISSED'})"
        if beside is not None:
            verdict += "  " + ", ".join(f"{name} {span:.4g}" for name, span in beside.items())
        label = what if self._binding is None else f"{self._binding}: {what}"
        print(f"{label:<72} {figure:>10.4g} {unit}{verdict}", file=sys.stderr, flush=True)


class Serves(Protocol):
    """A server of the API, here or in another process."""

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str: ...


def daemon_environment(server: Serves, binding: str) -> dict[str, str]:
    # As where it was installed, its modules are compiled but once.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return environ | {
        "TINKER_BASE_URL": server.base_url,
        "TINKER_API_KEY": server.api_key,
        "TINKERFS_FUSE_BINDING": binding,
    }


@contextmanager
def mounted(server: Serves, binding: str, cache: Path, *options: str) -> Iterator[Path]:
    environ = daemon_environment(server, binding)
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as folder:
        command = [*TINKERFS, "mount", folder, "--cache-dir", str(cache), *options]
        # Without a time-out, which it has itself: with one, Python looks every 50 ms.
        subprocess.run(command, env=environ, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*TINKERFS, "umount", "--force", folder], check=True, timeout=60)


def told(script: str, folder: Path) -> str:
    """Return what a script says on its standard error; empty where it succeeds in silence."""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=300,
        start_new_session=True,
        check=False,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    return done.stderr or ("" if done.returncode == 0 else f"exit code {done.returncode}")


def shell(script: str, folder: Path) -> None:
    """Run a script that may fail; what it says is not wanted."""
    told(script, folder)


def succeeds(script: str, folder: Path) -> bool:
    return not told(script, folder)


def calls(server: DemoServer, script: str, folder: Path) -> int:
    server.journal.wait_until_idle()
    server.journal.clear()
    shell(script, folder)
    server.journal.wait_until_idle()
    return server.journal.count()


def daemon_of(folder: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--foreground" in command and os.fsencode(folder) in command:
                return int(entry.name)
    raise LookupError(folder)


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise LookupError(pid)


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)


def seconds_to_leave(process: "subprocess.Popen[bytes]") -> float:
    """Press Ctrl-C and wait."""
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    return time.perf_counter() - began


def timed(work: Callable[[], None]) -> float:
    """Return the median of several runs, seconds."""
    spans = []
    for _ in range(RUNS_OF_A_TIMED_THING):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return statistics.median(spans)
