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
import threading
import time
from collections.abc import Iterator
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
        print(f"{what:<72} {figure:>10g} {unit}{verdict}", file=sys.stderr, flush=True)


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
    # The first look at the key, while mounting, is a call of its own and not counted.
    with DemoServer(runs=1000, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        bench.add(f"{binding}: ls /runs, 1,000 runs", calls(server, "ls runs", folder), "calls", 10)
        bench.add(f"{binding}: the same, warm", calls(server, "ls runs", folder), "calls", 0)
    with DemoServer(runs=100, checkpoints=10) as server:
        with mounted(server, binding, cache, "--ttl", "600") as folder:
            walk = "ls -lR runs"
            bench.add(
                f"{binding}: ls -lR /runs, 100 runs x 10", calls(server, walk, folder), "calls", 1101
            )
            infos = server.journal.count("POST weights_info")
            bench.add(f"{binding}: ... of these weights info", infos, "calls", 1000)
            bench.add(f"{binding}: the same, warm", calls(server, walk, folder), "calls", 0)
            grep = "grep -r lora_rank runs"
            bench.add(f"{binding}: grep -r . /runs, warm", calls(server, grep, folder), "calls", 0)
            victim = 'set -- runs/*/checkpoints/weights/*; rm -r "$1"'
            bench.add(f"{binding}: rm -r of one", calls(server, victim, folder), "calls", 2)
            deletes = server.journal.count("DELETE checkpoint")
            bench.add(f"{binding}: ... of these deletes", deletes, "calls", 1)
        with mounted(server, binding, cache) as folder:
            again = calls(server, walk, folder)
            bench.add(f"{binding}: ls -lR in the second mount", again, "calls", 101)
            infos = server.journal.count("POST weights_info")
            bench.add(f"{binding}: ... of these weights info", infos, "calls", 0)
    with DemoServer(runs=3, checkpoints=20, seed=3) as server:
        with mounted(server, binding, cache) as folder:
            jq = "cat runs/*/checkpoints/*/*/info.json"
            bench.add(f"{binding}: cat */info.json, 3 runs x 20", calls(server, jq, folder), "calls", 64)
    with DemoServer(runs=300, checkpoints=2, latency_s=0.2) as server:
        with mounted(server, binding, cache) as folder:
            readers = "for i in $(seq 16); do ls runs & done; wait"
            bench.add(
                f"{binding}: 16 readers of one cold listing, 3 pages",
                calls(server, readers, folder),
                "calls",
                3,
            )


def measure_waits(bench: Bench, binding: str, cache: Path) -> None:
    with DemoServer(runs=80, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        shell("ls -R runs", folder)
        alone = timed(lambda: shell("ls -l runs", folder))
        urls = sorted(folder.glob("runs/*/checkpoints/*/*/archive_url"))[:64]
        rule = server.faults.add("GET archive", hang=True, times=None)
        readers = [
            subprocess.Popen(["cat", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
            for url in urls
        ]  # fmt: skip
        rule.wait_for(len(urls))
        waiting = timed(lambda: shell("ls -l runs", folder))
        bench.add(f"{binding}: ls -l /runs, alone", alone, "s")
        bench.add(f"{binding}: the same while 64 reads hang", waiting, "s")
        left = []
        for reader in readers:
            began = time.perf_counter()
            os.kill(reader.pid, signal.SIGINT)
            reader.wait(30)
            left.append(time.perf_counter() - began)
        bench.add(f"{binding}: Ctrl-C of a waiting cat, median", statistics.median(left), "s")
        rule.release()
    for what, script, endpoint in (
        ("ls of an unlisted run's checkpoints", "ls runs/{run}/checkpoints", "GET training_runs/{run}/checkpoints"),
        ("stat of a new name", "stat runs/nobody", "GET training_runs/{run}"),
        ("cold ls /runs", "ls runs", "GET training_runs"),
        ("cat of a cold info.json", "cat runs/{run}/latest/info.json", "POST weights_info"),
    ):  # fmt: skip
        with DemoServer(runs=3, checkpoints=3) as server:
            with tempfile.TemporaryDirectory() as cold, mounted(server, binding, Path(cold)) as folder:
                run = server.account.run_ids[0]
                rule = server.faults.add(endpoint, hang=True, times=None)
                command = shlex.split(script.format(run=run))
                reader = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
                rule.wait_for(1)
                began = time.perf_counter()
                os.kill(reader.pid, signal.SIGINT)
                reader.wait(30)
                bench.add(f"{binding}: Ctrl-C of {what}", time.perf_counter() - began, "s")
                rule.release()


def timed(work: "object") -> float:
    spans = []
    for _ in range(RUNS_OF_A_TIMED_THING):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        spans.append(time.perf_counter() - began)
    return round(statistics.median(spans), 4)


def measure_mounting(bench: Bench, binding: str, cache: Path) -> None:
    with DemoServer() as server:

        def once() -> None:
            with mounted(server, binding, cache):
                spans.append(time.perf_counter() - began[0])

        spans: list[float] = []
        began = [0.0]
        for _ in range(RUNS_OF_A_TIMED_THING):
            began[0] = time.perf_counter()
            once()
        bench.add(f"{binding}: until the mount answers, median", statistics.median(spans), "s")


def measure_memory(bench: Bench, cache: Path, runs: int, checkpoints: int) -> None:
    total = runs * checkpoints
    with DemoServer(runs=runs, checkpoints=checkpoints) as server:
        with mounted(server, "auto", cache, "--ttl", "3600") as folder:
            began = time.perf_counter()
            shell("ls -R runs", folder)
            bench.add(f"ls -R of {total:,} checkpoints over {runs:,} runs", time.perf_counter() - began, "s")
            bench.add(f"resident memory with {total:,} checkpoints listed", resident_mb(daemon_of(folder)), "MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binding", choices=BINDINGS, action="append", help="default: all three")
    parser.add_argument("--short", action="store_true", help="counts only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bench = Bench()
    threading.stack_size(512 * 1024)
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
