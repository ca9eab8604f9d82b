"""Let mounts read one checkpoint through a real nginx, which `tinkerfs proxy-config` configures.

    python -m scripts.interoperability.nginx

It needs root and the package `nginx-light` of Debian. Every file that nginx writes is searched for
signatures at the end.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.faulty_server import FaultyServer
from tests.support.hostile import HostileServer, tls_context

SUPPORT = Path(__file__).parents[2] / "tests/support"
TINKERFS = [sys.executable, "-m", "tinkerfs"]
PORT = 19475
URL = f"http://127.0.0.1:{PORT}"
RESOLVER = "127.0.0.77"
SIZE_BYTES = 24 << 20
READERS = 4


def main() -> int:
    """Run all steps, and print one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwind the stack, which unmounts
    if shutil.which("nginx") is None or os.geteuid():
        print("nginx: skipped, needs root and nginx")
        return 0
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as name,
        FaultyServer(runs=1, checkpoints=1, size_bytes=SIZE_BYTES) as server,
    ):
        directory = Path(name)
        directory.chmod(0o755)  # the workers of nginx have another user
        allowed = urlsplit(server.store_url).netloc
        with Nginx(directory, f"--allow-host={allowed}") as nginx:
            ratio = read_together(server, directory)
            read_other_versions(server, directory)
            read_with_faults(server, directory)
            check_versions_of_one_path(server)
            check_refusals(server)
            lose_proxy(server, directory, nginx)
            nginx.check_files(server)
        check_tls(directory)
    seconds = time.monotonic() - began
    print(
        f"nginx: {READERS} mounts read {ratio:.4f} of the checkpoint's bytes from the store, "
        f"all bytes right, no signature in any file, {seconds:.0f} s"
    )
    return 0


class Nginx:
    """A running nginx; a context manager."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.home = directory / f"nginx-{len(list(directory.glob('nginx-*')))}"
        self.home.mkdir(mode=0o755)
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Nginx":
        command = [*TINKERFS, "proxy-config", "nginx", f"--listen=127.0.0.1:{PORT}"]
        command += [f"--cache-dir={self.home / 'cache'}", f"--log={self.home / 'access.log'}"]
        command += [f"--resolver={RESOLVER}", *self._options]
        configuration = self.home / "nginx.conf"
        configuration.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        self.start()
        return self

    def start(self) -> None:
        """Start the program, and wait until it listens."""
        globals_ = f"daemon off; pid {self.home / 'pid'};"
        with (self.home / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                ["nginx", "-c", self.home / "nginx.conf", "-g", globals_], stderr=stderr
            )
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", PORT)
                connection.connect()
            except OSError:
                time.sleep(0.05)
            else:
                connection.close()
                return
        raise AssertionError((self.home / "stderr").read_text())

    def stop(self) -> None:
        """Kill the master and its workers, as a crash of the host does."""
        assert self._process is not None
        for pid in [self._process.pid, *self.workers()]:
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def workers(self) -> list[int]:
        """Return the processes that the master started."""
        assert self._process is not None
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return [int(each) for each in path.read_text().split()]

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()

    def check_files(self, server: FaultyServer) -> None:
        """Find no query of a signed URL in any file that nginx wrote, and that it did write."""
        queries = [each.query for each in server.journal.entries("store")]
        secrets = {each["X-Signature"].encode() for each in queries if "X-Signature" in each}
        assert secrets
        files = [path for path in self.home.rglob("*") if path.is_file()]
        for path in files:
            data = path.read_bytes()
            assert b"X-Expires" not in data, path
            assert not [each for each in secrets if each in data], path
        log = (self.home / "access.log").read_text()
        assert re.search(r" 206 HIT ", log), log
        assert re.search(r" 206 MISS ", log), log
        assert re.search(r" 502 ", log), log
        assert len(files) > SIZE_BYTES >> 22


@contextmanager
def mounted(server: FaultyServer, directory: Path, *options: str) -> Iterator[Path]:
    """Mount the account with a cache of its own."""
    home = Path(tempfile.mkdtemp(dir=directory))
    root = home / "mnt"
    root.mkdir()
    command = [*TINKERFS, "mount", f"--cache-dir={home / 'cache'}", "--ttl=0", *options, str(root)]
    environment = os.environ | server.environment | {"HOME": str(home)}
    subprocess.run(command, env=environment, check=True)
    try:
        yield root
    finally:
        subprocess.run([*TINKERFS, "umount", str(root)], env=environment, check=True)


def digests(root: Path) -> dict[str, str]:
    """Read all files of the checkpoint, in another process."""
    (files,) = root.glob("runs/*/checkpoints/*/*/files")
    output = subprocess.run(
        "sha256sum *", shell=True, cwd=files, check=True, capture_output=True, text=True
    ).stdout
    return {name: digest for digest, name in (line.split("  ") for line in output.splitlines())}


def expected(server: FaultyServer) -> dict[str, str]:
    """Return the digests of the server's files."""
    (run,) = server.account.runs()
    checkpoint = run.checkpoints[0]
    return {
        name: hashlib.sha256(content.read(0, content.size_bytes)).hexdigest()
        for name, content in server.files(run.id, checkpoint.id).items()
    }


