"""What a mount is compared with: the same tree on tmpfs, bindfs over that, a null file system.

Each side's figure is the median of several runs that take turns with the others', and each run
starts when the kernel has forgotten what it may keep for a second of that side.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench_harness import Bench

TMPFS = Path("/dev/shm")
#: Entries and attributes of every side are good for 1 s in the kernel; and a little for its clock.
FORGOTTEN_S = 1.05
ROUNDS = 5
#: What takes longer than this in two rounds is not done a third time, seconds.
LONG_S = 20.0

Work = Callable[[Path], object]


class Side:
    """One of those that are compared: a folder, who serves it, and when it was looked at last."""

    def __init__(self, name: str, root: Path, pid: int | None = None) -> None:
        self.name, self.root, self.pid = name, root, pid
        self._left_s = 0.0

    def time(self, work: Work, before: Work | None = None) -> float:
        """Return how long some work takes here, seconds, once the kernel has forgotten."""
        time.sleep(max(0.0, self._left_s + FORGOTTEN_S - time.monotonic()))
        if before is not None:
            before(self.root)
        began = time.perf_counter()
        work(self.root)
        took_s = time.perf_counter() - began
        self._left_s = time.monotonic()
        return took_s


def compare(
    sides: Sequence[Side], work: Work, rounds: int = ROUNDS, before: Work | None = None
) -> dict[str, float]:
    """Return each side's median over runs that take turns.

    Args:
        sides: the mount, bindfs, and what else is of interest.
        work: what each does in its folder.
        rounds: how often; with fewer than the usual, what is merely of interest does it once.
        before: what is done before each, and not timed.
    """
    spans: dict[str, list[float]] = {side.name: [] for side in sides}
    began = time.monotonic()
    for number in range(rounds):
        if number == 2 and time.monotonic() - began > LONG_S:
            break
        for side in sides if number == 0 or rounds == ROUNDS else sides[:2]:
            spans[side.name].append(side.time(work, before))
    return {name: statistics.median(each) for name, each in spans.items()}


@contextmanager
def on_one_cpu(sides: Sequence[Side]) -> Iterator[None]:
    """Keep who asks and who answers on one CPU meanwhile.

    They take turns anyway. On two, each turn waits for the other CPU to wake up: the same `ls -l`
    of bindfs took from 0.2 to 2.5 s on a virtual machine, and 0.19 to 0.22 s on one CPU.
    """
    every = os.sched_getaffinity(0)
    settle(sides, {max(every)})
    try:
        yield
    finally:
        settle(sides, every)


def settle(sides: Sequence[Side], cpus: set[int]) -> None:
    """Let this process and those that serve run on these CPUs alone."""
    os.sched_setaffinity(0, cpus)
    for side in sides:
        for thread in os.listdir(f"/proc/{side.pid}/task") if side.pid else ():
            # One that has ended meanwhile needs no place.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)


def add_ratio(bench: Bench, what: str, medians: dict[str, float], goal: float) -> None:
    """Add a row of the mount's time over bindfs's."""
    ratio = medians["mount"] / medians["bindfs"]
    bench.add(what, ratio, "x", goal=goal, beside=medians)


@contextmanager
def tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-", dir=TMPFS) as folder:
        yield Path(folder)


def copy_shape(source: Path, target: Path, depth: int) -> None:
    """Make a tree with the names, kinds, sizes, links and times of another, so many levels deep.

    Nothing is read: files hold as many spaces as their size says.
    """
    target.mkdir(exist_ok=True)
    with os.scandir(source) as entries:
        for entry in entries:
            made, found = target / entry.name, entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                made.symlink_to(os.readlink(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                made.mkdir()
                if depth > 1:
                    copy_shape(Path(entry.path), made, depth - 1)
            else:
                made.write_bytes(b" " * found.st_size)
                made.chmod(found.st_mode & 0o777)
            os.utime(made, ns=(found.st_mtime_ns,) * 2, follow_symlinks=False)


@contextmanager
def bindfs(source: Path) -> Iterator[Side]:
    """Mount bindfs over a tree, as it comes."""
    if shutil.which("bindfs") is None:
        sys.exit("scripts/bench compares with bindfs: please install it (apt install bindfs)")
    with served("bindfs", ["bindfs", "-f", "--no-allow-other"], source) as side:
        yield side


@contextmanager
def null(source: Path, binding: str) -> Iterator[Side]:
    """Mount a null file system of the shape of a tree, under a binding."""
    script = Path(__file__).with_name("bench_null.py")
    environ = {"TINKERFS_FUSE_BINDING": binding}
    with served("null", [sys.executable, str(script)], source, **environ) as side:
        yield side


@contextmanager
def served(name: str, command: list[str], source: Path, **environ: str) -> Iterator[Side]:
    """Run a program that serves a tree in another folder until that is unmounted."""
    with tempfile.TemporaryDirectory(prefix=f"tinkerfs-bench-{name}-") as folder:
        process = subprocess.Popen(
            [*command, source, folder],
            env=os.environ | environ,
            stderr=subprocess.DEVNULL,  # libfuse 3.14 warns of a default of its own
        )
        try:
            while not os.path.ismount(folder):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                time.sleep(0.05)
            yield Side(name, Path(folder), process.pid)
        finally:
            unmount(folder)
            process.wait(30)


def unmount(folder: str) -> None:
    program = shutil.which("fusermount3") or "fusermount"
    subprocess.run([program, "-u", folder], check=True, timeout=30)
