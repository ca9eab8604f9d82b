"""The HTTP client: deadlines, response limits, idle connections, multiple addresses."""

import contextlib
import gzip
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.hostile import (
    HostileServer,
    endless,
    genuine,
    hold,
    response,
    wait,
)
from tinkerfs import errors, network
from tinkerfs.api import network_backend
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.context import Caller
from tinkerfs.operating_system import time_with_suspend
from tinkerfs.operation_log import OperationLog
from tinkerfs.retry import Backoff

RUNS = "GET training_runs"
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = b'{"training_runs":[],"cursor":{"total_count":0,"limit":100}}'


@pytest.fixture
def hostile():
    with HostileServer(runs=1, checkpoints=1) as server:
        yield server


def ref_of(server):
    (run,) = server.account.runs()
    checkpoint = run.checkpoints[0]
    return CheckpointRef(run.id, checkpoint.id, checkpoint.id)


# --- the deadline --------------------------------------------------------------------------------

#: Endless responses with a short delay before each read.
TRICKLES = {
    "status line": (endless(b"H", 0.02),),
    "headers": (OK, endless(b"X-A: b\r\n", 0.02)),
    "one header": (OK, b"X-A: ", endless(b"b", 0.02)),
    "interim responses": (endless(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02),),
    "body": (OK, b"Content-Length: 1000000\r\n\r\n", endless(b" ", 0.02)),
    "chunk size": (OK, b"Transfer-Encoding: chunked\r\n\r\n", endless(b"0", 0.02)),
    "chunks": (OK, b"Transfer-Encoding: chunked\r\n\r\n", endless(b"1\r\n \r\n", 0.02)),
    "trailers": (OK, b"Transfer-Encoding: chunked\r\n\r\n0\r\n", endless(b"X: b\r\n", 0.02)),
    "nothing": (hold,),
}


@pytest.mark.parametrize("trickle", TRICKLES)
def test_trickling_response_ends_at_deadline(hostile, client_of, trickle):
    hostile.on(RUNS, *TRICKLES[trickle], times=None)
    client = client_of(hostile, timeout_s=0.3)
    with ThreadPoolExecutor() as pool, pytest.raises(errors.RequestTimeout, match=r"within 0\.3 s"):
        pool.submit(client.all_training_runs).result(20)
    hostile.journal.wait_until_idle()  # the connection was closed


def test_trickling_tls_handshake_ends_at_deadline(client_of):
    record = b"\x16\x03\x03\x40\x00"  # the head of a record of 16 KiB
    with HostileServer(runs=0) as server:
        server.scheme = "https"
        server.on_connect(record, endless(b"\0", 0.02), times=9)
        client = client_of(server, timeout_s=0.3)
        with (
            ThreadPoolExecutor() as pool,
            pytest.raises(errors.RequestTimeout, match="no connection"),
        ):
            pool.submit(client.all_training_runs).result(20)


def test_trickling_exchanges_release_all_permits(hostile, client_of):
    client = client_of(hostile, timeout_s=1.0, concurrency=4)
    rule = hostile.on(RUNS, OK, endless(b"X-A: b\r\n", 0.02), times=None)
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(client.list_training_runs) for _ in range(8)]
        assert all(isinstance(call.exception(20), errors.RequestTimeout) for call in calls)
    rule.remove()
    client.reset()  # closes the circuit breaker
    assert len(client.all_training_runs()) == 1


@pytest.mark.parametrize(
    "flood",
    [
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n"),),
        (endless(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100),),
        (OK, endless(b"X-A: b\r\n" * 100)),
        (OK, b"X-A: ", endless(b"b" * 1000)),
        (b"H" * 300_000,),
    ],
)
def test_oversized_head_is_not_read_further(hostile, client_of, telemetry, flood):
    hostile.on(RUNS, *flood)
    with pytest.raises(errors.ProtocolError):
        client_of(hostile, timeout_s=60.0).all_training_runs()
    hostile.journal.wait_until_idle()
    assert telemetry.snapshot()["api_requests"] == {RUNS: {"not understood": 1}}


