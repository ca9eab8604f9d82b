"""Listings and reads over WebDAV, beside a mount.

The clients are curl, rclone and davfs2, as far as they are installed; davfs2 needs root. What they
read is in the cache of tinkerfs, on tmpfs. davfs2 downloads a file to /var/cache/davfs2 before it
is read, and is mounted again for each read.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from scripts.benchmarks.comparison import tmpfs
from scripts.benchmarks.harness import (
    TIMED_REPETITIONS,
    TINKERFS,
    Bench,
    daemon_environment,
    mounted,
    timed,
)
from scripts.benchmarks.server import Server
from scripts.benchmarks.throughput import GB, drop_page_cache, read_all, weights

RUNS = 1000
#: Some kernels read directories in larger requests than the default of davfs2, KiB. Its cache, MiB,
#: loses at every unmount what was read.
_DAVFS2 = "ask_auth 0\ngui_optimize 0\nbuf_size 2048\ncache_size 1\n"


@contextmanager
def served(server: Server, cache: Path) -> Iterator[str]:
    """Run `tinkerfs serve`, and yield its URL."""
    command = [*TINKERFS, "serve", "--listen", "127.0.0.1:0", "--cache-dir", str(cache)]
    environ = daemon_environment(server, "auto")
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.terminate()


@contextmanager
def davfs2(url: str, directory: Path) -> Iterator[Path]:
    """Mount a URL with davfs2."""
    config, mountpoint = directory / "davfs2.conf", directory / "davfs2"
    config.write_text(_DAVFS2)
    mountpoint.mkdir(exist_ok=True)
    command = ["mount", "-t", "davfs", "-o", f"conf={config}", url, str(mountpoint)]
    subprocess.run(command, input=b"\n", check=True, capture_output=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True, capture_output=True)


@contextmanager
def rclone_mount(url: str, directory: Path) -> Iterator[Path]:
    """Mount a URL with rclone."""
    mountpoint = directory / "rclone"
    mountpoint.mkdir(exist_ok=True)
    command = ["rclone", "mount", ":webdav:", str(mountpoint), "--daemon"]
    subprocess.run(command, env=rclone_environment(url), check=True, capture_output=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["fusermount3", "-u", mountpoint], check=True, capture_output=True)


def rclone_environment(url: str) -> dict[str, str]:
    return os.environ | {"RCLONE_CONFIG": "/dev/null", "RCLONE_WEBDAV_URL": url}


def run(*command: str | Path, environ: dict[str, str] | None = None) -> None:
    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)


def measure_webdav(bench: Bench, binding: str) -> None:
    """Measure a listing of 1,000 runs, and 1 GB from the cache."""
    _measure_listing(bench, binding)
    _measure_read(bench, binding)


def _measure_listing(bench: Bench, binding: str) -> None:
    what = f"ls -l of {RUNS:,} runs, listed before"
    with ExitStack() as stack:
        server = stack.enter_context(Server(runs=RUNS, checkpoints=0))
        directory = stack.enter_context(tmpfs())
        mount = stack.enter_context(mounted(server, binding, directory / "cache"))
        url = stack.enter_context(served(server, directory / "cache"))
        run("ls", "-l", mount / "runs")
        run("curl", "-sf", f"{url}runs/")
        bench.add(what, timed(lambda: run("ls", "-l", mount / "runs")), "s")
        propfind = ("curl", "-sf", "-X", "PROPFIND", "-H", "Depth: 1", f"{url}runs/")
        bench.add("... curl, PROPFIND", timed(lambda: run(*propfind)), "s")
        bench.add("... curl, the page", timed(lambda: run("curl", "-sf", f"{url}runs/")), "s")
        if shutil.which("rclone"):
            environ = rclone_environment(url)
            command = ("rclone", "lsf", "--format", "pt", ":webdav:runs")
            bench.add("... rclone lsf", timed(lambda: run(*command, environ=environ)), "s")
        if _has_davfs2():
            seconds = _timed_davfs2(url, directory, lambda root: run("ls", "-l", root / "runs"))
            bench.add("... davfs2", seconds, "s")


def _measure_read(bench: Bench, binding: str) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(Server(runs=1, checkpoints=1, size_bytes=GB))
        directory = stack.enter_context(tmpfs())
        mount = stack.enter_context(mounted(server, binding, directory / "cache"))
        url = stack.enter_context(served(server, directory / "cache"))
        file = weights(mount)
        read_all(file)  # into the cache
        path = str(file.relative_to(mount))
        target = f"{url}{quote(path)}"

        def read_mount() -> None:
            drop_page_cache(file)
            read_all(file)

        bench.add("read 1 GB that is cached", timed(read_mount), "s")
        bench.add("... curl", timed(lambda: run("curl", "-sf", target)), "s")
        if shutil.which("rclone"):
            environ = rclone_environment(url)
            command = ("rclone", "cat", f":webdav:{path}")
            bench.add("... rclone cat", timed(lambda: run(*command, environ=environ)), "s")
            with rclone_mount(url, directory) as mountpoint:

                def read_rclone() -> None:
                    drop_page_cache(mountpoint / path)
                    read_all(mountpoint / path)

                bench.add("... rclone mount", timed(read_rclone), "s")
        if _has_davfs2():
            seconds = _timed_davfs2(url, directory, lambda root: read_all(root / path))
            bench.add("... davfs2", seconds, "s")


def _timed_davfs2(url: str, directory: Path, work: Callable[[Path], object]) -> float:
    """Return the median time of some work, each time in a new mount with an empty cache."""
    spans = []
    for _ in range(TIMED_REPETITIONS):
        with davfs2(url, directory) as root:
            began = time.perf_counter()
            work(root)
            spans.append(time.perf_counter() - began)
    return statistics.median(spans)


def _has_davfs2() -> bool:
    return os.getuid() == 0 and Path("/sbin/mount.davfs").exists()
