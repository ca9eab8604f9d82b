"""Looking at real metadata, warm: each binding beside bindfs, a null file system and tmpfs."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench_harness import Bench, mounted
from bench_server import Server
from bench_sides import Side, add_ratio, bindfs, compare, copy_shape, null, tmpfs

RUNS_OF_A_FLAT_LISTING = 10_000
RUNS_OF_A_DEEP_TREE, CHECKPOINTS_OF_EACH = 1000, 10
#: A walk of the deep tree takes seconds, so that fewer of them are as good.
ROUNDS_OF_A_WALK = 3
LOOKS = 2000
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
            yield Side("bindfs", bound), Side("tmpfs", folder)


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
        yield [Side("mount", folder), local[0], Side("null", nothing), local[1]]


def bash(script: str) -> Callable[[Path], None]:
    """Return work that runs a script in a folder; it must succeed."""

    def work(folder: Path) -> None:
        subprocess.run(
            ["bash", "-c", script], cwd=folder, stdout=subprocess.DEVNULL, check=True, timeout=300
        )

    return work


def measure_flat(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    what = f"ls -l of {RUNS_OF_A_FLAT_LISTING:,} runs"
    with sides_of(binding, server, cache, local) as sides:
        sides[0].time(bash("ls -l runs"))
        medians = compare(sides, bash("ls -l runs"))
        add_ratio(bench, what, medians, 0.35 if libfuse_3 else 1.0)
    with mounted(server, binding, cache, *WARM, "--xattr") as folder:
        mount = Side("mount", folder)
        mount.time(bash("ls -l runs"))
        medians = compare([mount, *local], bash("ls -l runs"))
        add_ratio(bench, f"{what}, --xattr", medians, 1.0)


def measure_deep(
    bench: Bench, binding: str, server: Server, local: tuple[Side, Side], cache: Path
) -> None:
    libfuse_3 = binding.endswith("3")
    shape = f"{RUNS_OF_A_DEEP_TREE:,} runs x {CHECKPOINTS_OF_EACH}"
    with sides_of(binding, server, cache, local) as sides:
        sides[0].time(bash("ls -R runs"))
        add = partial(add_ratio, bench)
        for what, script, goal in (
            (f"ls -lR of {shape}", "ls -lR runs", 0.6 if libfuse_3 else 1.3),
            (f"find -type f in {shape}", "find runs -type f", 2.0),
            (f"du -s of {shape}", "du -s runs", 2.0),
        ):
            add(what, compare(sides, bash(script), ROUNDS_OF_A_WALK), goal)
        source = local[1].root
        infos = sorted(source.glob("runs/*/checkpoints/*/*/info.json"))
        names = [str(path.relative_to(source)) for path in infos]
        random.Random(0).shuffle(names)
        listed = source / "names"
        listed.write_text("\n".join(names))
        for what, options in (
            (f"cat of {len(names):,} info.json", f"-n {len(names)} -s 1800000"),
            ("the same by 8 processes", f"-n {-(-len(names) // 8)} -s 1800000 -P 8"),
        ):
            script = f"xargs -a {listed} {options} cat"
            add(what, compare(sides, bash(script), ROUNDS_OF_A_WALK), 2.0)
        listed.unlink()
        some = names[:LOOKS]
        add(f"stat of {LOOKS:,} paths", compare(sides, partial(stat_each, names=some)), 1.5)
        absent = [f"{names[0].split('/checkpoints')[0]}/nothing"] * LOOKS
        add(
            f"stat of an absent path, {LOOKS:,} times",
            compare(sides, partial(stat_each, names=absent)),
            1.5,
        )


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
