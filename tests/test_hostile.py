"""The hostile server sends what its scripts say, and records what it was sent."""

import socket
import ssl
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support import hostile
from tests.support.hostile import HostileServer, close, drip, endless, genuine, hold, response
from tests.support.server import api_client

IDENTITY = Path(__file__).parent / "support/localhost.pem"
RUNS = "GET training_runs"


@pytest.fixture
def server():
    with HostileServer(runs=1, checkpoints=1) as server:
        yield server


@contextmanager
def connected(server, path="/x", url=None):
    """A bare connection on which a request was sent."""
    parts = urlsplit(url or server.base_url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nX-Odd:  a\r\n\r\n".encode())
        yield connection


def read_all(connection):
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def test_hostile_without_script_sends_the_genuine_response(server):
    with api_client(server) as api:
        assert len(api.get("training_runs").json()["training_runs"]) == 1
    assert server.journal.count(RUNS) == 1
    assert server.request_lines == ["GET /api/v1/training_runs HTTP/1.1"]


def test_hostile_script_sends_bytes_as_they_are(server):
    server.on("/x", b"no HTTP", drip(b" at all", 0, 2), close)
    with connected(server) as connection:
        assert read_all(connection) == b"no HTTP at all"
    (request,) = server.received
    assert request.head == b"GET /x HTTP/1.1\r\nHost: h\r\nX-Odd:  a\r\n\r\n"
    assert request.header("x-odd") == [b"a"]


def test_hostile_script_without_turns_left_is_over(server):
    server.on(RUNS, response(500), times=2, after=1)
    with api_client(server) as api:
        statuses = [api.get("training_runs").status_code for _ in range(4)]
    assert statuses == [200, 500, 500, 200]
    assert server.connections == 1


def test_hostile_genuine_response_is_edited(server):
    server.on(RUNS, genuine(lambda head, body: (head, drip(body, 0, 7))))
    server.on(RUNS, genuine(lambda head, body: (head, body[:9], close)))
    with api_client(server) as api:
        assert len(api.get("training_runs").json()["training_runs"]) == 1
        with pytest.raises(httpx.RemoteProtocolError):
            api.get("training_runs")


def test_hostile_store_serves_signed_urls(server):
    (run,) = server.account.runs()
    url = server.archive_url(run.id, run.checkpoints[0].id)
    size = server.archive(run.id, run.checkpoints[0].id).size_bytes
    server.on("store", genuine())
    assert len(httpx.get(url, trust_env=False).content) == size
    assert httpx.get(url, trust_env=False, headers={"Range": "bytes=3-5"}).status_code == 206


def test_hostile_reset_is_seen_as_one(server):
    server.on("/x", b"HTTP", hostile.reset)
    with connected(server) as connection, pytest.raises(ConnectionResetError):
        read_all(connection)


def test_hostile_wait_lasts_until_release(server):
    server.on("/x", gate := hostile.wait(), b"now", close)
    with connected(server) as connection:
        gate.wait_for(1)
        gate.release()
        assert read_all(connection) == b"now"


def test_hostile_endless_ends_with_its_client(server):
    server.on("/x", endless(b"HTTP/1.1 103 X\r\n\r\n"))
    with connected(server) as connection:
        assert connection.recv(12) == b"HTTP/1.1 103"
        server.journal.wait_for(1)
    server.journal.wait_until_idle()


@pytest.mark.parametrize("step", [hold, endless(b"x", 0.01), hostile.wait()])
def test_hostile_steps_end_with_the_server(step):
    with HostileServer(runs=0) as server:
        server.on("/x", step)
        with connected(server) as connection:
            server.journal.wait_for(1)
            server.close()
            server.journal.wait_until_idle()
            assert set(read_all(connection)) <= set(b"x")


def test_hostile_pace_replaces_the_pauses():
    paused = []
    with HostileServer(runs=0, pace=lambda s, is_over: not paused.append(s)) as server:
        server.on("/x", drip(b"abc", 3600), close)
        with connected(server) as connection:
            assert read_all(connection) == b"abc"
    assert paused == [3600] * 3


def test_hostile_silent_connection_stays_open(server):
    with api_client(server) as api:
        api.get("training_runs")
        server.kill_silently()
        with pytest.raises(httpx.ReadTimeout):
            api.get("training_runs", timeout=0.2)
        assert api.get("training_runs").status_code == 200
    assert [request.connection for request in server.received] == [1, 1, 2]


def test_hostile_greeting_comes_before_the_request(server):
    server.on_connect(b"SSH-2.0-x\r\n", close)
    with connected(server) as connection:
        assert connection.recv(100) == b"SSH-2.0-x\r\n"
    with api_client(server) as api:
        assert api.get("training_runs").status_code == 200


def test_hostile_tls_serves_and_resets():
    context = ssl.create_default_context(cafile=IDENTITY)
    tls = hostile.tls_context(IDENTITY)
    with HostileServer(runs=1, host="localhost", tls=tls) as server:
        server.on(RUNS, b"HTTP/1.1 200 OK\r\n", hold)
        server.on(RUNS, b"HTTP/1.1 200 OK\r\n", hostile.reset)
        with api_client(server, verify=context) as api:
            with pytest.raises(httpx.ReadTimeout):
                api.get("training_runs", timeout=1.0)
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                api.get("training_runs")
            assert api.get("training_runs").status_code == 200
        server.journal.wait_until_idle()