def save_again(server: FaultyServer) -> None:
    """Replace the checkpoint under its path, as a run that saves under the same name does."""
    (run,) = server.account.runs()
    checkpoint = run.checkpoints[0]
    checkpoint.generation += 1
    checkpoint.time_s = (checkpoint.time_s or 0.0) + 60
    server.signer.revoke_all()


def archive_bytes(server: FaultyServer) -> int:
    """Return the length of the checkpoint's archive."""
    (run,) = server.account.runs()
    return server.archive(run.id, run.checkpoints[0].id).size_bytes


def sent_bytes(server: FaultyServer) -> int:
    """Return how many bytes of weights the store has sent."""
    return sum(each.sent_bytes for each in server.journal.entries("store"))


def errors_of(root: Path) -> list[str]:
    """Return the lines of the mount's errors that are about the proxy."""
    text = (root / ".tinkerfs/errors").read_text()
    return [line for line in text.splitlines() if "blob proxy" in line]


def read_together(server: FaultyServer, directory: Path) -> float:
    """Four mounts read at once: the store sends the checkpoint once. Return the ratio."""
    with mounted(server, directory) as root:
        before = server.journal.count("api")
        assert digests(root) == expected(server)
        calls_alone = server.journal.count("api") - before
    with ExitStack() as stack:
        option = f"--blob-proxy={URL}"
        roots = [stack.enter_context(mounted(server, directory, option)) for _ in range(READERS)]
        bytes_before, calls_before = sent_bytes(server), server.journal.count("api")
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(digests, roots):
                assert found == expected(server)
        origin_bytes = sent_bytes(server) - bytes_before
        ratio = origin_bytes / archive_bytes(server)
        calls = server.journal.count("api") - calls_before
        assert [errors_of(root) for root in roots] == [[]] * READERS
        counted = Counter[str]()
        for root in roots:
            counted.update(json.loads((root / ".tinkerfs/stats.json").read_text())["counters"])
    assert ratio < 1.001, ratio
    # What the mounts count by `Cache-Status` is what the store sent.
    assert counted["blob_proxy_missed_bytes"] + counted["store_bytes_received"] == origin_bytes
    assert counted["blob_proxy_hits"] > counted["blob_proxy_misses"] > 0, counted
    assert not counted["blob_proxy_fallbacks"] + counted["blob_proxy_outages"], counted
    assert calls <= READERS * calls_alone, (calls, calls_alone)
    assert not any(each.had_key for each in server.journal.entries("store"))
    return ratio


def read_other_versions(server: FaultyServer, directory: Path) -> None:
    """A checkpoint that is saved again has the same path; each reader gets its new bytes."""
    with ExitStack() as stack:
        option = f"--blob-proxy={URL}"
        roots = [stack.enter_context(mounted(server, directory, option)) for _ in range(2)]
        for _ in range(3):
            before = expected(server)
            save_again(server)
            assert before != expected(server)
            for root in roots:
                wait_until(lambda root=root: read(root) == expected(server))


def read_with_faults(server: FaultyServer, directory: Path) -> None:
    """Faults of the store, and signatures that expire, change no byte."""
    faults: list[dict[str, Any]] = [
        {"status": 503, "times": 3},
        {"refuse": True, "times": 2},
        {"cut_after_bytes": 1 << 20, "times": 2, "when": lambda each: "4194304" in each.range},
        {"status": 403, "times": 2},
        {"ignore_range": True, "times": None},
        {"call": server.signer.revoke_all, "times": 1, "after": 3},
    ]
    for fault in faults:
        save_again(server)
        # Only nginx sends no user agent, so mounts get the index before the fault.
        when = fault.pop("when", lambda _each: True)
        through = lambda each, when=when: each.user_agent is None and when(each)  # noqa: E731
        is_all = "ignore_range" in fault
        rule = server.faults.add("store", when=None if is_all else through, **fault)
        with mounted(server, directory, f"--blob-proxy={URL}") as root:
            assert digests(root) == expected(server), fault
        assert rule.applied, fault
        server.faults.clear()


def check_versions_of_one_path(server: FaultyServer) -> None:
    """Ask nginx for two versions under one path, and never get the bytes of the other one."""
    (run,) = server.account.runs()
    checkpoint = run.checkpoints[0]
    etags, bodies = [], []
    for _ in range(2):
        checkpoint.generation += 1
        url = server.archive_url(run.id, checkpoint.id)
        etag = ask(url, '"unknown"')[1]["etag"]
        status, headers, body = ask(url, etag)
        assert (status, headers["etag"]) == (206, etag)
        etags.append(etag)
        bodies.append(body)
    assert bodies[0] != bodies[1]
    hits = [ask(url, etag) for etag in etags]
    assert [body for _, _, body in hits] == bodies, "a cached version is served by its key"
    assert [headers["etag"] for _, headers, _ in hits] == etags
    # A store that ignores If-Range fills the key of no version with the bytes of another.
    forget = server.faults.add(
        "store", times=1, when=lambda each: bool(each.headers.pop("if-range", ""))
    )
    status, headers, _ = ask(url, '"other"')
    assert (status, headers["etag"], forget.applied) == (206, etags[1], 1)
    server.faults.clear()
    before = server.journal.count("store")
    assert ask(url, '"other"')[1]["etag"] == etags[1]
    assert server.journal.count("store") == before + 1, "the first response was not cached"
    # Nginx downloads no whole file to cut a slice out of it: the mount reads the store itself.
    save_again(server)
    server.faults.add("store", ignore_range=True, times=None)
    url = server.archive_url(run.id, checkpoint.id)
    assert ask(url, '"unknown"')[0] == 200
    server.faults.clear()


