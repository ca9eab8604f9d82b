"""Deadlines of store connections: no thread blocks forever, dead connections cost little."""

import time

import pytest

from tests.support.hostile import HostileServer, drip, endless, response, tls_context
from tests.unit.weights.test_http import IDENTITY
from tinkerfs import errors, network
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import store_connection
from tinkerfs.weights.http import ObjectStoreClient
from tinkerfs.weights.transfer_monitor import TransferInterrupted, TransferMonitor

TIMEOUT_S = 0.4
#: Of one request on a busy machine; without a deadline each of these would last forever.
BOUND_S = 10 * TIMEOUT_S

BODY = b"abcdefgh" * 1000
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(IDENTITY))


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def server(request):
    tls = tls_context(IDENTITY) if request.param else None
    with HostileServer(runs=1, tls=tls) as server:
        yield server


@pytest.fixture
def client():
    with ObjectStoreClient(TransferMonitor(Telemetry(), TIMEOUT_S)) as client:
        yield client


def url_of(server):
    return server.store_url.replace("127.0.0.1", "localhost") + "/x?X-Signature=c0ffee"


def fetch(client, server):
    reply = client.get(url_of(server), {})
    try:
        return b"".join(reply.chunks())
    finally:
        reply.close()


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([drip(OK * 99)], id="status line"),
        pytest.param([OK, drip(b"X-A: 1\r\n" * 99)], id="headers"),
        pytest.param([drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 99)], id="interim responses"),
        pytest.param([CHUNKED, drip(b"0" * 999)], id="chunk size"),
        pytest.param([CHUNKED, b"1", drip(b";x" * 999)], id="chunk extension"),
        pytest.param([CHUNKED, b"0\r\n", drip(b"X-A: 1\r\n" * 99)], id="trailers"),
        pytest.param([OK + b"Content-Length: 99\r\n\r\n", drip(b"x" * 99, 0.2)], id="body"),
    ],
)
def test_get_of_a_dripping_response_ends_by_the_timeout(client, server, steps):
    server.on("store", *steps)
    began = time.monotonic()
    with pytest.raises(TransferInterrupted, match=r"next to nothing for 0\.4 s") as interruption:
        fetch(client, server)
    assert isinstance(interruption.value.error, errors.RequestTimeout)
    assert time.monotonic() - began < BOUND_S


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([endless(b"HTTP/1.1 100 Continue\r\n\r\n")], id="100"),
        pytest.param([endless(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")], id="103"),
        pytest.param([OK, endless(b"X-A: 1\r\n")], id="headers"),
        pytest.param([OK, endless(b"x" * 4096)], id="one header"),
        pytest.param([CHUNKED, b"0\r\n", endless(b"X-A: 1\r\n")], id="trailers"),
        pytest.param([CHUNKED, b"1;", endless(b"x" * 4096)], id="chunk extension"),
    ],
)
def test_get_of_an_endless_head_ends_without_the_timeout(server, steps):
    server.on("store", *steps)
    with ObjectStoreClient(TransferMonitor(Telemetry(), 60)) as client:
        spent_s = time.thread_time()
        with pytest.raises(TransferInterrupted, match="broke off"):
            fetch(client, server)
        assert time.thread_time() - spent_s < 1


@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_get_after_interim_responses_returns_the_response(client, server, status):
    interim = f"HTTP/1.1 {status}\r\nLink: </a>\r\n\r\n".encode()
    server.on("store", interim * 3, response(200, BODY))
    assert fetch(client, server) == BODY


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"5_0", b"", b"5 5", b"g"])
def test_get_of_a_malformed_chunk_size_fails(client, server, size):
    server.on("store", CHUNKED, size, b"\r\nhello\r\n0\r\n\r\n")
    with pytest.raises(TransferInterrupted, match="broke off"):
        fetch(client, server)


def test_get_on_a_silently_dead_connection_takes_a_new_one(server, monkeypatch):
    monkeypatch.setattr(store_connection, "IDLE_S", 0.0)
    monkeypatch.setattr(store_connection, "PROBE_S", 0.1)
    server.on("store", response(200, BODY), times=None)
    with ObjectStoreClient(TransferMonitor(Telemetry(), 60)) as client:
        assert fetch(client, server) == BODY
        server.kill_silently()
        began = time.monotonic()
        assert fetch(client, server) == BODY
        assert time.monotonic() - began < 10
        assert server.connections == 2


def test_get_on_a_connection_that_ended_takes_a_new_one(server):
    server.on("store", response(200, BODY), lambda handler: handler.pause(0), times=1)
    server.on("store", lambda handler: handler.end(is_reset=True), times=1)
    server.on("store", response(200, BODY), times=None)
    with ObjectStoreClient(TransferMonitor(Telemetry(), 60)) as client:
        assert fetch(client, server) == BODY
        assert fetch(client, server) == BODY
        assert len(server.received) == 3


def test_get_on_an_idle_connection_waits_for_a_slow_response(server, monkeypatch):
    monkeypatch.setattr(store_connection, "IDLE_S", 0.0)
    monkeypatch.setattr(store_connection, "PROBE_S", 0.05)
    slow = [lambda handler: handler.pause(0.3), response(200, BODY)]
    server.on("store", response(200, BODY), times=1)
    server.on("store", *slow, times=None)
    with ObjectStoreClient(TransferMonitor(Telemetry(), 60)) as client:
        assert fetch(client, server) == BODY
        assert fetch(client, server) == BODY, "a new connection has the full timeout"


def test_get_with_dead_first_address_connects_to_the_next(monkeypatch):
    with HostileServer(runs=1) as server:
        port = int(server.store_url.rpartition(":")[2])
        v4, v6 = 2, 10  # AF_INET, AF_INET6
        dead = (v6, ("100::1", port, 0, 0))  # RFC 6666: packets are discarded, if there is a route
        monkeypatch.setattr(network, "resolve", lambda *_: [dead, (v4, ("127.0.0.1", port))])
        server.on("store", response(200, BODY))
        with ObjectStoreClient(TransferMonitor(Telemetry(), 60)) as client:
            began = time.monotonic()
            assert fetch(client, server) == BODY
            assert time.monotonic() - began < 3
