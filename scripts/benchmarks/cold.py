"""First listings and walks with a distant server, and the delays of commands."""

import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.benchmarks.comparison import Side, on_one_cpu
from scripts.benchmarks.harness import TINKERFS, Bench, daemon_of, mounted, shell, timed
from scripts.benchmarks.server import Server

LATENCY_S = 0.05
RUNS = 2000
#: Number of runs in one response of the API.
PAGE_SIZE = 100
#: Number of concurrent requests, the default of `--concurrency`.
CONCURRENCY = 8
ROUNDS = 3
WALKED_RUNS, CHECKPOINTS = 100, 10
MOUNT_READY_S, HELP_S, STATUS_S = 0.5, 0.1, 0.2


def measure_cold(bench: Bench, binding: str) -> None:
    """Measure a listing and a walk with an empty cache, and a second walk."""
    with Server(runs=RUNS, checkpoints=1, latency_s=LATENCY_S) as server:
        results = [measure_first(server, binding, "ls runs") for _ in range(ROUNDS)]
        what = f"ls of {RUNS:,} runs, cold, {LATENCY_S * 1000:.0f} ms"
        goal = 3 * LATENCY_S + RUNS / PAGE_SIZE * LATENCY_S / CONCURRENCY
        spans, counts = zip(*results, strict=True)
        bench.add(what, statistics.median(spans), "s", goal=goal)
        bench.add("... its calls", max(counts), "calls", math.ceil(RUNS / PAGE_SIZE))
    with Server(runs=WALKED_RUNS, checkpoints=CHECKPOINTS, latency_s=LATENCY_S) as server:
        walk = "ls -lR runs"
        what = f"{walk[:6]} of {WALKED_RUNS} runs x {CHECKPOINTS}, {LATENCY_S * 1000:.0f} ms"
        with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
            for which in ("cold", "in the second mount"):
                took_s, made = measure_once(server, binding, Path(cache), walk)
                goal = made / CONCURRENCY * LATENCY_S + 1
                bench.add(f"{what}, {which}", took_s, "s", goal=goal)
                bench.add("... its calls", made, "calls")


def measure_first(server: Server, binding: str, script: str) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
        return measure_once(server, binding, Path(cache), script)


def measure_once(server: Server, binding: str, cache: Path, script: str) -> tuple[float, int]:
    """Run a script right after mounting; return its seconds and API requests."""
    with (
        mounted(server, binding, cache) as directory,
        on_one_cpu([Side("mount", directory, daemon_of(directory))]),
    ):
        server.ask("clear")
        started = time.perf_counter()
        shell(script, directory)
        return time.perf_counter() - started, server.ask("counts")["api"]


def measure_commands(bench: Bench, bindings: Sequence[str], cache: Path) -> None:
    """Measure the delays of interactive commands."""
    with Server() as server:
        for binding in bindings:
            spans = []
            for _ in range(5):
                began = time.perf_counter()
                with mounted(server, binding, cache):
                    spans.append(time.perf_counter() - began)
            middle = statistics.median(spans)
            with bench.under(binding):
                bench.add("mount until ready", middle, "s", goal=MOUNT_READY_S)
        with mounted(server, "auto", cache) as directory:
            span = timed(running("--help"))
            bench.add("tinkerfs --help", span, "s", goal=HELP_S)
            span = timed(running("status", str(directory)))
            bench.add("tinkerfs status", span, "s", goal=STATUS_S)


def running(*arguments: str) -> Callable[[], None]:
    def work() -> None:
        # No timeout, because with one Python polls every 50 ms.
        subprocess.run([*TINKERFS, *arguments], stdout=subprocess.DEVNULL, check=True)

    return work
