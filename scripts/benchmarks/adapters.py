"""Reading 1 GB of an adapter in `/adapters`, compared with the same bytes in `files/`."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.benchmarks.comparison import tmpfs
from scripts.benchmarks.downloaders import GB, members, touch_memory
from scripts.benchmarks.harness import Bench, daemon_of, mounted
from scripts.benchmarks.server import Server
from scripts.benchmarks.throughput import drop_page_cache, read_all

#: Base models, and what their adapters need.
FAMILIES = {"Qwen/Qwen3.6-27B": "renamed", "openai/gpt-oss-20b": "split and repeated"}
ROUNDS = 9
#: Goal for the time per byte, and for the CPU time of the daemon.
GOAL = 1.05


@dataclass(frozen=True)
class Run:
    """The time and the CPU time of the daemon to read a file, seconds per GB."""

    time_s: float
    cpu_s: float


def measure_adapters(bench: Bench, binding: str) -> None:
    """Add rows with the ratios of the adapter to the files, with warm and with empty caches."""
    for base_model, fate in FAMILIES.items():
        with Server(runs=1, checkpoints=2, size_bytes=GB) as server, tmpfs() as directory:
            server.ask("base_model", base_model)
            with mounted(server, binding, directory / "warm") as mount:
                sides = sides_of(mount, server)
                for path in sides.values():
                    read_all(path)
                pid = daemon_of(mount)
                runs = alternate({name: partial(run, path, pid) for name, path in sides.items()})
            add(bench, f"1 GB of an adapter ({fate}) / of its file, cached", runs)
            runs = alternate(
                {name: partial(cold_run, server, binding, directory, name) for name in sides}
            )
            add(bench, "... not cached", runs)


def sides_of(mount: Path, server: Server) -> dict[str, Path]:
    """Return the file of a checkpoint, in the form of the server and of serving engines."""
    file = members(mount, server)[0]
    name = file.parts[-3]
    adapter = mount / f"adapters/{server.run_id}@sampler_weights@{name}" / file.name
    return {"file": file, "adapter": adapter}


def alternate(sides: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """Return the runs of some sides, which alternate; the first one is discarded."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            measured = sides[name]()
            if number:
                runs[name].append(measured)
    return runs


def add(bench: Bench, what: str, runs: dict[str, list[Run]]) -> None:
    """Add rows with the median of the ratios of each pair of runs."""
    pairs = list(zip(runs["adapter"], runs["file"], strict=True))
    seconds = {
        name: statistics.median(each.time_s for each in found) for name, found in runs.items()
    }
    ratio = statistics.median(adapter.time_s / file.time_s for adapter, file in pairs)
    bench.add(what, ratio, "x", goal=GOAL, details=seconds)
    cpu = {name: statistics.median(each.cpu_s for each in found) for name, found in runs.items()}
    ratio = statistics.median(adapter.cpu_s / file.cpu_s for adapter, file in pairs)
    bench.add("... CPU time of the daemon", ratio, "x", goal=GOAL, details=cpu)


def run(path: Path, pid: int) -> Run:
    """Read a whole file that is not in the page cache of the kernel."""
    drop_page_cache(path)
    cpu_s, started_s = cpu_seconds(pid), time.perf_counter()
    read_all(path)
    took_s = time.perf_counter() - started_s
    scale = path.stat().st_size / GB
    return Run(took_s / scale, (cpu_seconds(pid) - cpu_s) / scale)


def cold_run(server: Server, binding: str, directory: Path, name: str) -> Run:
    """Read a file through a new mount with an empty cache; the archive's index is cached."""
    with empty(directory) as cache, mounted(server, binding, cache) as mount:
        path = sides_of(mount, server)[name]
        path.stat()
        list(path.parent.iterdir())
        touch_memory()
        return run(path, daemon_of(mount))


@contextmanager
def empty(directory: Path) -> Iterator[Path]:
    """Yield a new directory, and delete its files at the end."""
    cache = directory / "cold"
    cache.mkdir(mode=0o700, exist_ok=True)
    try:
        yield cache
    finally:
        for path in sorted(cache.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