def check_refusals(server: FaultyServer) -> None:
    """Nginx serves no other host, method or request without a version."""
    (run,) = server.account.runs()
    url = server.archive_url(run.id, run.checkpoints[0].id)
    for other in ("http://127.0.0.1:1/x?y=1", "https://example.com/x", "http://127.0.0.1/x"):
        assert ask(other, '"v"')[0] == 421, other
    userinfo = url.replace("://", "://user@")
    assert ask(userinfo, '"v"')[0] == 421
    assert ask(url, "")[0] == 400
    assert ask(url, '"v"', method="POST")[0] == 405


def ask(url: str, etag: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Send a request for the first bytes of a file to nginx."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    headers = {"Range": "bytes=0-65535", **({"Tinkerfs-Version": etag} if etag else {})}
    connection.request(method, "/" + url.replace("://", "/"), headers=headers)
    response = connection.getresponse()
    body = response.read(1 << 16)
    found = {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    return response.status, found, body


def lose_proxy(server: FaultyServer, directory: Path, nginx: Nginx) -> None:
    """A proxy that hangs, fails or is gone delays reads, and is reported once."""
    failures: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "2",
            partial(signal_workers, nginx, signal.SIGSTOP),
            partial(signal_workers, nginx, signal.SIGCONT),
        ),
        ("30", nginx.stop, nginx.start),
    ]
    for timeout, act, undo in failures:
        save_again(server)
        with mounted(server, directory, f"--blob-proxy={URL}", f"--timeout={timeout}") as root:
            act()
            try:
                assert digests(root) == expected(server)
                (line,) = errors_of(root)
                assert f"blob proxy 127.0.0.1:{PORT} failed" in line, line
            finally:
                undo()
    # A store that nginx cannot reach is its failure; then it does not get the reads.
    save_again(server)
    server.faults.add("store", refuse=True, times=None, when=lambda each: each.user_agent is None)
    with mounted(server, directory, f"--blob-proxy={URL}") as root:
        assert digests(root) == expected(server)
        (line,) = errors_of(root)
        assert "status 502: it cannot reach the store" in line, line
    server.faults.clear()


def signal_workers(nginx: Nginx, number: int) -> None:
    """Send a signal to the workers."""
    for pid in nginx.workers():
        os.kill(pid, number)


def check_tls(directory: Path) -> None:
    """Nginx verifies the certificate of a store, and serves mounts over TLS."""
    pem = SUPPORT / "localhost.pem"
    with resolver(), HostileServer(runs=1, checkpoints=1, tls=tls_context(pem)) as server:  # type: ignore[no-untyped-call]
        # By name, because nginx finds no address in a certificate.
        server._store.base_url = server.store_url.replace("127.0.0.1", "localhost")
        (run,) = server.account.runs()
        url = server.archive_url(run.id, run.checkpoints[0].id)
        allow = f"--allow-host={urlsplit(url).netloc}"
        with Nginx(directory, allow):
            assert ask(url, '"v"')[0] == 502, "the certificate is not trusted"
        tls = (f"--ca-file={pem}", f"--certificate={pem}", f"--certificate-key={pem}")
        with Nginx(directory, allow, *tls):
            os.environ["SSL_CERT_FILE"] = str(pem)
            option = f"--blob-proxy=https://127.0.0.1:{PORT}"
            with mounted(server, directory, option) as root:
                assert digests(root) == expected(server)
                assert errors_of(root) == [], errors_of(root)
            assert server.journal.entries(re.compile("GET /archives"))


@contextmanager
def resolver() -> Iterator[None]:
    """Serve DNS, in which every name has the address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((RESOLVER, 53))

        def serve() -> None:
            while len(query := server.recvfrom(512)) and query[0]:
                packet, client = query
                end = packet.index(b"\0", 12) + 5
                is_address = packet[end - 4 : end - 2] == b"\0\1"
                head = b"\x81\x80\0\1" + bytes([0, is_address]) + bytes(4)
                record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x7f\0\0\1" if is_address else b""
                server.sendto(packet[:2] + head + packet[12:end] + record, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.sendto(b"", (RESOLVER, 53))  # ends the thread
            thread.join()


def read(root: Path) -> dict[str, str] | None:
    """Read the checkpoint; return None while the mount has an old version open."""
    try:
        return digests(root)
    except subprocess.CalledProcessError:
        return None


def wait_until(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold in time"
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
