"""Shared code of the benchmark: result rows, mounts, request counts, medians."""

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

from tests.support.faulty_server import FaultyServer

TINKERFS = (sys.executable, "-m", "tinkerfs")
BINDINGS = ("fusepy", "mfusepy2", "mfusepy3")
TIMED_REPETITIONS = 5


class Bench:
    """Collects the result rows, and prints each when it is added."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._binding: str | None = None

    @contextmanager
    def under(self, binding: str) -> Iterator[None]:
        """Label the rows that are added inside the block with a binding."""
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
        details: Mapping[str, float] | None = None,
    ) -> None:
        """Add a row, and print it.

        Args:
            what: What was counted or measured.
            figure: The result.
            unit: Unit of the figure, the bound and the goal.
            bound: Maximum figure; if it is exceeded, the benchmark fails.
            goal: Desired maximum figure; if it is exceeded, the row is only marked.
            details: Name -> value of the measurements that the figure is derived from.
        """
        row: dict[str, Any] = {
            "what": what,
            "binding": self._binding,
            "figure": figure,
            "unit": unit,
        }
        row |= {"bound": bound, "ok": bound is None or figure <= bound}
        if goal is not None:
            row |= {"goal": goal, "met": figure <= goal}
        if details is not None:
            row["details"] = dict(details)
        self.rows.append(row)
        verdict = "" if bound is None else f"  (at most {bound:g}: {'ok' if row['ok'] else 'OVER'})"
        if goal is not None:
            verdict += f"  (goal {goal:g}: {'met' if row['met'] else 'MISSED'})"
        if details is not None:
            verdict += "  " + ", ".join(f"{name} {span:.4g}" for name, span in details.items())
        label = what if self._binding is None else f"{self._binding}: {what}"
        print(f"{label:<72} {figure:>10.4g} {unit}{verdict}", file=sys.stderr, flush=True)


class ApiServer(Protocol):
    """A server of the API, in this process or another."""

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str: ...


def daemon_environment(server: ApiServer, binding: str) -> dict[str, str]:
    # Let Python write bytecode caches, as for an installed package.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return environ | {
        "TINKER_BASE_URL": server.base_url,
        "TINKER_API_KEY": server.api_key,
        "TINKERFS_FUSE_BINDING": binding,
    }


@contextmanager
def mounted(server: ApiServer, binding: str, cache: Path, *options: str) -> Iterator[Path]:
    environ = daemon_environment(server, binding)
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as directory:
        command = [*TINKERFS, "mount", directory, "--cache-dir", str(cache), *options]
        # No timeout, because with one Python polls every 50 ms. The command has its own timeout.
        subprocess.run(command, env=environ, check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run([*TINKERFS, "umount", "--force", directory], check=True, timeout=60)


def stderr_of(script: str, directory: Path) -> str:
    """Run a script; return its standard error, or its exit code if that is empty."""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=300,
        start_new_session=True,
        check=False,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    )
    return done.stderr or ("" if done.returncode == 0 else f"exit code {done.returncode}")


def shell(script: str, directory: Path) -> None:
    """Run a script, ignoring its output and exit code."""
    stderr_of(script, directory)


def succeeds(script: str, directory: Path) -> bool:
    return not stderr_of(script, directory)


def calls(server: FaultyServer, script: str, directory: Path) -> int:
    server.journal.wait_until_idle()
    server.journal.clear()
    shell(script, directory)
    server.journal.wait_until_idle()
    return server.journal.count()


def daemon_of(directory: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"--serve" in command and os.fsencode(directory) in command:
                return int(entry.name)
    raise LookupError(directory)


def resident_mb(pid: int, field: str = "VmRSS") -> float:
    """Return the resident memory of a process; the largest so far for `VmHWM`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise LookupError(pid)


def start(command: list[str], directory: Path) -> "subprocess.Popen[bytes]":
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=directory, stdout=quiet, stderr=quiet, start_new_session=True
    )


def seconds_to_leave(process: "subprocess.Popen[bytes]") -> float:
    """Interrupt a process as Ctrl-C does; return the seconds until it exits."""
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    return time.perf_counter() - began


def timed(work: Callable[[], object]) -> float:
    """Return the median time of several runs, seconds."""
    spans = []
    for _ in range(TIMED_REPETITIONS):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return statistics.median(spans)
