"""Looking for the first time, at a server far away; and what must answer at once."""

import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_harness import TINKERFS, Bench, daemon_of, mounted, shell, timed
from bench_server import Server
from bench_sides import Side, on_one_cpu

LATENCY_S = 0.05
RUNS = 2000
#: As many runs as the API tells in one answer.
PAGE = 100
#: How many calls go at a time, as `--concurrency` has it.
AT_ONCE = 8
ROUNDS = 3
WALKED_RUNS, CHECKPOINTS = 100, 10
MOUNT_ANSWERS_S, HELP_S, STATUS_S = 0.5, 0.1, 0.2


def measure_cold(bench: Bench, binding: str) -> None:
    """Measure a first listing and a first walk, each with an empty cache, and a walk after it."""
    with Server(runs=RUNS, checkpoints=1, latency_s=LATENCY_S) as server:
        looks = [first_look(server, binding, "ls runs") for _ in range(ROUNDS)]
        what = f"ls of {RUNS:,} runs, cold, {LATENCY_S * 1000:.0f} ms"
        goal = 3 * LATENCY_S + RUNS / PAGE * LATENCY_S / AT_ONCE
        spans, made = zip(*looks, strict=True)
        bench.add(what, statistics.median(spans), "s", goal=goal)
        bench.add("... its calls", max(made), "calls", math.ceil(RUNS / PAGE))
    with Server(runs=WALKED_RUNS, checkpoints=CHECKPOINTS, latency_s=LATENCY_S) as server:
        walk = "ls -lR runs"
        what = f"{walk[:6]} of {WALKED_RUNS} runs x {CHECKPOINTS}, {LATENCY_S * 1000:.0f} ms"
        with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
            for which in ("cold", "in the second mount"):
                took_s, made = look(server, binding, Path(cache), walk)
                goal = made / AT_ONCE * LATENCY_S + 1
                bench.add(f"{what}, {which}", took_s, "s", goal=goal)
                bench.add("... its calls", made, "calls")


def first_look(server: Server, binding: str, script: str) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
        return look(server, binding, Path(cache), script)


def look(server: Server, binding: str, cache: Path, script: str) -> tuple[float, int]:
    """Return how long a look takes just after mounting, seconds, and the calls it makes."""
    with (
        mounted(server, binding, cache) as folder,
        on_one_cpu([Side("mount", folder, daemon_of(folder))]),
    ):
        server.ask("clear")
        began = time.perf_counter()
        shell(script, folder)
        return time.perf_counter() - began, server.ask("counts")["api"]


def measure_commands(bench: Bench, bindings: Sequence[str], cache: Path) -> None:
    """Measure what somebody who types a command waits for."""
    with Server() as server:
        for binding in bindings:
            spans = []
            for _ in range(5):
                began = time.perf_counter()
                with mounted(server, binding, cache):
                    spans.append(time.perf_counter() - began)
            middle = statistics.median(spans)
            with bench.under(binding):
                bench.add("the mount answers", middle, "s", goal=MOUNT_ANSWERS_S)
        with mounted(server, "auto", cache) as folder:
            span = timed(running("--help"))
            bench.add("tinkerfs --help", span, "s", goal=HELP_S)
            span = timed(running("status", str(folder)))
            bench.add("tinkerfs status", span, "s", goal=STATUS_S)


def running(*arguments: str) -> Callable[[], None]:
    def work() -> None:
        # Without a time-out: with one, Python looks every 50 ms whether it has ended.
        subprocess.run([*TINKERFS, *arguments], stdout=subprocess.DEVNULL, check=True)

    return work
