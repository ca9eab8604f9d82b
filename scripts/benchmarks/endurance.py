"""Long tests: repeated walks of a large account, and many concurrent processes."""

import time
from pathlib import Path

from scripts.benchmarks.harness import Bench, daemon_of, mounted, resident_mb, shell
from scripts.benchmarks.server import Server
from scripts.benchmarks.soak import soak

RUNS, CHECKPOINTS = 1000, 100
MEMORY_MB = 150.0
#: Walk for this time first, until the caches of the mount, libfuse and malloc are full.
WARM_UP_S = 60
#: Growth that counts as flat, because malloc varies by this much anyway.
GROWTH_MB = 5.0
WALK = "ls -R runs"


def measure_endurance(
    bench: Bench, binding: str, cache: Path, walk_s: float, soak_s: float
) -> None:
    """Measure memory over walks for `walk_s`, and run the soak for `soak_s`, seconds."""
    measure_memory(bench, binding, cache, walk_s)
    soak(bench, binding, soak_s)


def measure_memory(bench: Bench, binding: str, cache: Path, walk_s: float) -> None:
    listed = f"{RUNS * CHECKPOINTS:,} checkpoints over {RUNS:,} runs"
    with (
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        mounted(server, binding, cache, "--ttl", "3600") as directory,
    ):
        daemon = daemon_of(directory)
        began = time.monotonic()
        shell(WALK, directory)
        bench.add(f"{WALK[:5]} of {listed}, cold", time.monotonic() - began, "s")
        bench.add("... resident memory then", resident_mb(daemon), "MB", goal=MEMORY_MB)
        walk(directory, WARM_UP_S)
        first_mb, began = resident_mb(daemon), time.monotonic()
        bench.add(f"... and after {WARM_UP_S} s of walking", first_mb, "MB", goal=MEMORY_MB)
        walks = walk(directory, walk_s)
        what = f"... and growth over {time.monotonic() - began:.0f} s more of it"
        bench.add(what, resident_mb(daemon) - first_mb, "MB", goal=GROWTH_MB)
        bench.add("... walks in that time", walks, "walks")


def walk(directory: Path, walk_s: float) -> int:
    """Walk for `walk_s` seconds, at least once; return the number of walks."""
    began, walks = time.monotonic(), 0
    while not walks or time.monotonic() - began < walk_s:
        shell(WALK, directory)
        walks += 1
    return walks
