"""Connections to a store: sizes of reads, TLS, proxies, and reports of failures."""

import array
import base64
import fcntl
import logging
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tinkerfs import errors
from tinkerfs.retry import FailureKind
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import http
from tinkerfs.weights.http import ObjectStoreClient
from tinkerfs.weights.transfer_monitor import TransferInterrupted, TransferMonitor

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BODY = bytes(100 << 10)  # several TLS records, less than a socket buffer

#: Maximum size of a TLS 1.3 record, and its overhead (RFC 8446, 5.2).
RECORD_BYTES, RECORD_OVERHEAD_BYTES = 16 << 10, 22
#: A key and a certificate for localhost, only for tests.
IDENTITY = Path(__file__).parents[2] / "support/localhost.pem"
SECRET = "X-Amz-Signature=c0ffee"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(IDENTITY))
    return monkeypatch


@pytest.fixture
def client():
    with ObjectStoreClient(TransferMonitor(Telemetry(), 10)) as client:
        yield client


@contextmanager
def served(serve, *, is_secured=False, count=1):
    """Serve some connections; yield the address, a signed URL there, and the connections."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(IDENTITY)
    accepted = []

    def each(connection):
        if is_secured:
            connection = context.wrap_socket(connection, server_side=True)
        with connection:
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            for _ in range(count):
                connection, _ = listening.accept()
                accepted.append(connection)
                threads.append(threading.Thread(target=each, args=(connection,), daemon=True))
                threads[-1].start()

        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        address = f"localhost:{listening.getsockname()[1]}"
        yield address, f"http{'s' * is_secured}://{address}/a?{SECRET}", accepted
        for thread in threads[1:]:
            thread.join(10)


def send_bodies(connection):
    """Send the body in response to each request."""
    with suppress(ConnectionResetError):  # the client may close during a response
        while connection.recv(65536):
            connection.sendall(HEAD % len(BODY) + BODY)


def wait_until_received(sock, length):
    """Wait until `length` bytes are in a socket buffer."""
    deadline = time.monotonic() + 10
    available = array.array("i", [0])
    while available[0] < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, available)


def fetch(client, url):
    return b"".join(client.get(url, {}).chunks())


@pytest.mark.parametrize("is_secured", [False, True])
def test_available_bytes_are_read_at_once(client, is_secured):
    head_is_read = threading.Semaphore(0)

    def serve(connection):
        while connection.recv(65536):
            connection.sendall(HEAD % len(BODY))
            assert head_is_read.acquire(timeout=10)
            connection.sendall(BODY)

    available_bytes = len(BODY)
    if is_secured:
        available_bytes += -(-len(BODY) // RECORD_BYTES) * RECORD_OVERHEAD_BYTES
    with served(serve, is_secured=is_secured) as (_, url, accepted):
        for _ in range(3):
            response = client.get(url, {})
            head_is_read.release()
            wait_until_received(response._raw.connection.sock, available_bytes)
            assert list(response.chunks()) == [BODY]
        assert len(accepted) == 1
        del response  # it would keep the connection open
        client.close()


def test_body_that_arrives_late_over_tls_is_awaited(client):
    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY))
        for start in range(0, len(BODY), RECORD_BYTES):
            time.sleep(0.02)
            connection.sendall(BODY[start : start + RECORD_BYTES])

    with served(serve, is_secured=True) as (_, url, _):
        assert fetch(client, url) == BODY


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("start", [b"", HEAD % len(BODY), HEAD % len(BODY) + BODY[:1000]])
def test_stalled_response_ends_by_the_timeout(is_secured, start):
    gone = threading.Event()

    def serve(connection):
        connection.recv(65536)
        connection.sendall(start)
        gone.wait(10)

    with (
        ObjectStoreClient(TransferMonitor(Telemetry(), 1.5)) as client,
        served(serve, is_secured=is_secured) as (_, url, _),
    ):
        with pytest.raises(
            TransferInterrupted, match=r"localhost sent next to nothing for 1\.5 s"
        ) as raised:
            fetch(client, url)
        assert raised.value.kind is FailureKind.STALLED
        gone.set()


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("is_reset", [False, True])
def test_broken_response_raises_connection_failed(client, is_secured, is_reset):
    head_is_read = threading.Event()

    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY))
        assert head_is_read.wait(10)
        connection.sendall(BODY[:20_000])
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with served(serve, is_secured=is_secured) as (_, url, _):
        response = client.get(url, {})
        head_is_read.set()
        with pytest.raises(TransferInterrupted, match="localhost broke off: ") as raised:
            list(response.chunks())
        assert isinstance(raised.value.error, errors.ConnectionFailed)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/a", "no connection to 127.0.0.1: Connection refused"),
        ("http://store.invalid/a", "no connection to store.invalid: "),
    ],
)
def test_unreachable_store_is_reported_without_the_url(client, url, message):
    with pytest.raises(TransferInterrupted, match=message) as raised:
        client.get(f"{url}?{SECRET}", {})
    assert "c0ffee" not in str(raised.value)


def test_untrusted_certificate_is_reported(environment):
    environment.delenv("SSL_CERT_FILE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(IDENTITY)
    with (
        ObjectStoreClient(TransferMonitor(Telemetry(), 10)) as client,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):

        def accept():
            connection, _ = listening.accept()
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with pytest.raises(errors.UntrustedCertificate, match="of localhost is refused"):
            client.get(f"https://localhost:{listening.getsockname()[1]}/a?{SECRET}", {})
        thread.join(10)


def test_invalid_http_is_reported_without_the_url(client):
    def serve(connection):
        connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")

    with (
        served(serve) as (_, url, _),
        pytest.raises(TransferInterrupted, match="broke off: nonsense") as raised,
    ):
        client.get(url, {})
    assert "c0ffee" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://[::1/a?c0ffee", "ftp://h/a?c0ffee", "http://a\u2100b/c0ffee"]
)
def test_invalid_url_is_rejected_without_showing_it(client, url):
    with pytest.raises(errors.ProtocolError, match="no HTTP from") as raised:
        client.get(url, {})
    assert "c0ffee" not in str(raised.value)


def test_no_url_is_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    with served(send_bodies) as (_, url, _):
        fetch(client, url)
        with pytest.raises(TransferInterrupted):
            client.get(f"http://127.0.0.1:1/a?{SECRET}", {})
        client.close()
    assert "localhost" not in caplog.text
    assert "127.0.0.1" not in caplog.text
    assert "c0ffee" not in caplog.text


def test_idle_connections_are_reused_for_limited_time(client, monkeypatch):
    with served(send_bodies, count=2) as (_, url, accepted):
        for _ in range(3):
            assert fetch(client, url) == BODY
        assert len(accepted) == 1
        monkeypatch.setattr(http, "MAX_IDLE_S", 0.01)
        time.sleep(0.02)
        assert fetch(client, url) == BODY
        assert len(accepted) == 2
        client.close()


def test_stopped_client_ends_transfers_and_sends_nothing(client):
    with served(send_bodies) as (_, url, _):
        response = client.get(url, {})
        client.monitor.stop()
        with pytest.raises(errors.ConnectionFailed, match="stopped"):
            list(response.chunks())
        response.close()
    with pytest.raises(errors.ConnectionFailed, match="stopped"):
        client.get(url, {})


# --- proxies -------------------------------------------------------------------------------------


def request_of(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    return data


def test_proxy_of_the_environment_is_used_with_its_login(environment):
    requests = []

    def proxy(connection):
        requests.append(request_of(connection))
        connection.sendall(HEAD % 2 + b"ok")

    with served(proxy) as (address, _, _):
        environment.setenv("http_proxy", f"http://us%40er:pass@{address}")
        with ObjectStoreClient(TransferMonitor(Telemetry(), 10)) as client:
            assert fetch(client, f"http://store.invalid/a?{SECRET}") == b"ok"
    line, *headers = requests[0].decode().split("\r\n")
    assert line == f"GET http://store.invalid/a?{SECRET} HTTP/1.1"
    login = base64.b64encode(b"us@er:pass").decode()
    assert f"proxy-authorization: basic {login}".lower() in [each.lower() for each in headers]


def test_unreachable_proxy_is_reported_without_its_login(environment):
    environment.setenv("all_proxy", "http://me:c0ffee@127.0.0.1:1")
    with ObjectStoreClient(TransferMonitor(Telemetry(), 10)) as client:
        with pytest.raises(
            TransferInterrupted, match=r"no connection to store\.invalid through .*: .*refused"
        ) as raised:
            client.get("http://store.invalid/a", {})
        assert "c0ffee" not in str(raised.value)


def test_unreadable_certificate_file_is_reported(environment, tmp_path):
    environment.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    with (
        ObjectStoreClient(TransferMonitor(Telemetry(), 3)) as client,
        pytest.raises(errors.ConnectionFailed, match=r"SSL_CERT_FILE: .*No such file"),
    ):
        client.get("https://127.0.0.1:1/", {})


def test_app_import_does_not_import_urllib3():
    script = "import sys, tinkerfs.app; print('urllib3' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
