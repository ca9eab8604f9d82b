"""Warm metadata operations, compared with bindfs, a null filesystem and tmpfs."""

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from scripts.benchmarks.comparison import (
    Side,
    add_ratio,
    bindfs,
    compare,
    copy_shape,
    null,
    on_one_cpu,
    tmpfs,
)
from scripts.benchmarks.harness import Bench, daemon_of, mounted
from scripts.benchmarks.server import Server

FLAT_RUNS = 10_000
DEEP_RUNS, DEEP_CHECKPOINTS = 1000, 10
#: A walk of the deep tree takes seconds, so fewer rounds suffice.
WALK_ROUNDS = 3
STATS = 2000
INFO = "checkpoints/*/*/info.json"
#: Enough for 10,000 names in one command, below Linux's limit of 2 MiB.
ARGUMENTS_BYTES = 1_800_000
#: Options for warm caches: no request is sent during a measurement.
WARM = ("--ttl", "3600")


def measure_speed(bench: Bench, bindings: Sequence[str], caches: Path) -> None:
    """Measure metadata operations on cached metadata."""
    with (
        Server(runs=FLAT_RUNS, checkpoints=1) as server,
        compared(server, caches / "flat", depth=1) as local,
    ):
        for binding in bindings:
            with bench.under(binding):
                measure_flat(bench, binding, server, local, caches / "flat")
    with (
        Server(runs=DEEP_RUNS, checkpoints=DEEP_CHECKPOINTS) as server,
        compared(server, caches / "deep", depth=9) as local,
    ):
        for binding in bindings:
            with bench.under(binding):
                measure_deep(bench, binding, server, local, caches / "deep")


@contextmanager
def compared(server: Server, cache: Path, depth: int) -> Iterator[tuple[Side, Side]]:
    """Copy the runs of a mount to tmpfs, and mount bindfs over the copy."""
    with tmpfs() as directory, mounted(server, "auto", cache, *WARM) as mount:
        copy_shape(mount / "runs", directory / "runs", depth)
        with bindfs(directory) as bindfs_side:
            yield bindfs_side, Side("tmpfs", directory)


@contextmanager
def sides_of(
    binding: str, server: Server, cache: Path, local: tuple[Side, Side], *options: str
) -> Iterator[list[Side]]:
    """Mount tinkerfs and the null filesystem; yield all four sides."""
    source = local[1].root
    with (
        mounted(server, binding, cache, *WARM, *options) as directory,
        null(source, binding) as nothing,
    ):
        yield [Side("mount", directory, daemon_of(directory)), local[0], nothing, local[1]]


def bash(script: str) -> Callable[[Path], None]:
    """Return work that runs a script in a directory; the script must succeed.

    There is no timeout, because with one Python polls every 50 ms whether the command has exited.
    """

    def work(directory: Path) -> None:
        subprocess.run(["bash", "-c", script], cwd=directory, stdout=subprocess.DEVNULL, check=True)

    return work


def measure_flat(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    what = f"ls -l of {FLAT_RUNS:,} runs"
    with sides_of(binding, server, cache, local) as sides:
        sides[0].time(bash("ls -l runs"))
        with on_one_cpu(sides):
            medians = compare(sides, bash("ls -l runs"))
        add_ratio(bench, what, medians, 0.35 if libfuse_3 else 1.0)
    with mounted(server, binding, cache, *WARM, "--xattr") as directory:
        sides = [Side("mount", directory, daemon_of(directory)), *local]
        sides[0].time(bash("ls -l runs"))
        with on_one_cpu(sides):
            medians = compare(sides, bash("ls -l runs"))
        add_ratio(bench, f"{what}, --xattr", medians, 1.0)


def measure_deep(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    shape = f"{DEEP_RUNS:,} runs x {DEEP_CHECKPOINTS}"
    source = local[1].root
    names = [str(path.relative_to(source)) for path in source.glob(f"runs/*/{INFO}")]
    random.Random(0).shuffle(names)
    absent = f"{names[0].partition('/checkpoints')[0]}/nothing"
    add = partial(add_ratio, bench)
    with sides_of(binding, server, cache, local) as sides, names_file(names) as file:
        # The first walk requests the records, the second one caches the directory listings.
        for _ in range(2):
            sides[0].time(bash("ls -lR runs"))
        with on_one_cpu(sides):
            for what, script, goal in (
                (f"ls -lR of {shape}", "ls -lR runs", 0.6 if libfuse_3 else 1.3),
                (f"find -type f in {shape}", "find runs -type f", 2.0),
                (f"du -s of {shape}", "du -s runs", 2.0),
            ):
                add(what, compare(sides, bash(script), WALK_ROUNDS), goal)
            medians = compare(sides, bash(cat(file, len(names))), WALK_ROUNDS)
            add(f"cat of {len(names):,} info.json", medians, 2.0)
            for what, paths in (
                (f"stat of {STATS:,} paths", names[:STATS]),
                (f"stat of an absent path, {STATS:,} times", [absent] * STATS),
            ):
                add(what, compare(sides, partial(stat_each, names=paths)), 1.5)
        parallel = bash(cat(file, -(-len(names) // 8), processes=8))
        medians = compare(sides, parallel, WALK_ROUNDS)
        add(f"cat of {len(names):,} info.json by 8 processes", medians, 2.0)


@contextmanager
def names_file(names: Sequence[str]) -> Iterator[str]:
    """Write names to a temporary file, in the format of xargs."""
    with tempfile.NamedTemporaryFile("w", prefix="tinkerfs-bench-names-") as file:
        file.write("\n".join(names))
        file.flush()
        yield file.name


def cat(file: str, count: int, processes: int = 1) -> str:
    """Return a command that reads the files listed in `file`, `count` per `cat`."""
    return f"xargs -a {file} -n {count} -P {processes} -s {ARGUMENTS_BYTES} cat"


def stat_each(directory: Path, names: Sequence[str]) -> None:
    """Call lstat() on each name.

    The kernel caches the attributes of an existing name for a second, so each of them occurs once.
    No side lets the kernel cache a missing name, so each lstat() of it reaches the filesystem.
    """
    paths = [f"{directory}/{name}" for name in names]
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