@pytest.mark.parametrize("chunk", [b"1\r\n \r\n" * 999, b"1;" + b"x" * 5000 + b"\r\n \r\n"])
@pytest.mark.parametrize("status", [b"200", b"500"])
def test_body_of_tiny_chunks_is_not_read_further(hostile, client_of, chunk, status):
    head = b"HTTP/1.1 " + status + b" X\r\nTransfer-Encoding: chunked\r\n\r\n"
    hostile.on(RUNS, head, endless(chunk))
    with pytest.raises(errors.ProtocolError, match="chunk framing"):
        client_of(hostile, timeout_s=60.0).all_training_runs()
    hostile.journal.wait_until_idle()


def test_body_of_small_chunks_is_read(hostile, client_of):
    def in_chunks(_head, body):
        chunks = b"".join(b"8\r\n%8b\r\n" % body[at : at + 8] for at in range(0, len(body), 8))
        return (b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",)

    hostile.on(RUNS, genuine(in_chunks))
    assert len(client_of(hostile).all_training_runs()) == 1


def test_interim_responses_before_the_response_are_skipped(hostile, client_of):
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    hostile.on(RUNS, interim * 5, genuine())
    assert len(client_of(hostile).all_training_runs()) == 1


def test_close_ends_an_exchange_in_flight(hostile, client_of):
    hostile.on(RUNS, gate := wait(), times=None)
    client = client_of(hostile, timeout_s=600.0)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.all_training_runs)
        gate.wait_for(1)
        client.close()
        assert isinstance(call.exception(20), errors.ConnectionFailed)


# --- response limits -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize(
    "coding", ["gzip, gzip, gzip", "gzip, identity", "br", "zstd", "aes128gcm"]
)
def test_unsupported_content_coding_raises_protocol_error(hostile, client_of, status, coding):
    bomb = bytes(1 << 20)
    for _ in range(3):
        bomb = gzip.compress(bomb)
    hostile.on(RUNS, response(status, bomb, f"Content-Encoding: {coding}"))
    with pytest.raises(errors.ProtocolError, match="content coding"):
        client_of(hostile).all_training_runs()


@pytest.mark.parametrize("coding", ["gzip", "GZIP", " gzip "])
def test_gzip_content_coding_is_decoded(hostile, client_of, coding):
    hostile.on(RUNS, response(200, gzip.compress(EMPTY), f"Content-Encoding: {coding}"))
    assert client_of(hostile).all_training_runs() == ()
    assert hostile.received[0].header("accept-encoding") == [b"gzip"]


def test_endless_error_body_is_read_up_to_limit(hostile, client_of):
    head = b"HTTP/1.1 404 X\r\nTransfer-Encoding: chunked\r\nContent-Type: text/plain\r\n\r\n"
    hostile.on(RUNS, head, endless(b"100000\r\n" + b"not here " * 116508 + b"!!!!\r\n"))
    with pytest.raises(errors.NotFound, match="not here not here"):
        client_of(hostile, timeout_s=60.0).all_training_runs()
    hostile.journal.wait_until_idle()


# --- idle connections ----------------------------------------------------------------------------


@pytest.fixture
def all_suspect(monkeypatch):
    """Treat every reused connection as idle, with a short response timeout."""
    monkeypatch.setattr(network_backend, "IDLE_S", 0.0)
    monkeypatch.setattr(network_backend, "IDLE_RESPONSE_TIMEOUT_S", 0.1)


def connections_of(server):
    """The connections of all requests so far."""
    return [request.connection for request in server.received]


@pytest.mark.usefixtures("all_suspect")
def test_dead_idle_connection_fails_after_short_timeout(hostile, client_of, telemetry):
    client = client_of(hostile, timeout_s=60.0, backoff=Backoff(60.0, 60.0))
    client.all_training_runs()
    hostile.kill_silently()
    assert len(client.all_training_runs()) == 1
    assert connections_of(hostile) == [1, 1, 2]
    assert telemetry.snapshot()["api_requests"] == {RUNS: {"200": 2, "unreachable": 1}}


def test_live_idle_connection_is_reused(hostile, client_of, monkeypatch):
    monkeypatch.setattr(network_backend, "IDLE_S", 0.0)
    client = client_of(hostile)
    for _ in range(3):
        client.all_training_runs()
    assert connections_of(hostile) == [1, 1, 1]


@pytest.mark.usefixtures("all_suspect")
def test_slow_idle_connection_is_replaced(hostile, client_of):
    client = client_of(hostile, timeout_s=60.0)
    client.all_training_runs()
    hostile.on(RUNS, gate := wait(), genuine(), times=2)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.all_training_runs)
        assert len(hostile.journal.wait_for(3)) == 3
        gate.release()
        assert len(call.result(20)) == 1
    assert connections_of(hostile) == [1, 1, 2]


