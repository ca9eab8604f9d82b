"""Reading weights through tinkerfs, compared with ratarmount and rclone.

ratarmount gets the signed URL of the archive. rclone mounts an HTML page with links, and shows the
archive but not its members. It gets a page with one link, which redirects to the signed URL. Every
time includes the mount. Programs that are not installed are skipped.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scripts.benchmarks.downloaders import GB, dd, members, random_read_us, script, seconds
from scripts.benchmarks.harness import Bench, daemon_of, mounted, resident_mb
from scripts.benchmarks.server import Server

LATENCY_S = 0.05
BYTES_PER_S = 100_000_000
RANDOM_READS = 200

#: Mounts with a cache directory; yields the file with the weights, and the pid of the daemon.
Mount = Callable[[Server, Path], AbstractContextManager[tuple[Path, int]]]


class NotMounted(Exception):
    """An installed program fails to mount."""


FIRST_BYTES = """
import sys, tarfile
if sys.argv[1].endswith(".tar"):
    with tarfile.open(sys.argv[1]) as archive:
        print(len(archive.extractfile("adapter_model.safetensors").read(8)))
else:
    with open(sys.argv[1], "rb") as file:
        print(len(file.read(8)))
"""


def measure_rivals(bench: Bench, binding: str) -> None:
    installed = [name for name in ("ratarmount", "rclone") if is_installed(name)]
    for latency_s, bytes_per_s, measure in (
        (LATENCY_S, BYTES_PER_S, measure_throttled),
        (0.0, 0, measure_unlimited),
    ):
        with server_of(latency_s, bytes_per_s) as server, links_to(server) as page:
            for name, mount in mounts_of(installed, binding, page).items():
                try:
                    measure(bench, name, mount, server)
                except NotMounted as error:  # e.g. ratarmount without fsspec, which it reports
                    print(f"{error}: not compared", file=sys.stderr)


def mounts_of(installed: list[str], binding: str, page: str) -> dict[str, Mount]:
    mounts: dict[str, Mount] = {"tinkerfs": partial(tinkerfs, binding)}
    if "ratarmount" in installed:
        mounts["ratarmount"] = ratarmount
    if "rclone" in installed:
        mounts["rclone, no cache"] = partial(rclone, "off", page)
        mounts["rclone, full cache"] = partial(rclone, "full", page)
    return mounts


def is_installed(name: str) -> bool:
    path = shutil.which(name)
    if path is None:
        print(f"{name} is not installed: not compared", file=sys.stderr)
    return path is not None


def server_of(latency_s: float, bytes_per_s: int) -> Server:
    return Server(
        runs=1, checkpoints=5, size_bytes=GB, latency_s=latency_s, bytes_per_s=bytes_per_s
    )


def measure_throttled(bench: Bench, name: str, mount: Mount, server: Server) -> None:
    """Measure first bytes, a full read, random reads, and a read in a second mount."""
    about = f"{LATENCY_S * 1000:.0f} ms, {BYTES_PER_S // 1_000_000} MB/s a connection"
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
        server.ask("clear")
        began = time.perf_counter()
        with mount(server, Path(cache)) as (path, _):
            assert int(script(FIRST_BYTES, path)) == 8
            took_s = time.perf_counter() - began
        cost = server.ask("counts")
        bench.add(f"{name}: first 8 bytes of 1 GB, {about}", took_s, "s")
        bench.add("... store requests", cost["store"], "requests")
        bench.add("... fetched", cost["sent"] / 1e6, "MB")
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
        server.ask("clear")
        began = time.perf_counter()
        with mount(server, Path(cache)) as (path, pid):
            dd(path)
            took_s = time.perf_counter() - began
            cost = server.ask("counts")
            bench.add(f"{name}: 1 GB cold, {about}", GB / 1e6 / took_s, "MB/s")
            bench.add("... fetched over read", cost["sent"] / GB, "x")
            bench.add("... resident memory", resident_mb(pid), "MB")
            server.ask("clear")
            took_us = random_read_us(path, RANDOM_READS)
            cost = server.ask("counts")
            bench.add(f"{name}: random 4 KiB after that", took_us, "us")
            bench.add("... fetched over read", cost["sent"] / RANDOM_READS / 4096, "x")
        server.ask("clear")
        took_s = seconds(partial(read_whole, mount, server, Path(cache)))
        cost = server.ask("counts")
        bench.add(f"{name}: 1 GB in the second mount", GB / 1e6 / took_s, "MB/s")
        bench.add("... fetched over read", cost["sent"] / GB, "x")


def measure_unlimited(bench: Bench, name: str, mount: Mount, server: Server) -> None:
    with tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache:
        took_s = seconds(partial(read_whole, mount, server, Path(cache)))
    bench.add(f"{name}: 1 GB cold, 0 ms, unlimited", GB / 1e6 / took_s, "MB/s")


def read_whole(mount: Mount, server: Server, cache: Path) -> None:
    with mount(server, cache) as (path, _):
        dd(path)


@contextmanager
def tinkerfs(binding: str, server: Server, cache: Path) -> Iterator[tuple[Path, int]]:
    with mounted(server, binding, cache) as directory:
        yield members(directory, server)[0], daemon_of(directory)


@contextmanager
def ratarmount(server: Server, cache: Path) -> Iterator[tuple[Path, int]]:
    url = server.ask("url", "0001")
    command = ["ratarmount", "--foreground", "--index-file", str(cache / "index.sqlite"), url]
    with served(command) as (directory, pid):
        yield directory / "adapter_model.safetensors", pid


@contextmanager
def rclone(mode: str, page: str, _server: Server, cache: Path) -> Iterator[tuple[Path, int]]:
    # Ignore the configuration of the user.
    options = ["--config", os.devnull, "--read-only", "--cache-dir", str(cache)]
    options += ["--vfs-cache-mode", mode]
    with served(["rclone", "mount", *options, f":http,url='{page}':"]) as (directory, pid):
        yield directory / "archive.tar", pid


@contextmanager
def served(command: list[str]) -> Iterator[tuple[Path, int]]:
    """Run a foreground mount command; yield its temporary mountpoint and its pid."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as directory,
        open(os.devnull) as null,
    ):
        process = subprocess.Popen(
            [*command, directory], stdin=null, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60
            while not os.path.ismount(directory):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NotMounted(f"{command[0]} does not mount")
                time.sleep(0.01)
            yield Path(directory), process.pid
            subprocess.run(["fusermount3", "-u", directory], check=True)
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def links_to(server: Server) -> Iterator[str]:
    """Serve a page with a link to an archive; yield its URL, rclone's cache key."""
    url, name = server.ask("url", "0001"), "archive.tar"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_page = self.path == "/"
            body = f'<a href="{name}">{name}</a>'.encode() if is_page else b""
            self.send_response(200 if is_page else 307)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            if not is_page:
                self.send_header("Location", url)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as pages:
        thread = threading.Thread(target=pages.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{pages.server_port}/"
        finally:
            pages.shutdown()
            thread.join()
