"""Reading 1 GB of cached weights, compared with bindfs over the same bytes.

All files are on tmpfs, including the cache of tinkerfs, so that no disk is involved. Before each
run the page cache of the file is dropped, so that every read reaches the filesystem.
"""

import os
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts.benchmarks.comparison import TMPFS, Side, add_ratio, bindfs, compare, on_one_cpu, tmpfs
from scripts.benchmarks.harness import Bench, daemon_of, mounted
from scripts.benchmarks.server import Server

GB = 1_000_000_000
RANDOM_READS = 4000
STEP_BYTES = 1 << 20
#: Goals for the time: 0.6 and 0.5 of the throughput of bindfs.
SEQUENTIAL_GOAL, RANDOM_GOAL = 1 / 0.6, 1 / 0.5


def measure_reads(bench: Bench, bindings: Sequence[str]) -> None:
    free = shutil.disk_usage(TMPFS).free
    if free < 3 * GB:
        raise SystemExit(
            f"the part `speed` needs 3 GB in {TMPFS}, but only {free / GB:.1f} are free"
        )
    with (
        Server(runs=1, checkpoints=1, size_bytes=GB) as server,
        tmpfs() as directory,
    ):
        cache, name = directory / "cache", "weights.safetensors"
        local = directory / "local"
        local.mkdir()
        with mounted(server, "auto", cache) as mount:
            shutil.copyfile(weights(mount), local / name)
        with bindfs(local) as bound:
            others = [Side("bindfs", bound.root / name, bound.pid), Side("tmpfs", local / name)]
            for binding in bindings:
                with bench.under(binding), mounted(server, binding, cache) as mount:
                    sides = [Side("mount", weights(mount), daemon_of(mount)), *others]
                    add = partial(add_ratio, bench)
                    medians = compare(sides, read_all, before=drop_page_cache)
                    add("sequential read of 1 GB that is cached", medians, SEQUENTIAL_GOAL)
                    with on_one_cpu(sides):
                        medians = compare(sides, read_at_random, before=drop_page_cache)
                    add(f"{RANDOM_READS:,} random reads of 4 KiB", medians, RANDOM_GOAL)


def weights(mount: Path) -> Path:
    (found,) = mount.glob("runs/*/checkpoints/*/*/files/*.safetensors")
    return found


def drop_page_cache(path: Path) -> None:
    """Drop a file from the page cache of the kernel."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_all(path: Path) -> None:
    buffer = bytearray(STEP_BYTES)
    with open(path, "rb", buffering=0) as file:
        read_bytes = 0
        while count := file.readinto(buffer):
            read_bytes += count
    assert read_bytes == path.stat().st_size


def read_at_random(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    blocks = random.Random(0).sample(range(os.fstat(fd).st_size // 4096), RANDOM_READS)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for block in blocks:
        assert len(os.pread(fd, 4096, block * 4096)) == 4096
    os.close(fd)
