"""Reading weights: requests, bytes and speed, compared with curl and aria2c."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from scripts.benchmarks.comparison import TMPFS
from scripts.benchmarks.harness import (
    TINKERFS,
    Bench,
    daemon_environment,
    daemon_of,
    mounted,
    resident_mb,
    timed,
)
from scripts.benchmarks.server import Server
from tinkerfs.cache.data_layout import UNIT_BYTES

GB = 1_000_000_000
#: Upper bound of the other files of a checkpoint, and of the unused ends of blocks.
SLACK_BYTES = 8 << 20
#: Memory for reading 1 GB: the cache, the page cache of the file, and buffers.
TOUCHED_BYTES = 3_500_000_000
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
HAS_ARIA2 = shutil.which("aria2c") is not None
#: Goal for the time of a mount over that of eight curls that store their ranges.
TO_DISK_GOAL = 1.1
#: Half of them are sampler checkpoints.
CHECKPOINTS = 12


@contextmanager
def fresh(server: Server, binding: str, *options: str) -> Iterator[Path]:
    """Mount with an empty cache."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        mounted(server, binding, Path(cache), *options) as directory,
    ):
        yield directory


def members(directory: Path, server: Server) -> list[Path]:
    kind = directory / "runs" / server.run_id / "checkpoints/sampler_weights"
    return [kind / name / "files/adapter_model.safetensors" for name in sorted(os.listdir(kind))]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def touch_memory() -> None:
    """Allocate memory and free it again.

    A virtual machine returns memory that is unused for some seconds to its host. Getting it back
    is slow, and a mount uses twice the memory of a downloader.
    """
    size_bytes = min(TOUCHED_BYTES, shutil.disk_usage(TMPFS).free // 2)
    with tempfile.TemporaryFile(dir=TMPFS) as file:
        for _ in range(size_bytes >> 20):
            file.write(bytes(1 << 20))


def dd(*paths: Path) -> None:
    quiet = subprocess.DEVNULL
    started = [
        subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=1M"], stderr=quiet)
        for path in paths
    ]
    assert not any(process.wait(600) for process in started)


def dd_each(paths: Sequence[Path]) -> None:
    """Read files one after the other."""
    for path in paths:
        dd(path)


def curl(url: str, ranges: int, directory: Path | None = None) -> None:
    """Download ranges over `ranges` connections, into a directory or to /dev/null."""
    step = GB // ranges
    started = []
    for number in range(ranges):
        last = "" if number == ranges - 1 else str((number + 1) * step - 1)
        part = f"{number * step}-{last}"
        target = "/dev/null" if directory is None else str(directory / part)
        started.append(subprocess.Popen(["curl", "-sf", "-r", part, "-o", target, url]))
    assert not any(process.wait(600) for process in started)


def aria2(url: str, connections: int, directory: Path) -> None:
    """Download over `connections` connections into one file in a directory."""
    parallel = [f"--split={connections}", f"--max-connection-per-server={connections}"]
    fast = ["--min-split-size=1M", "--file-allocation=none", "--no-conf", "--quiet"]
    subprocess.run(
        ["aria2c", *parallel, *fast, f"--dir={directory}", "--out=file", url], check=True
    )


def archive_url(server: Server, path: Path) -> str:
    """Request the URL of the archive that contains a file from the API, with curl."""
    checkpoint = "/".join(path.parts[-4:-2])
    endpoint = f"training_runs/{server.run_id}/checkpoints/{checkpoint}/archive"
    command = ["curl", "-sf", "-o", os.devnull, "-w", "%{redirect_url}", "-H", "@-"]
    return subprocess.run(
        [*command, f"{server.base_url}/api/v1/{endpoint}"],
        input=f"X-API-Key: {server.api_key}",
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout


def to_disk(download: Callable[[str, int, Path], None], url: str) -> tuple[float, float]:
    """Return the seconds to download over 8 connections, and to read the result."""
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-download-") as directory:
        download_s = seconds(partial(download, url, 8, Path(directory)))
        return download_s, seconds(partial(dd_each, sorted(Path(directory).iterdir())))


FIRST_BYTES = """
import sys
with open(sys.argv[1], "rb") as file:
    print(len(file.read(8)))
"""
ONE_TENSOR = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "numpy") as file:
    names = sorted(file.keys())
    print(file.get_tensor(names[len(names) // 2]).nbytes)
"""
STRIDED = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
print(sum(len(os.pread(fd, 1 << 20, at)) for at in range(0, size, 16 << 20)))
"""
SCATTERED = """
import os, random, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
blocks = random.Random(0).sample(range(os.fstat(fd).st_size // 4096), 100)
print(sum(len(os.pread(fd, 4096, block * 4096)) for block in blocks))
"""


def script(text: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text, str(path)], check=True, capture_output=True, text=True
    )
    return done.stdout


def measure_weights(bench: Bench, binding: str) -> None:
    partial_reads(bench, binding)
    for latency_s in (0.0, 0.05):
        for limit in (0, 100_000_000):
            whole_files(bench, binding, latency_s, limit)
    warm_reads(bench, binding)


def partial_reads(bench: Bench, binding: str) -> None:
    """Read small parts of a large file, at 50 ms latency."""
    with (
        Server(runs=1, checkpoints=CHECKPOINTS, size_bytes=GB, latency_s=0.05) as server,
        fresh(server, binding) as directory,
    ):
        programs = (
            # The index takes two requests, of a unit and of less.
            ("first 8 bytes of 1 GB, 50 ms", FIRST_BYTES, 3 * UNIT_BYTES / 8, 3),
            ("one tensor of 1 GB, 50 ms", ONE_TENSOR, 1.25, 24),
            ("1 MiB of every 16, 50 ms", STRIDED, 1.5, 75),
            # One in 64 reads begins in one unit and ends in the next one.
            ("100 x 4 KiB at random, cold, 50 ms", SCATTERED, 1.1 * UNIT_BYTES / 4096, 105),
        )
        for path, (what, text, bound, requests) in zip(
            members(directory, server), programs, strict=False
        ):
            server.ask("clear")
            began = time.perf_counter()
            used_bytes = int(script(text, path))
            took_s = time.perf_counter() - began
            cost = server.ask("counts")
            bench.add(what, took_s, "s")
            bench.add("... store requests", cost["store"], "requests", requests)
            bench.add("... used", used_bytes / 1e6, "MB")
            bench.add("... fetched", cost["sent"] / 1e6, "MB")
            bench.add("... fetched over used", cost["sent"] / used_bytes, "x", bound)


def whole_files(bench: Bench, binding: str, latency_s: float, limit: int) -> None:
    """Read 1 GB with an empty cache, alternating with curl and aria2c."""
    speed = f"{limit // 1_000_000} MB/s a connection" if limit else "unlimited"
    name = f"1 GB cold, {latency_s * 1000:.0f} ms, {speed}"
    with Server(
        runs=1, checkpoints=5, size_bytes=GB, latency_s=latency_s, bytes_per_s=limit
    ) as server:
        spans: dict[str, list[float]] = defaultdict(list)
        for _ in range(3):
            with fresh(server, binding) as directory:
                path = members(directory, server)[0]
                server.ask("clear")
                touch_memory()
                daemon = daemon_of(directory)
                before_s = cpu_s(daemon)
                spans["mount"].append(seconds(partial(dd, path)))
                spans["CPU"].append(cpu_s(daemon) - before_s)
                cost = server.ask("counts")
            with fresh(server, binding) as directory:
                command = [*TINKERFS, "prefetch", str(members(directory, server)[0])]
                environ = daemon_environment(server, binding)
                prefetch = partial(subprocess.run, command, env=environ, check=True, **QUIET)
                touch_memory()
                spans["prefetch"].append(seconds(prefetch))
                spans["start"].append(seconds(prefetch))  # the same, of a cached file
            began = time.perf_counter()
            url = archive_url(server, path)
            request_s = time.perf_counter() - began
            spans["curl"].append(request_s + seconds(partial(curl, url, 1)))
            spans["8 curls"].append(request_s + seconds(partial(curl, url, 8)))
            touch_memory()
            download_s, read_s = to_disk(curl, url)
            spans["to disk"].append(request_s + download_s)
            spans["and read"].append(request_s + download_s + read_s)
            if HAS_ARIA2:
                touch_memory()
                download_s, read_s = to_disk(aria2, url)
                spans["aria2c"].append(request_s + download_s + read_s)
        middle = {what: sorted(each)[1] for what, each in spans.items()}
        bench.add(name, GB / 1e6 / middle["mount"], "MB/s")
        bench.add("... its time over that of one curl", middle["mount"] / middle["curl"], "x")
        bench.add("... over that of curl with 8 ranges", middle["mount"] / middle["8 curls"], "x")
        over = middle["mount"] / middle["to disk"]
        bench.add("... the same, writing to disk", over, "x", goal=TO_DISK_GOAL)
        bench.add("... the same, and reading from disk", middle["mount"] / middle["and read"], "x")
        if HAS_ARIA2:
            over = middle["mount"] / middle["aria2c"]
            bench.add("... over that of aria2c and reading its file", over, "x", goal=1.0)
        bench.add("... CPU time of the daemon", middle["CPU"], "s")
        bench.add(
            "... prefetch over curl with 8 ranges, writing to disk",
            middle["prefetch"] / middle["to disk"],
            "x",
            details={"prefetch": middle["prefetch"], "of a cached file": middle["start"]},
        )
        bench.add("... fetched over read", cost["sent"] / GB, "x", 1 + SLACK_BYTES / GB)


def warm_reads(bench: Bench, binding: str) -> None:
    """Read cached weights: in another mount, by many processes, at random."""
    with (
        Server(runs=1, checkpoints=CHECKPOINTS, size_bytes=GB, latency_s=0.0) as server,
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
    ):
        with mounted(server, binding, Path(cache)) as directory:
            paths = members(directory, server)
            server.ask("clear")
            took_s = seconds(lambda: dd(*[paths[0]] * 64))
            cost = server.ask("counts")
            bench.add("64 readers of one 1 GB file, cold", took_s, "s")
            bench.add("... fetched over its size", cost["sent"] / GB, "x", 1 + SLACK_BYTES / GB)
            bench.add("... resident memory", resident_mb(daemon_of(directory)), "MB")
            server.ask("clear")
            took_s = seconds(lambda: dd(*paths[1:5]))
            cost = server.ask("counts")
            bench.add("4 files of 1 GB at once, cold", took_s, "s")
            bound = 1 + SLACK_BYTES / GB
            bench.add("... fetched over their size", cost["sent"] / GB / 4, "x", bound)
            bench.add("... resident memory", resident_mb(daemon_of(directory)), "MB")
        with mounted(server, binding, Path(cache)) as directory:
            path = members(directory, server)[0]
            server.ask("clear")
            took_s = seconds(lambda: dd(path))
            cost = server.ask("counts")
            bench.add("1 GB in the second mount", GB / 1e6 / took_s, "MB/s")
            bench.add("... store requests", cost["store"], "requests", 0)
            bench.add("... fetched", cost["sent"], "bytes", 0)
            bench.add("... calls for an archive", cost["archives"], "calls", 0)
            bench.add("... calls of the API", cost["api"], "calls", 0)
            local = Path(cache) / "local"
            local.write_bytes(path.read_bytes())
            middle = timed(lambda: dd(local))
            bench.add("... its time over that of a local file", took_s / middle, "x")
            bench.add("... and from the page cache", timed(lambda: dd(path)) / middle, "x")
            for what, file in (("mount", path), ("local file", local)):
                bench.add(f"random 4 KiB, {what}", random_read_us(file), "us")


def random_read_us(path: Path, count: int = 2000) -> float:
    """Return the median time of a 4 KiB read outside the page cache, microseconds."""
    blocks = random.Random(0).sample(range(path.stat().st_size // 4096), count)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        spans = [seconds(partial(os.pread, fd, 4096, block * 4096)) for block in blocks]
    finally:
        os.close(fd)
    return sorted(spans)[len(spans) // 2] * 1e6
