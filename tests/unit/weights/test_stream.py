"""What is read from a connection at a time, of httpx itself."""

import array
import fcntl
import socket
import ssl
import struct
import termios
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tinkerfs.weights.stream import read_more_at_once

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BODY = bytes(100 << 10)  # more than httpcore reads by itself, less than a socket holds


#: What a record of TLS 1.3 holds at the most, and what it takes beside that (RFC 8446, 5.2).
RECORD_BYTES, RECORD_OVERHEAD_BYTES = 16 << 10, 22
#: A key and a certificate of this machine's name, for tests alone.
IDENTITY = Path(__file__).parents[2] / "support/localhost.pem"


@contextmanager
def served(serve, *, is_secured=False):
    """Serve one connection; yields the URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(IDENTITY)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            connection, _ = listening.accept()
            if is_secured:
                connection = context.wrap_socket(connection, server_side=True)
            with connection:
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http{'s' * is_secured}://localhost:{listening.getsockname()[1]}/"
        thread.join(10)


@contextmanager
def client():
    context = ssl.create_default_context(cafile=IDENTITY)
    with httpx.Client(trust_env=False, verify=context, timeout=10) as client:
        yield client


def wait_until_there(sock, length):
    """Return once so many bytes lie in a socket."""
    deadline = time.monotonic() + 10
    there = array.array("i", [0])
    while there[0] < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)
        fcntl.ioctl(sock.fileno(), termios.FIONREAD, there)


@pytest.mark.parametrize("is_secured", [False, True])
def test_what_has_come_is_read_at_once_in_each_answer_of_a_connection(is_secured):
    taken = threading.Semaphore(0)

    def serve(connection):
        while connection.recv(65536):
            connection.sendall(HEAD % len(BODY))
            assert taken.acquire(timeout=10)
            connection.sendall(BODY)

    there_bytes, streams = len(BODY), set()
    if is_secured:
        there_bytes += -(-len(BODY) // RECORD_BYTES) * RECORD_OVERHEAD_BYTES
    with served(serve, is_secured=is_secured) as url, client() as http:
        for _ in range(3):
            with http.stream("GET", url) as response:
                stream = response.extensions["network_stream"]
                streams.add(stream)
                read_more_at_once(stream)
                taken.release()
                wait_until_there(stream.get_extra_info("socket"), there_bytes)
                assert list(response.iter_raw()) == [BODY]
    assert len(streams) == 1


def test_what_comes_late_over_tls_is_waited_for():
    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY))
        for start in range(0, len(BODY), RECORD_BYTES):
            time.sleep(0.02)
            connection.sendall(BODY[start : start + RECORD_BYTES])

    with served(serve, is_secured=True) as url, client() as http, http.stream("GET", url) as answer:
        read_more_at_once(answer.extensions["network_stream"])
        assert b"".join(answer.iter_raw()) == BODY


def test_tls_that_stands_still_ends_by_the_timeout():
    gone = threading.Event()

    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY) + BODY[:1000])
        gone.wait(10)

    with served(serve, is_secured=True) as url, client() as http:
        with http.stream("GET", url, timeout=0.2) as answer:
            read_more_at_once(answer.extensions["network_stream"])
            with pytest.raises(httpx.ReadTimeout):
                list(answer.iter_raw())
        gone.set()


@pytest.mark.parametrize("is_reset", [False, True])
def test_tls_that_breaks_off_is_told(is_reset):
    head_is_read = threading.Event()

    def serve(connection):
        connection.recv(65536)
        connection.sendall(HEAD % len(BODY))
        assert head_is_read.wait(10)
        connection.sendall(BODY[:20_000])
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with (
        served(serve, is_secured=True) as url,
        client() as http,
        http.stream("GET", url) as answer,
    ):
        read_more_at_once(answer.extensions["network_stream"])
        head_is_read.set()
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            list(answer.iter_raw())


def test_tls_within_tls_is_not_read_from_beneath(monkeypatch):
    # As httpcore tells a store behind a proxy that is spoken to by TLS itself.
    context = ssl.create_default_context()
    inner = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")
    with socket.socket() as plain, context.wrap_socket(plain, server_hostname="x") as outer:
        beneath = []
        monkeypatch.setattr(outer, "recv_into", beneath.append)
        stream = SimpleNamespace(
            read=lambda _bytes, timeout: b"first",
            get_extra_info={"socket": outer, "ssl_object": inner}.get,
        )
        read_more_at_once(stream)
        assert stream.read(65536, timeout=1) == b"first"
        assert beneath == []


def test_an_answer_that_does_not_tell_its_connection_is_left_alone():
    read_more_at_once(None)
