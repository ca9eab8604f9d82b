"""Reading 1 GB of weights that are kept already, beside bindfs over the same bytes.

All lies on tmpfs, tinkerfs's cache too, so that no disk takes part. The kernel is made to forget
what it has of the file before each run: what is measured is what comes through the file system.
"""

import os
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench_harness import Bench, daemon_of, mounted
from bench_server import Server
from bench_sides import TMPFS, Side, add_ratio, bindfs, compare, on_one_cpu, tmpfs

GB = 1_000_000_000
RANDOM_READS = 4000
STEP_BYTES = 1 << 20
#: Of throughput 0.6 and 0.5 of bindfs's.
SEQUENTIAL_GOAL, RANDOM_GOAL = 1 / 0.6, 1 / 0.5


def measure_reads(bench: Bench, bindings: Sequence[str]) -> None:
    free = shutil.disk_usage(TMPFS).free
    if free < 3 * GB:
        raise SystemExit(f"the part `reads` takes 3 GB in {TMPFS}; there are {free / GB:.1f}")
    with (
        Server(runs=1, checkpoints=1, size_bytes=GB) as server,
        tmpfs() as folder,
    ):
        cache, name = folder / "cache", "weights.safetensors"
        local = folder / "local"
        local.mkdir()
        with mounted(server, "auto", cache) as mount:
            shutil.copyfile(weights(mount), local / name)
        with bindfs(local) as bound:
            others = [Side("bindfs", bound.root / name, bound.pid), Side("tmpfs", local / name)]
            for binding in bindings:
                with bench.under(binding), mounted(server, binding, cache) as mount:
                    sides = [Side("mount", weights(mount), daemon_of(mount)), *others]
                    add = partial(add_ratio, bench)
                    medians = compare(sides, read_all, before=forget)
                    add("sequential read of 1 GB that is kept", medians, SEQUENTIAL_GOAL)
                    with on_one_cpu(sides):
                        medians = compare(sides, read_at_random, before=forget)
                    add(f"{RANDOM_READS:,} random reads of 4 KiB", medians, RANDOM_GOAL)


def weights(mount: Path) -> Path:
    (found,) = mount.glob("runs/*/checkpoints/*/*/files/*.safetensors")
    return found


def forget(path: Path) -> None:
    """Make the kernel drop what it has of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_all(path: Path) -> None:
    buffer = bytearray(STEP_BYTES)
    with open(path, "rb", buffering=0) as file:
        read_bytes = 0
        while got := file.readinto(buffer):
            read_bytes += got
    assert read_bytes == path.stat().st_size


def read_at_random(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    places = random.Random(0).sample(range(os.fstat(fd).st_size // 4096), RANDOM_READS)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for place in places:
        assert len(os.pread(fd, 4096, place * 4096)) == 4096
    os.close(fd)
