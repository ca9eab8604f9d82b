"""Large accounts: time to the first and last entry, memory, disk usage."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchmarks.adapters import cpu_seconds
from scripts.benchmarks.harness import Bench, daemon_of, mounted, resident_mb, shell
from scripts.benchmarks.server import Server

#: Number of runs, and of checkpoints per run; the checkpoints of a run are listed by one request.
SHAPES = (
    (1, 1000),
    (1, 10_000),
    (1, 100_000),
    (100, 10),
    (1000, 10),
    (10_000, 10),
    (100_000, 10),
)
#: Maximum number of checkpoints for a walk; with more, only /checkpoints is listed.
MAX_WALKED_CHECKPOINTS = 100_000
#: Nothing expires during a measurement, and listing a million checkpoints may take minutes.
OPTIONS = ("--ttl", "3600", "--timeout", "600")
#: Every listing has expired when it is read again.
EXPIRING = ("--ttl", "0.1", "--timeout", "600")
#: Maximum resident memory with a million checkpoints, old and new listing included.
MAX_MEMORY_MB = 500.0
#: Desired time to the first entry of a long listing.
FIRST_ENTRY_GOAL_S = 0.3


def measure_scale(bench: Bench, binding: str) -> None:
    """Measure every shape with an empty cache and a new server."""
    for runs, checkpoints in SHAPES:
        with Server(runs=runs, checkpoints=checkpoints) as server:
            shape = f"{runs * checkpoints:,} checkpoints over {runs:,} run{'s' * (runs > 1)}"
            if runs == 1:
                measure_one_run(bench, binding, server, shape)
            else:
                measure_many_runs(
                    bench, binding, server, shape, runs * checkpoints <= MAX_WALKED_CHECKPOINTS
                )


def measure_one_run(bench: Bench, binding: str, server: Server, shape: str) -> None:
    """Measure a directory with half of the checkpoints of a run, and one path in it."""
    path = f"runs/{server.run_id}/checkpoints/weights"
    with cold(binding, server) as (directory, report):
        measure_listing(bench, f"{shape}: one kind", directory / path)
        measure_listing(bench, f"{shape}: the same, warm", directory / path)
        report(bench, shape)
    with cold(binding, server) as (directory, _report):
        began = time.perf_counter()
        (directory / path / "0001/tinker_path").read_bytes()
        bench.add(f"{shape}: a known path, cold", time.perf_counter() - began, "s")


def measure_many_runs(
    bench: Bench, binding: str, server: Server, shape: str, is_walked: bool
) -> None:
    """Measure listing all runs, then all checkpoints by a walk or in one directory."""
    with cold(binding, server) as (directory, report):
        measure_listing(bench, f"{shape}: runs", directory / "runs")
        report(bench, f"{shape}: runs")
        if is_walked:
            began = time.perf_counter()
            script = ["ls", "-R", "runs"]
            subprocess.run(script, cwd=directory, stdout=subprocess.DEVNULL, check=True)
            bench.add(f"{shape}: ls -R runs", time.perf_counter() - began, "s")
            report(bench, f"{shape}: ls -R runs")
    if not is_walked:
        measure_all_checkpoints(bench, binding, server, f"{shape}: checkpoints")
    with cold(binding, server) as (directory, _report):
        began = time.perf_counter()
        (directory / "runs" / server.run_id / "info.json").read_bytes()
        bench.add(f"{shape}: a known path, cold", time.perf_counter() - began, "s")


def measure_all_checkpoints(bench: Bench, binding: str, server: Server, shape: str) -> None:
    """Measure one directory with all checkpoints: its listings, one path, and its refresh."""
    with cold(binding, server) as (directory, report):
        pid, checkpoints = daemon_of(directory), directory / "checkpoints"
        measure_listing(bench, shape, checkpoints, FIRST_ENTRY_GOAL_S)
        bench.add(f"{shape}: CPU time of the daemon", cpu_seconds(pid), "s")
        report(bench, shape, MAX_MEMORY_MB)
        measure_listing(bench, f"{shape}, cached", checkpoints, FIRST_ENTRY_GOAL_S)
        with os.scandir(checkpoints) as entries:
            name = next(entries).name
        began = time.perf_counter()
        (checkpoints / name).lstat()
        bench.add(f"{shape}: lstat of one path", time.perf_counter() - began, "s")
        for command in ("ls -l checkpoints | tail -1", "ls -t checkpoints | tail -1"):
            began = time.perf_counter()
            shell(command, directory)
            bench.add(f"{shape}: {command}", time.perf_counter() - began, "s")
        report(bench, f"{shape}: after ls -l", MAX_MEMORY_MB)
    with cold(binding, server, EXPIRING) as (directory, report):
        measure_listing(bench, f"{shape}, expiring", directory / "checkpoints")
        measure_listing(bench, f"{shape}, expired", directory / "checkpoints")
        wait_until_idle(daemon_of(directory))
        report(bench, f"{shape}: after a refresh", MAX_MEMORY_MB)


def wait_until_idle(pid: int) -> None:
    """Wait until a process hardly uses the CPU."""
    used_s = cpu_seconds(pid)
    while True:
        time.sleep(5)
        before_s, used_s = used_s, cpu_seconds(pid)
        if used_s - before_s < 0.1:
            return


@contextmanager
def cold(
    binding: str, server: Server, options: tuple[str, ...] = OPTIONS
) -> Iterator[tuple[Path, "Report"]]:
    """Mount with an empty cache."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *options) as directory,
    ):
        yield directory, Report(daemon_of(directory), Path(cache))


class Report:
    """Adds rows with the memory and disk usage of a mount."""

    def __init__(self, pid: int, cache: Path) -> None:
        self._pid, self._cache = pid, cache

    def __call__(self, bench: Bench, what: str, max_mb: float | None = None) -> None:
        bench.add(f"{what}: resident memory", resident_mb(self._pid), "MB")
        bench.add(f"{what}: largest so far", resident_mb(self._pid, "VmHWM"), "MB", max_mb)
        files = self._cache.glob("metadata.sqlite3*")
        used_mb = sum(path.stat().st_size for path in files) / 1e6
        bench.add(f"{what}: SQLite", round(used_mb, 3), "MB")


def measure_listing(
    bench: Bench, what: str, directory: Path, first_goal_s: float | None = None
) -> None:
    """List a directory as `ls -f`; measure the time to the first and last entry."""
    began = time.perf_counter()
    with os.scandir(directory) as entries:
        next(entries)
        first_s = time.perf_counter() - began
        count = 1 + sum(1 for _ in entries)
    whole_s = time.perf_counter() - began
    bench.add(f"{what}: until the first entry", first_s, "s", goal=first_goal_s)
    bench.add(f"{what}: all {count:,} entries", whole_s, "s")