@pytest.mark.usefixtures("all_suspect")
def test_idle_connection_to_slow_server_has_longer_timeout(hostile, client_of):
    hostile.on(RUNS, lambda handler: handler.pause(0.4), genuine(), times=3)
    client = client_of(hostile, timeout_s=60.0)
    for _ in range(3):
        client.all_training_runs()
    assert connections_of(hostile) == [1, 1, 1]


@pytest.mark.usefixtures("all_suspect")
def test_dead_connection_closes_other_idle_connections(hostile, client_of):
    client = client_of(hostile, timeout_s=60.0, concurrency=8)
    hostile.on(RUNS, barrier := wait(), genuine(), times=4)
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(client.list_training_runs) for _ in range(4)]
        barrier.wait_for(4)
        barrier.release()
        assert all(call.result(20).items for call in calls)
    hostile.kill_silently()
    assert len(client.all_training_runs()) == 1
    assert len(connections_of(hostile)) == 4 + 1 + 1
    assert connections_of(hostile)[-1] == 5


@pytest.mark.usefixtures("all_suspect")
def test_change_is_not_sent_on_an_idle_connection(hostile, client_of):
    client = client_of(hostile)
    client.all_training_runs()
    hostile.kill_silently()
    client.publish(ref_of(hostile))
    assert [request.line.partition(" ")[0] for request in hostile.received] == ["GET", "POST"]
    assert connections_of(hostile) == [1, 2]


@pytest.mark.usefixtures("all_suspect")
def test_archive_request_does_not_use_idle_connection(hostile, client_of):
    client = client_of(hostile)
    client.all_training_runs()
    hostile.kill_silently()
    assert client.archive(ref_of(hostile)).url.startswith(hostile.store_url)
    assert connections_of(hostile) == [1, 2]


def test_connection_idle_during_suspend_is_not_used(hostile, client_of, monkeypatch):
    client = client_of(hostile)
    client.all_training_runs()
    resumed_at = time_with_suspend() + 3600
    monkeypatch.setattr(network_backend, "time_with_suspend", lambda: resumed_at)
    client.all_training_runs()
    assert connections_of(hostile) == [1, 2]


# --- multiple addresses --------------------------------------------------------------------------


def test_client_tries_next_address_if_first_is_silent(hostile, client_of, monkeypatch):
    port = int(hostile.base_url.rpartition(":")[2])
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(full.getsockname())
        addresses = [full.getsockname(), ("127.0.0.1", port)]
        found = [(socket.AF_INET, address) for address in addresses]
        monkeypatch.setattr(network, "resolve", lambda *_of: found)
        started_at = time.monotonic()
        assert len(client_of(hostile).all_training_runs()) == 1
        assert time.monotonic() - started_at < network.ATTEMPT_DELAY_S + 4


def test_threads_have_separate_deadlines(hostile, client_of):
    """A request with a late deadline does not extend one with an early deadline."""
    hostile.on(RUNS, gate := wait(), genuine())
    hostile.on(RUNS, OK, endless(b"X-A: b\r\n", 0.02))
    slow, fast = client_of(hostile, timeout_s=60.0), client_of(hostile, timeout_s=0.3)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(slow.all_training_runs)
        gate.wait_for(1)
        assert isinstance(pool.submit(fast.list_training_runs).exception(20), errors.RequestTimeout)
        gate.release()
        assert len(first.result(20)) == 1


@pytest.mark.parametrize("status", [200, 404])
def test_request_id_is_added_to_the_operation(bytes_of, client_of, status):
    body = b'{"training_runs": [], "cursor": {"offset": 0, "limit": 1, "total_count": 0}}'
    client = client_of(
        bytes_of(response(status, body, "Connection: close", "X-Request-Id: req\x7f-1"))
    )
    operation_log, records = OperationLog(), []
    operation_log.subscribe(records.append)
    active = operation_log.begin("opendir", "/runs", Caller(1, 2, 3))
    with contextlib.suppress(errors.ApiError):
        client.list_training_runs(limit=1)
    operation_log.end(active, 0)
    [request_id] = records[0].request_ids
    assert request_id.startswith("req")
    assert request_id.isprintable()
