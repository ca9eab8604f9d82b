"""Looking at real metadata, warm: each binding beside bindfs, a null file system and tmpfs."""

import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench_harness import Bench, daemon_of, mounted
from bench_server import Server
from bench_sides import Side, add_ratio, bindfs, compare, copy_shape, null, on_one_cpu, tmpfs

RUNS_OF_A_FLAT_LISTING = 10_000
RUNS_OF_A_DEEP_TREE, CHECKPOINTS_OF_EACH = 1000, 10
#: A walk of the deep tree takes seconds, so that fewer of them are as good.
ROUNDS_OF_A_WALK = 3
LOOKS = 2000
INFO = "checkpoints/*/*/info.json"
#: Room for 10,000 names in one command, within Linux's 2 MiB.
ARGUMENTS_BYTES = 1_800_000
#: Warm: nothing is asked of the server while it is measured.
WARM = ("--ttl", "3600")


def measure_speed(bench: Bench, bindings: Sequence[str], caches: Path) -> None:
    """Measure looking at what is known already."""
    with (
        Server(runs=RUNS_OF_A_FLAT_LISTING, checkpoints=1) as server,
        compared(server, caches / "flat", depth=1) as local,
    ):
        for binding in bindings:
            with bench.under(binding):
                measure_flat(bench, binding, server, local, caches / "flat")
    with (
        Server(runs=RUNS_OF_A_DEEP_TREE, checkpoints=CHECKPOINTS_OF_EACH) as server,
        compared(server, caches / "deep", depth=9) as local,
    ):
        for binding in bindings:
            with bench.under(binding):
                measure_deep(bench, binding, server, local, caches / "deep")


@contextmanager
def compared(server: Server, cache: Path, depth: int) -> Iterator[tuple[Side, Side]]:
    """Copy what a mount shows of the runs, and mount bindfs over it."""
    with tmpfs() as folder, mounted(server, "auto", cache, *WARM) as mount:
        copy_shape(mount / "runs", folder / "runs", depth)
        with bindfs(folder) as bound:
            yield bound, Side("tmpfs", folder)


@contextmanager
def sides_of(
    binding: str, server: Server, cache: Path, local: tuple[Side, Side], *options: str
) -> Iterator[list[Side]]:
    """Mount tinkerfs and the null file system beside those."""
    source = local[1].root
    with (
        mounted(server, binding, cache, *WARM, *options) as folder,
        null(source, binding) as nothing,
    ):
        yield [Side("mount", folder, daemon_of(folder)), local[0], nothing, local[1]]


def bash(script: str) -> Callable[[Path], None]:
    """Return work that runs a script in a folder; it must succeed.

    Waited for without a time-out: with one, Python looks every 50 ms whether a command has ended.
    """

    def work(folder: Path) -> None:
        subprocess.run(["bash", "-c", script], cwd=folder, stdout=subprocess.DEVNULL, check=True)

    return work


def measure_flat(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    what = f"ls -l of {RUNS_OF_A_FLAT_LISTING:,} runs"
    with sides_of(binding, server, cache, local) as sides:
        sides[0].time(bash("ls -l runs"))
        with on_one_cpu(sides):
            medians = compare(sides, bash("ls -l runs"))
        add_ratio(bench, what, medians, 0.35 if libfuse_3 else 1.0)
    with mounted(server, binding, cache, *WARM, "--xattr") as folder:
        sides = [Side("mount", folder, daemon_of(folder)), *local]
        sides[0].time(bash("ls -l runs"))
        with on_one_cpu(sides):
            medians = compare(sides, bash("ls -l runs"))
        add_ratio(bench, f"{what}, --xattr", medians, 1.0)


def measure_deep(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    shape = f"{RUNS_OF_A_DEEP_TREE:,} runs x {CHECKPOINTS_OF_EACH}"
    source = local[1].root
    names = [str(path.relative_to(source)) for path in source.glob(f"runs/*/{INFO}")]
    random.Random(0).shuffle(names)
    absent = f"{names[0].partition('/checkpoints')[0]}/nothing"
    add = partial(add_ratio, bench)
    with sides_of(binding, server, cache, local) as sides, listed(names) as file:
        # The first asks for what it shows, the second makes the listings that are kept.
        for _ in range(2):
            sides[0].time(bash("ls -lR runs"))
        with on_one_cpu(sides):
            for what, script, goal in (
                (f"ls -lR of {shape}", "ls -lR runs", 0.6 if libfuse_3 else 1.3),
                (f"find -type f in {shape}", "find runs -type f", 2.0),
                (f"du -s of {shape}", "du -s runs", 2.0),
            ):
                add(what, compare(sides, bash(script), ROUNDS_OF_A_WALK), goal)
            medians = compare(sides, bash(cat(file, len(names))), ROUNDS_OF_A_WALK)
            add(f"cat of {len(names):,} info.json", medians, 2.0)
            for what, paths in (
                (f"stat of {LOOKS:,} paths", names[:LOOKS]),
                (f"stat of an absent path, {LOOKS:,} times", [absent] * LOOKS),
            ):
                add(what, compare(sides, partial(stat_each, names=paths)), 1.5)
        at_once = bash(cat(file, -(-len(names) // 8), processes=8))
        medians = compare(sides, at_once, ROUNDS_OF_A_WALK)
        add(f"cat of {len(names):,} info.json by 8 processes", medians, 2.0)


@contextmanager
def listed(names: Sequence[str]) -> Iterator[str]:
    """Write names to a file, as xargs reads them."""
    with tempfile.NamedTemporaryFile("w", prefix="tinkerfs-bench-names-") as file:
        file.write("\n".join(names))
        file.flush()
        yield file.name


def cat(file: str, count: int, processes: int = 1) -> str:
    """Return a command that reads what a file names, so many with each `cat`."""
    return f"xargs -a {file} -n {count} -P {processes} -s {ARGUMENTS_BYTES} cat"


def stat_each(folder: Path, names: Sequence[str]) -> None:
    """Look at names one by one.

    Of names that are there each is asked for once, as the kernel keeps what it is told for a
    second; one that is not there is kept by no side, so each look at it comes to the file system.
    """
    paths = [f"{folder}/{name}" for name in names]
    for path in paths:
        try:
            os.lstat(path)
        except FileNotFoundError:
            continue
