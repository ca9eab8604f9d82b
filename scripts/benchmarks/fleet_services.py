"""What the hosts of a site share: a caching proxy, Redis, a directory; and the page for rclone."""

import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from scripts.benchmarks.fleet_delay import network_of
from scripts.benchmarks.fleet_network import Host
from scripts.benchmarks.harness import TINKERFS
from scripts.benchmarks.other_mounts import served

PORT, REDIS_PORT, DIRECTORY_PORT = 8443, 6379, 24007
START_S = 60


@dataclass(frozen=True)
class Proxy:
    """A running proxy.

    Attributes:
        certificate: the file with its certificate.
        pid: its first process.
    """

    url: str
    certificate: Path
    pid: int

    def url_of(self, url: str) -> str:
        """Return the URL of the proxy that stands for a signed URL."""
        return f"{self.url}/{url.replace('://', '/', 1)}"


@contextmanager
def nginx(host: Host, directory: Path, store_url: str) -> Iterator[Proxy]:
    """Run nginx over TLS with the configuration that tinkerfs writes, and an empty cache."""
    certificate, key = directory / "proxy.pem", directory / "proxy.key"
    make_certificate(host.address, certificate, key)
    command = [*TINKERFS, "proxy-config", "nginx", f"--listen={host.address}:{PORT}"]
    command += [f"--certificate={certificate}", f"--certificate-key={key}"]
    command += [f"--allow-host={urlsplit(store_url).netloc}", "--resolver=127.0.0.1"]
    command += [f"--cache-dir={directory / 'proxy-cache'}", f"--log={directory / 'access.log'}"]
    configuration = directory / "nginx.conf"
    configuration.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    directives = f"daemon off; pid {directory / 'nginx.pid'};"
    command = host.command("nginx", "-c", str(configuration), "-g", directives)
    with running(command, directory / "nginx.log", host, PORT) as pid:
        yield Proxy(f"https://{host.address}:{PORT}", certificate, pid)
    shutil.rmtree(directory)


def make_certificate(address: str, certificate: Path, key: Path) -> None:
    """Make a certificate for an address, signed by itself."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=proxy"]
    command += ["-addext", f"subjectAltName=IP:{address}"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


@contextmanager
def redis(host: Host, directory: Path) -> Iterator[tuple[str, int]]:
    """Run Redis, which stores nothing on disk; yield its URL and pid."""
    command = host.command("redis-server", "--bind", host.address, "--port", str(REDIS_PORT))
    command += ["--protected-mode", "no", "--save", "", "--dir", str(directory)]
    with running(command, directory / "redis.log", host, REDIS_PORT) as pid:
        yield f"redis://{host.address}:{REDIS_PORT}", pid
    shutil.rmtree(directory)


SERVED_DIRECTORY = """
volume files
  type storage/posix
  option directory {directory}
end-volume
volume shared
  type features/locks
  subvolumes files
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address {address}
  option transport.socket.listen-port {port}
  option auth.addr.shared.allow *
  subvolumes shared
end-volume
"""
MOUNTED_DIRECTORY = """
volume client
  type protocol/client
  option transport-type tcp
  option remote-host {address}
  option remote-port {port}
  option remote-subvolume shared
end-volume
"""


@contextmanager
def glusterfs(
    service: Host, hosts: Sequence[Host], directory: Path
) -> Iterator[tuple[list[Path], list[int]]]:
    """Serve a directory with GlusterFS, and mount it on all hosts.

    Yields the mountpoints, and the processes of the server and the clients.
    """
    values = {"directory": directory / "brick", "address": service.address, "port": DIRECTORY_PORT}
    (directory / "brick").mkdir()
    for name, text in (("server", SERVED_DIRECTORY), ("client", MOUNTED_DIRECTORY)):
        (directory / f"{name}.vol").write_text(text.format(**values))
    with ExitStack() as stack:
        command = service.command("glusterfsd", "--no-daemon", "--log-level=ERROR")
        command += [f"--volfile={directory / 'server.vol'}", f"--log-file={directory / 'log'}"]
        pids = [stack.enter_context(running(command, directory / "out", service, DIRECTORY_PORT))]
        roots = []
        for host in hosts:
            command = host.command("glusterfs", "--no-daemon", "--log-level=ERROR")
            command += [f"--volfile={directory / 'client.vol'}"]
            command += [f"--log-file={directory / host.address}.log"]
            root, pid = stack.enter_context(served(command))
            roots.append(root)
            pids.append(pid)
        yield roots, pids
    shutil.rmtree(directory)


@contextmanager
def running(command: Sequence[str], log: Path, host: Host, port: int) -> Iterator[int]:
    """Run a server until the end of the block; yield its pid when it listens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(process, log, host, port)
        yield process.pid
    finally:
        process.terminate()
        process.wait(START_S)


def wait_for(process: "subprocess.Popen[bytes]", log: Path, host: Host, port: int) -> None:
    """Wait until a server accepts connections."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with network_of(host.pid):
                socket.create_connection((host.address, port), START_S).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise SystemExit(f"{process.args!r}: does not start: {log.read_text()}")


def etag_of(host: Host, url: str) -> str:
    """Request the ETag of a file."""
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
    with network_of(host.pid), urllib.request.urlopen(request, timeout=START_S) as response:
        return str(response.headers["ETag"])


@contextmanager
def page_of(host: Host, target: str, size_bytes: int) -> Iterator[str]:
    """Serve a page with a link to an archive, which redirects to a URL; yield the page's URL.

    The proxy accepts GET only, so the page itself replies to HEAD.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.reply(200, size_bytes)

        def do_GET(self) -> None:
            if self.path == "/":
                body = b'<a href="archive.tar">archive.tar</a>'
                self.reply(200, len(body))
                self.wfile.write(body)
            else:
                self.reply(307, 0, Location=target)

        def reply(self, status: int, length: int, **headers: str) -> None:
            self.send_response(status)
            headers |= {"Content-Type": "text/html" if self.path == "/" else "application/x-tar"}
            for name, value in (headers | {"Content-Length": str(length)}).items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    with network_of(host.pid):
        pages = ThreadingHTTPServer((host.address, 0), Handler)
    with pages:
        thread = threading.Thread(target=pages.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{host.address}:{pages.server_port}/"
        finally:
            pages.shutdown()
            thread.join()
