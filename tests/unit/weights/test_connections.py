"""Connections to a store: what is read at a time, TLS, proxies, and what is told of failures."""

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
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import connections
from tinkerfs.weights.connections import ObjectStoreClient
from tinkerfs.weights.retry import TransferInterrupted

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BODY = bytes(100 << 10)  # several records of TLS, less than a socket holds

#: What a record of TLS 1.3 holds at the most, and what it takes beside that (RFC 8446, 5.2).
RECORD_BYTES, RECORD_OVERHEAD_BYTES = 16 << 10, 22
#: A key and a certificate of this machine's name, for tests alone.
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
    with ObjectStoreClient(Telemetry(), timeout_s=10) as client:
        yield client


@contextmanager
def served(serve, *, is_secured=False, count=1):
    """Serve some connections; yields the address, a signed URL there, and those accepted."""
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


def answering(connection):
    """Answer each request with the body."""
    with suppress(ConnectionResetError):  # who leaves in the middle of an answer
        while connection.recv(65536):
            connection.sendall(HEAD % len(BODY) + BODY)


def wait_until_there(sock, length):
    """Return once so many bytes lie in a socket."""
    deadline = time.monotonic() + 10
    there = array.array("i", [0])
    while there[0] < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, there)


def got(client, url):
    return b"".join(client.get(url, {}).pieces())


@pytest.mark.parametrize("is_secured", [False, True])
def test_what_has_come_is_read_at_once_in_each_answer_of_a_connection(client, is_secured):
    taken = threading.Semaphore(0)

    def serve(connection):
        while connection.recv(65536):
            connection.sendall(HEAD % len(BODY))
            assert taken.acquire(timeout=10)
            connection.sendall(BODY)

    there_bytes = len(BODY)
    if is_secured:
        there_bytes += -(-len(BODY) // RECORD_BYTES) * RECORD_OVERHEAD_BYTES
    with served(serve, is_secured=is_secured) as (_, url, accepted):
        for _ in range(3):
            response = client.get(url, {})
            taken.release()
            wait_until_there(response._raw.connection.sock, there_bytes)
            assert list(response.pieces()) == [BODY]
        assert len(accepted) == 1
        del response  # it keeps the connection from being closed
        client.close()


def test_what_comes_late_over_tls_is_waited_for(client):
    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY))
        for start in range(0, len(BODY), RECORD_BYTES):
            time.sleep(0.02)
            connection.sendall(BODY[start : start + RECORD_BYTES])

    with served(serve, is_secured=True) as (_, url, _):
        assert got(client, url) == BODY


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("start", [b"", HEAD % len(BODY), HEAD % len(BODY) + BODY[:1000]])
def test_what_stands_still_ends_by_the_timeout(is_secured, start):
    gone = threading.Event()

    def serve(connection):
        connection.recv(65536)
        connection.sendall(start)
        gone.wait(10)

    with (
        ObjectStoreClient(Telemetry(), timeout_s=0.2) as client,
        served(serve, is_secured=is_secured) as (_, url, _),
    ):
        with pytest.raises(
            TransferInterrupted, match=r"localhost sent next to nothing for 0\.2 s"
        ) as told:
            got(client, url)
        assert told.value.is_stall
        gone.set()


@pytest.mark.parametrize("is_secured", [False, True])
@pytest.mark.parametrize("is_reset", [False, True])
def test_what_breaks_off_is_told(client, is_secured, is_reset):
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
        with pytest.raises(TransferInterrupted, match="localhost broke off: ") as told:
            list(response.pieces())
        assert isinstance(told.value.error, errors.ConnectionFailed)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/a", "no connection to 127.0.0.1: Connection refused"),
        ("http://store.invalid/a", "no connection to store.invalid: "),
    ],
)
def test_a_store_that_is_not_there_is_told(client, url, words):
    with pytest.raises(TransferInterrupted, match=words) as told:
        client.get(f"{url}?{SECRET}", {})
    assert "c0ffee" not in str(told.value)


