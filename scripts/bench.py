"""Counts of API calls, waits and memory of real mounts on the embedded server.

Counts are compared with bounds and fail the run; times are medians, printed and never judged.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinkerfs.demo.server import DemoServer

TINKERFS = (sys.executable, "-m", "tinkerfs")
BINDINGS = ("fusepy", "mfusepy2", "mfusepy3")
RUNS_OF_A_TIMED_THING = 5


class Bench:
    """The rows so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, figure: float, unit: str, bound: float | None = None) -> None:
        row = {"what": what, "figure": figure, "unit": unit, "bound": bound}
        row["ok"] = bound is None or figure <= bound
        self.rows.append(row)
        verdict = "" if bound is None else f"  (at most {bound:g}: {'ok' if row['ok'] else 'OVER'})"
        print(f"{what:<72} {figure:>10.4g} {unit}{verdict}", file=sys.stderr, flush=True)


@contextmanager
def mounted(server: DemoServer, binding: str, cache: Path, *options: str) -> Iterator[Path]:
    environ = os.environ | {
        "TINKER_BASE_URL": server.base_url,
        "TINKER_API_KEY": server.api_key,
        "TINKERFS_FUSE_BINDING": binding,
    }
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as folder:
        command = [*TINKERFS, "mount", folder, "--cache-dir", str(cache), *options]
        subprocess.run(command, env=environ, check=True, timeout=60)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*TINKERFS, "umount", "--force", folder], check=True, timeout=60)


def shell(script: str, folder: Path) -> None:
    """Run a script that may fail; what it prints is not wanted."""
    subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=300,
        start_new_session=True,
        check=False,
    )


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


def count_calls(bench: Bench, binding: str, cache: Path) -> None:
    """Count the calls of common commands; the look at the key while mounting is not counted."""

    def count(what: str, script: str, bound: int) -> None:
        bench.add(f"{binding}: {what}", calls(server, script, folder), "calls", bound)

    def of_these(what: str, endpoint: str, bound: int) -> None:
        found = server.journal.count(endpoint)
        bench.add(f"{binding}: ... of these {what}", found, "calls", bound)

    with DemoServer(runs=1000, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        count("ls /runs, 1,000 runs", "ls runs", 10)
        count("the same, warm", "ls runs", 0)
    walk = "ls -lR runs"
    with DemoServer(runs=100, checkpoints=10) as server:
        with mounted(server, binding, cache, "--ttl", "600") as folder:
            count("ls -lR /runs, 100 runs x 10", walk, 1101)
            of_these("weights info", "POST weights_info", 1000)
            count("the same, warm", walk, 0)
            count("grep -r lora_rank /runs, warm", "grep -r lora_rank runs", 0)
            count("rm -r of one", 'set -- runs/*/checkpoints/weights/*; rm -r "$1"', 2)
            of_these("deletes", "DELETE checkpoint", 1)
        with mounted(server, binding, cache) as folder:
            count("ls -lR in the second mount", walk, 101)
            of_these("weights info", "POST weights_info", 0)
    with (
        DemoServer(runs=3, checkpoints=20, seed=3) as server,
        mounted(server, binding, cache) as folder,
    ):
        count("cat */info.json, 3 runs x 20", "cat runs/*/checkpoints/*/*/info.json", 64)
    with DemoServer(runs=300, latency_s=0.2) as server, mounted(server, binding, cache) as folder:
        readers = "for i in $(seq 16); do ls runs & done; wait"
        count("16 readers of one cold listing, 3 pages", readers, 3)


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)


def seconds_to_leave(process: "subprocess.Popen[bytes]") -> float:
    """Press Ctrl-C and wait."""
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGINT)
    process.wait(30)
    return time.perf_counter() - began


COLD_WAITS = (
    ("ls of a cold run", "ls runs/{run}/checkpoints", "GET training_runs/{run}/checkpoints"),
    ("stat of a new name", "stat runs/nobody", "GET training_runs/{run}"),
    ("cold ls /runs", "ls runs", "GET training_runs"),
    ("cat of a cold info.json", "cat runs/{run}/latest/info.json", "POST weights_info"),
)


def measure_waits(bench: Bench, binding: str, cache: Path) -> None:
    with DemoServer(runs=80, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        shell("ls -R runs", folder)
        alone = timed(lambda: shell("ls -l runs", folder))
        urls = sorted(folder.glob("runs/*/checkpoints/*/*/archive_url"))[:64]
        rule = server.faults.add("GET archive", hang=True, times=None)
        readers = [start(["cat", str(url)], folder) for url in urls]
        rule.wait_for(len(urls))
        waiting = timed(lambda: shell("ls -l runs", folder))
        bench.add(f"{binding}: ls -l /runs, alone", alone, "s")
        bench.add(f"{binding}: the same while {len(urls)} reads hang", waiting, "s")
        left = statistics.median(seconds_to_leave(reader) for reader in readers)
        bench.add(f"{binding}: Ctrl-C of cat archive_url, median of {len(urls)}", left, "s")
        rule.release()
    for what, script, endpoint in COLD_WAITS:
        with (
            tempfile.TemporaryDirectory() as cold,
            DemoServer(runs=3, checkpoints=3) as server,
            mounted(server, binding, Path(cold)) as folder,
        ):
            rule = server.faults.add(endpoint, hang=True, times=None)
            reader = start(shlex.split(script.format(run=server.account.run_ids[0])), folder)
            rule.wait_for(1)
            bench.add(f"{binding}: Ctrl-C of {what}", seconds_to_leave(reader), "s")
            rule.release()


def timed(work: Callable[[], None]) -> float:
    """Return the median of several runs, seconds."""
    spans = []
    for _ in range(RUNS_OF_A_TIMED_THING):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return statistics.median(spans)


def measure_mounting(bench: Bench, binding: str, cache: Path) -> None:
    spans = []
    with DemoServer() as server:
        for _ in range(RUNS_OF_A_TIMED_THING):
            began = time.perf_counter()
            with mounted(server, binding, cache):
                spans.append(time.perf_counter() - began)
    bench.add(f"{binding}: until the mount answers, median", statistics.median(spans), "s")


def measure_memory(bench: Bench, cache: Path, runs: int, checkpoints: int) -> None:
    listed = f"{runs * checkpoints:,} checkpoints over {runs:,} runs"
    with (
        DemoServer(runs=runs, checkpoints=checkpoints) as server,
        mounted(server, "auto", cache, "--ttl", "3600") as folder,
    ):
        began = time.perf_counter()
        shell("ls -R runs", folder)
        bench.add(f"ls -R of {listed}, cold", time.perf_counter() - began, "s")
        bench.add(f"resident memory with {listed}", resident_mb(daemon_of(folder)), "MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binding", choices=BINDINGS, action="append", help="default: all three")
    parser.add_argument("--short", action="store_true", help="counts only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench()
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as folder:
        for binding in options.binding or BINDINGS:
            cache = Path(folder) / binding
            count_calls(bench, binding, cache)
            if not options.short:
                measure_waits(bench, binding, cache)
                measure_mounting(bench, binding, cache)
        if not options.short:
            measure_memory(bench, Path(folder) / "memory", 100, 10)
            measure_memory(bench, Path(folder) / "memory", 1000, 100)
    if options.json:
        print(json.dumps(bench.rows, indent=2))
    return 0 if all(row["ok"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
