"""Cached weights beside the same file of the cache, read directly.

With passthrough (see docs/caching.md) the kernel reads both in the same way. `scripts/debian13`
runs the benchmark with a libfuse that supports it.
"""

import json
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.benchmarks.harness import Bench, mounted
from scripts.benchmarks.server import Server

SIZE_BYTES = 1 << 30
BUFFER_BYTES = 1 << 20
RANDOM_READS = 20_000
READERS = 64
PAIRS = 9
NAME = "adapter_model.safetensors"

#: Goals with passthrough; without it the figures are only shown.
SEQUENTIAL_GOAL, RANDOM_GOAL = 1.1, 1.2


def measure_passthrough(bench: Bench, binding: str) -> None:
    """Measure reads of a file of 1 GiB that is whole in the cache."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        Server(runs=1, checkpoints=1, size_bytes=SIZE_BYTES) as server,
        mounted(server, binding, Path(cache)) as root,
    ):
        directory = next((root / "runs" / server.run_id / "checkpoints/weights").iterdir())
        path = directory / "files" / NAME
        read_all(path)
        while (seen := opens(root)) is not None and not passes_through(root, path, seen):
            time.sleep(0.1)  # the first handle is still open in the kernel
        [stored] = (each for each in Path(cache).glob("blocks/*/1"))
        goals = seen is not None
        requests = reads(root)
        for what, work, goal in (
            ("sequential read of 1 GiB that is cached", read_all, SEQUENTIAL_GOAL),
            ("... by page faults of a mapping", read_mapped, SEQUENTIAL_GOAL),
            (f"... by {READERS} readers, a part each", read_in_parts, SEQUENTIAL_GOAL),
            ("random reads of 4 KiB", read_at_random, RANDOM_GOAL),
        ):
            ratio, medians = compared(work, path, stored)
            label = f"{what}, over the file in the cache"
            bench.add(label, ratio, "x", goal=goal if goals else None, details=medians)
        bound = 0 if goals else None
        bench.add("... block reads of the daemon", reads(root) - requests, "reads", bound)


def opens(root: Path) -> int | None:
    """Return how often a file was handed to the kernel; None without passthrough."""
    stats = json.loads((root / ".tinkerfs/stats.json").read_text())
    if stats["passthrough"] != "on":
        return None
    return int(stats["counters"].get("passthrough_opens", 0))


def passes_through(root: Path, path: Path, seen: int) -> bool:
    with path.open("rb"):
        return opens(root) != seen


def reads(root: Path) -> int:
    """Return how many reads of blocks the daemon has served."""
    counters = json.loads((root / ".tinkerfs/stats.json").read_text())["counters"]
    return int(counters.get("block_cache_hits", 0) + counters.get("block_cache_misses", 0))


def compared(
    work: Callable[[Path], None], path: Path, stored: Path
) -> tuple[float, dict[str, float]]:
    """Return the median of the ratios of pairs in turns, and the median seconds of both."""
    spans = []
    for _ in range(PAIRS):
        pair = []
        for each in (path, stored):
            began = time.perf_counter()
            work(each)
            pair.append(time.perf_counter() - began)
        spans.append(pair)
    ratio = statistics.median(through / direct for through, direct in spans)
    medians = [statistics.median(column) for column in zip(*spans, strict=True)]
    return ratio, dict(zip(("mount", "cache"), medians, strict=True))


def read_all(path: Path) -> None:
    buffer = bytearray(BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_mapped(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for offset in range(0, SIZE_BYTES, BUFFER_BYTES):
            mapped[offset : offset + BUFFER_BYTES]


def read_in_parts(path: Path) -> None:
    length = SIZE_BYTES // READERS

    def read_part(number: int) -> None:
        with path.open("rb", buffering=0) as file:
            for offset in range(number * length, (number + 1) * length, BUFFER_BYTES):
                os.pread(file.fileno(), BUFFER_BYTES, offset)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read_part, range(READERS)))


def read_at_random(path: Path) -> None:
    rng = random.Random(1)
    with path.open("rb", buffering=0) as file:
        for _ in range(RANDOM_READS):
            os.pread(file.fileno(), 4096, rng.randrange(SIZE_BYTES // 4096) * 4096)