def test_a_certificate_that_nobody_trusts_is_told_as_that(environment):
    environment.delenv("SSL_CERT_FILE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(IDENTITY)
    with (
        ObjectStoreClient(Telemetry(), timeout_s=10) as client,
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


def test_what_is_no_http_is_told_without_the_url(client):
    def serve(connection):
        connection.recv(65536)
        connection.sendall(b"nonsense\r\n\r\n")

    with (
        served(serve) as (_, url, _),
        pytest.raises(TransferInterrupted, match="broke off: nonsense") as told,
    ):
        client.get(url, {})
    assert "c0ffee" not in str(told.value)


@pytest.mark.parametrize(
    "url", ["http://[::1/a?c0ffee", "ftp://h/a?c0ffee", "http://a\u2100b/c0ffee"]
)
def test_a_url_of_nothing_is_refused_without_being_told(client, url):
    with pytest.raises(errors.ProtocolError, match="no HTTP from") as told:
        client.get(url, {})
    assert "c0ffee" not in str(told.value)


def test_no_url_is_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    with served(answering) as (_, url, _):
        got(client, url)
        with pytest.raises(TransferInterrupted):
            client.get(f"http://127.0.0.1:1/a?{SECRET}", {})
        client.close()
    assert "localhost" not in caplog.text
    assert "127.0.0.1" not in caplog.text
    assert "c0ffee" not in caplog.text


def test_idle_connections_serve_again_for_a_while_only(client, monkeypatch):
    with served(answering, count=2) as (_, url, accepted):
        for _ in range(3):
            assert got(client, url) == BODY
        assert len(accepted) == 1
        monkeypatch.setattr(connections, "MAX_IDLE_S", 0.01)
        time.sleep(0.02)
        assert got(client, url) == BODY
        assert len(accepted) == 2
        client.close()


def test_who_is_stopped_begins_nothing_and_ends_at_the_next_piece(client):
    with served(answering) as (_, url, _):
        response = client.get(url, {})
        client.stop()
        with pytest.raises(errors.ConnectionFailed, match="stopped"):
            list(response.pieces())
        response.close()
    with pytest.raises(errors.ConnectionFailed, match="stopped"):
        client.get(url, {})


# --- proxies -------------------------------------------------------------------------------------


def request_of(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    return data


def test_a_proxy_of_the_environment_is_asked_with_its_login(environment):
    requests = []

    def proxy(connection):
        requests.append(request_of(connection))
        connection.sendall(HEAD % 2 + b"ok")

    with served(proxy) as (address, _, _):
        environment.setenv("http_proxy", f"http://us%40er:pass@{address}")
        with ObjectStoreClient(Telemetry(), timeout_s=10) as client:
            assert got(client, f"http://store.invalid/a?{SECRET}") == b"ok"
    line, *headers = requests[0].decode().split("\r\n")
    assert line == f"GET http://store.invalid/a?{SECRET} HTTP/1.1"
    login = base64.b64encode(b"us@er:pass").decode()
    assert f"proxy-authorization: basic {login}".lower() in [each.lower() for each in headers]


def test_a_proxy_that_is_not_there_is_told_without_its_login(environment):
    environment.setenv("all_proxy", "http://me:c0ffee@127.0.0.1:1")
    with ObjectStoreClient(Telemetry(), timeout_s=10) as client:
        with pytest.raises(
            TransferInterrupted, match=r"no connection to store\.invalid through .*: .*refused"
        ) as told:
            client.get("http://store.invalid/a", {})
        assert "c0ffee" not in str(told.value)


def test_certificates_that_cannot_be_read_are_told(environment, tmp_path):
    environment.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    with (
        ObjectStoreClient(Telemetry(), timeout_s=3) as client,
        pytest.raises(errors.ConnectionFailed, match=r"SSL_CERT_FILE: .*No such file"),
    ):
        client.get("https://127.0.0.1:1/", {})


def test_a_mount_starts_without_what_fetches_weights():
    script = "import sys, tinkerfs.app; print('urllib3' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_nothing_is_asked_once_it_is_closed_also_while_the_first_is_got_ready(monkeypatch):
    made = ObjectStoreClient._made

    def closed_meanwhile(client):
        pools = made(client)
        client.close()
        return pools

    monkeypatch.setattr(ObjectStoreClient, "_made", closed_meanwhile)
    telemetry = Telemetry()
    client = ObjectStoreClient(telemetry, timeout_s=3)
    with pytest.raises(errors.ConnectionFailed, match="stopped"):
        client.get("http://127.0.0.1:1/", {})
    assert telemetry.snapshot()["calls"] == {}


def test_what_fetches_weights_and_is_gone_by_then_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinkerfs.weights.pools", None)
    with (
        ObjectStoreClient(Telemetry(), timeout_s=3) as client,
        pytest.raises(errors.ConnectionFailed, match="mount again"),
    ):
        client.get("http://127.0.0.1:1/", {})
