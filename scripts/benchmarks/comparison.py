"""Comparison of a mount with tmpfs, bindfs and a null filesystem.

The result of each side is the median of several runs. The runs of the sides alternate. Each run
starts after the kernel's cached entries and attributes of that side have expired.
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

from scripts.benchmarks.harness import Bench

TMPFS = Path("/dev/shm")
#: The kernel caches entries and attributes of every side for 1 s; with a margin for its clock.
KERNEL_EXPIRY_S = 1.05
ROUNDS = 5
#: Work that takes longer than this in two rounds gets no third round, seconds.
MAX_TWO_ROUNDS_S = 20.0

Work = Callable[[Path], object]


class Side:
    """One side of a comparison: a directory, and the pid of its daemon if it has one."""

    def __init__(self, name: str, root: Path, pid: int | None = None) -> None:
        self.name, self.root, self.pid = name, root, pid
        self._last_used_s = 0.0

    def time(self, work: Work, before: Work | None = None) -> float:
        """Return the time of some work, seconds, after the kernel's caches have expired."""
        time.sleep(max(0.0, self._last_used_s + KERNEL_EXPIRY_S - time.monotonic()))
        if before is not None:
            before(self.root)
        began = time.perf_counter()
        work(self.root)
        took_s = time.perf_counter() - began
        self._last_used_s = time.monotonic()
        return took_s


def compare(
    sides: Sequence[Side], work: Work, rounds: int = ROUNDS, before: Work | None = None
) -> dict[str, float]:
    """Return the median time of each side over alternating runs.

    Args:
        sides: The mount, bindfs, and sides for information.
        work: The function to time, called with the directory of a side.
        rounds: Number of runs; if it is less than ROUNDS, the sides for information run once.
        before: Called before each run, not timed.
    """
    spans: dict[str, list[float]] = {side.name: [] for side in sides}
    began = time.monotonic()
    for number in range(rounds):
        if number == 2 and time.monotonic() - began > MAX_TWO_ROUNDS_S:
            break
        for side in sides if number == 0 or rounds == ROUNDS else sides[:2]:
            spans[side.name].append(side.time(work, before))
    return {name: statistics.median(each) for name, each in spans.items()}


@contextmanager
def on_one_cpu(sides: Sequence[Side]) -> Iterator[None]:
    """Run this process and the daemons on one CPU inside the block.

    Client and daemon alternate anyway. On two CPUs, each switch waits for the other CPU to wake
    up, which makes the times on a virtual machine vary by a factor of ten.
    """
    all_cpus = os.sched_getaffinity(0)
    set_affinity(sides, {max(all_cpus)})
    try:
        yield
    finally:
        set_affinity(sides, all_cpus)


def set_affinity(sides: Sequence[Side], cpus: set[int]) -> None:
    """Restrict this process and the daemons to some CPUs."""
    os.sched_setaffinity(0, cpus)
    for side in sides:
        for thread in os.listdir(f"/proc/{side.pid}/task") if side.pid else ():
            # The thread may have exited since it was listed.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)


def add_ratio(bench: Bench, what: str, medians: dict[str, float], goal: float) -> None:
    """Add a row with the ratio of the mount's time to that of bindfs."""
    ratio = medians["mount"] / medians["bindfs"]
    bench.add(what, ratio, "x", goal=goal, details=medians)


@contextmanager
def tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-", dir=TMPFS) as directory:
        yield Path(directory)


def copy_shape(source: Path, target: Path, depth: int) -> None:
    """Copy names, kinds, sizes, links and times of a tree down to `depth` levels.

    No file is read: the copies contain spaces.
    """
    target.mkdir(exist_ok=True)
    with os.scandir(source) as entries:
        for entry in entries:
            copy, status = target / entry.name, entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                copy.symlink_to(os.readlink(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                copy.mkdir()
                if depth > 1:
                    copy_shape(Path(entry.path), copy, depth - 1)
            else:
                copy.write_bytes(b" " * status.st_size)
                copy.chmod(status.st_mode & 0o777)
            os.utime(copy, ns=(status.st_mtime_ns,) * 2, follow_symlinks=False)


@contextmanager
def bindfs(source: Path) -> Iterator[Side]:
    """Mount bindfs over a tree, with its default options."""
    with served("bindfs", ["bindfs", "-f", "--no-allow-other"], source) as side:
        yield side


@contextmanager
def null(source: Path, binding: str) -> Iterator[Side]:
    """Mount a null filesystem with a copy of a tree, through a binding."""
    command = [sys.executable, "-m", "scripts.benchmarks.null_filesystem"]
    environ = {"TINKERFS_FUSE_BINDING": binding}
    with served("null", command, source, **environ) as side:
        yield side


@contextmanager
def served(name: str, command: list[str], source: Path, **environ: str) -> Iterator[Side]:
    """Run a program that serves a tree on a temporary directory; unmount at the end."""
    with tempfile.TemporaryDirectory(prefix=f"tinkerfs-bench-{name}-") as directory:
        process = subprocess.Popen(
            [*command, source, directory],
            env=os.environ | environ,
            stderr=subprocess.DEVNULL,  # libfuse 3.14 warns about one of its own defaults
        )
        try:
            while not os.path.ismount(directory):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                time.sleep(0.05)
            yield Side(name, Path(directory), process.pid)
        finally:
            unmount(directory)
            process.wait(30)


def unmount(directory: str) -> None:
    program = shutil.which("fusermount3") or "fusermount"
    subprocess.run([program, "-u", directory], check=True, timeout=30)
