"""Large accounts: until the first entry, the whole listing, memory and what is kept on disk."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_harness import Bench, daemon_of, mounted, resident_mb, timed
from bench_server import Server

from tinkerfs.api.parsing import parse_checkpoints

#: Runs and checkpoints of each; the first three are listed by one call each.
SHAPES = (
    (1, 1000),
    (1, 10_000),
    (1, 100_000),
    (100, 10),
    (1000, 10),
    (10_000, 10),
    (100_000, 10),
)
#: A walk through more checkpoints than these takes too long; they are listed in one folder alone.
WALKED_CHECKPOINTS = 100_000
#: Nothing is asked twice while it is measured, and a million checkpoints come in minutes.
OPTIONS = ("--ttl", "3600", "--timeout", "600")

PARSED_RECORDS, PARSING_GOAL_S = 10_000, 0.1


def measure_parsing(bench: Bench) -> None:
    """Measure reading an answer of many checkpoints, beside `json.loads` of the same bytes.

    That keeps no record's own text and reads no time.
    """
    records = [
        {
            "checkpoint_id": f"weights/{number:05}",
            "checkpoint_type": "training",
            "time": "2026-11-23T10:20:30Z",
            "tinker_path": f"tinker://run/weights/{number:05}",
            "size_bytes": number,
            "public": False,
            "expires_at": None,
        }
        for number in range(PARSED_RECORDS)
    ]
    body = json.dumps({"checkpoints": records}).encode()
    ours_s, json_s = timed(lambda: parse_checkpoints(body)), timed(lambda: json.loads(body))
    bench.add(
        f"parsing {PARSED_RECORDS:,} checkpoints",
        ours_s,
        "s",
        goal=PARSING_GOAL_S,
        beside={"tinkerfs": ours_s, "json.loads": json_s},
    )


def measure_scale(bench: Bench, binding: str) -> None:
    """Measure every shape, each on an empty cache and a server of its own."""
    for runs, checkpoints in SHAPES:
        with Server(runs=runs, checkpoints=checkpoints) as server:
            shape = f"{runs * checkpoints:,} checkpoints over {runs:,} run{'s' * (runs > 1)}"
            if runs == 1:
                in_one_run(bench, binding, server, shape)
            else:
                over_many(bench, binding, server, shape, runs * checkpoints <= WALKED_CHECKPOINTS)


def in_one_run(bench: Bench, binding: str, server: Server, shape: str) -> None:
    """Measure a folder with every second checkpoint of a run, and one path in it."""
    place = f"runs/{server.run_id}/checkpoints/weights"
    with cold(binding, server) as (folder, report):
        listed(bench, f"{shape}: its kind's folder", folder / place)
        listed(bench, f"{shape}: the same, warm", folder / place)
        report(bench, shape)
    with cold(binding, server) as (folder, _report):
        began = time.perf_counter()
        (folder / place / "0001/tinker_path").read_bytes()
        bench.add(f"{shape}: a known path, cold", time.perf_counter() - began, "s")


def over_many(bench: Bench, binding: str, server: Server, shape: str, is_walked: bool) -> None:
    """Measure the folder of all runs, then all checkpoints: by a walk, or in one folder."""
    with cold(binding, server) as (folder, report):
        listed(bench, f"{shape}: runs", folder / "runs")
        report(bench, f"{shape}: runs")
        if is_walked:
            began = time.perf_counter()
            script = ["ls", "-R", "runs"]
            subprocess.run(script, cwd=folder, stdout=subprocess.DEVNULL, check=True)
            bench.add(f"{shape}: ls -R runs", time.perf_counter() - began, "s")
            report(bench, f"{shape}: ls -R runs")
        else:
            listed(bench, f"{shape}: checkpoints", folder / "checkpoints")
            report(bench, f"{shape}: checkpoints")
    with cold(binding, server) as (folder, _report):
        began = time.perf_counter()
        (folder / "runs" / server.run_id / "info.json").read_bytes()
        bench.add(f"{shape}: a known path, cold", time.perf_counter() - began, "s")


@contextmanager
def cold(binding: str, server: Server) -> Iterator[tuple[Path, "Report"]]:
    """Mount with an empty cache."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *OPTIONS) as folder,
    ):
        yield folder, Report(daemon_of(folder), Path(cache))


class Report:
    """Tells what a mount takes."""

    def __init__(self, pid: int, cache: Path) -> None:
        self._pid, self._cache = pid, cache

    def __call__(self, bench: Bench, what: str) -> None:
        bench.add(f"{what}: resident memory", resident_mb(self._pid), "MB")
        files = self._cache.glob("metadata.sqlite3*")
        kept_mb = sum(path.stat().st_size for path in files) / 1e6
        bench.add(f"{what}: SQLite", round(kept_mb, 3), "MB")


def listed(bench: Bench, what: str, folder: Path) -> None:
    """List a folder as `ls -f` does: until its first entry, and until its last."""
    began = time.perf_counter()
    with os.scandir(folder) as entries:
        next(entries)
        first_s = time.perf_counter() - began
        count = 1 + sum(1 for _ in entries)
    whole_s = time.perf_counter() - began
    bench.add(f"{what}: until the first entry", first_s, "s")
    bench.add(f"{what}: all {count:,} entries", whole_s, "s")
