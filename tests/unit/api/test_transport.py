"""The transport: retries, timeouts, API keys, and errors without a response."""

import logging
import os
import socket
import threading
import time as real_time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.clocks import FakeTime
from tests.unit.api.conftest import http
from tests.unit.api.test_credentials import jwt
from tinkerfs import __version__, errors
from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.transport import Request, Transport
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.retry import Backoff
from tinkerfs.telemetry import Telemetry

RUNS = "GET training_runs"
EMPTY = b'{"training_runs":[],"cursor":{"total_count":0,"limit":100}}'


def requests_of(telemetry):
    return telemetry.snapshot()["api_requests"]


# --- what is sent --------------------------------------------------------------------------------


def test_request_headers_are_sent(server, client):
    client.list_training_runs()
    (entry,) = server.journal.entries(RUNS)
    assert entry.api_key == server.api_key
    assert entry.user_agent == f"tinkerfs/{__version__}"
    assert entry.headers["accept"] == "application/json"
    assert "x-idempotency-key" not in entry.headers


def test_received_bytes_are_counted(bytes_of, client_of, telemetry):
    client_of(bytes_of(http(200, EMPTY))).list_training_runs()
    assert telemetry.snapshot()["counters"]["bytes_received"] == len(EMPTY)


def test_post_retries_use_same_idempotency_key(server, client):
    server.faults.add("POST weights_info", status=503, times=2)
    run = client.all_training_runs()[0]
    path = run.last_checkpoint.tinker_path
    client.weights_info(path)
    client.weights_info(path)
    keys = [
        entry.headers["x-idempotency-key"] for entry in server.journal.entries("POST weights_info")
    ]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 2


def test_unusual_ids_are_percent_encoded(bytes_of, client_of):
    server = bytes_of(http(404, b'{"detail":"no checkpoint of that name"}'))
    client = client_of(server)
    for run, name in [
        ("..", "weights/.."),
        ("a/b", "weights/x/../y"),
        ("r:0", "weights/é\udcff?#"),
    ]:
        with pytest.raises(errors.NotFound):
            client.delete(CheckpointRef(run, name, name))
    assert server.request_lines == [
        "DELETE /api/v1/training_runs/%2E%2E/checkpoints/weights/%2E%2E HTTP/1.1",
        "DELETE /api/v1/training_runs/a%2Fb/checkpoints/weights/x%2F..%2Fy HTTP/1.1",
        "DELETE /api/v1/training_runs/r:0/checkpoints/weights/%C3%A9%FF%3F%23 HTTP/1.1",
    ]


@pytest.mark.parametrize("prefix", ["", "/services/tinker-prod"])
@pytest.mark.parametrize("end", ["", "/"])
def test_base_url_with_path_is_used(demo_server, tmp_path, prefix, end):
    server = demo_server(prefix=prefix)
    credentials = Credentials(server.environment, home=str(tmp_path))
    with Client(server.base_url + end, credentials, Telemetry()) as client:
        assert client.base_url == server.base_url
        assert b"key_id" in client.whoami()


def test_proxy_of_environment_is_used(bytes_of, monkeypatch, tmp_path):
    proxy = bytes_of(http(200, EMPTY))
    monkeypatch.setenv("http_proxy", proxy.base_url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    credentials = Credentials({"TINKER_API_KEY": "tml-k"}, home=str(tmp_path))
    with Client("http://tinker.invalid", credentials, Telemetry()) as client:
        assert client.all_training_runs() == ()
    assert proxy.request_lines[0].startswith("GET http://tinker.invalid/api/v1/training_runs?")


@pytest.mark.parametrize("proxy", ["nonsense://x", "socks4://127.0.0.1:1"])
def test_invalid_proxy_raises_error_naming_variable(monkeypatch, tmp_path, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(StartupError, match="https_proxy"):
        Client("https://tinker.invalid", Credentials({}, home=str(tmp_path)), Telemetry())


# --- retries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 599])
def test_retryable_status_is_retried(server, client, telemetry, status):
    server.faults.add(RUNS, status=status, times=2)
    assert len(client.all_training_runs()) == 10
    assert requests_of(telemetry) == {RUNS: {str(status): 2, "200": 1}}


@pytest.mark.parametrize("status", [400, 403, 404, 405, 410, 418, 422, 425, 501])
def test_non_retryable_status_is_not_retried(server, client, status):
    server.faults.add(RUNS, status=status)
    with pytest.raises(errors.ApiError):
        client.all_training_runs()
    assert server.journal.count(RUNS) == 1


@pytest.mark.parametrize(("status", "should_retry", "count"), [(500, "false", 1), (418, "true", 2)])
def test_should_retry_header_overrides_status(server, client, status, should_retry, count):
    server.faults.add(RUNS, status=status, headers={"x-should-retry": should_retry})
    try:
        client.all_training_runs()
    except errors.ServerError:
        assert should_retry == "false"
    assert server.journal.count(RUNS) == count


def test_request_has_at_most_ten_attempts(server, client):
    server.faults.add(RUNS, status=500, body={"detail": "out of disk"}, times=None)
    with pytest.raises(errors.ServerError, match="out of disk"):
        client.all_training_runs()
    assert server.journal.count(RUNS) == 10


@pytest.mark.parametrize("fault", [{"refuse": True}, {"reset": True}, {"cut_after_bytes": 30}])
def test_lost_connection_is_retried(server, client, fault):
    server.faults.add(RUNS, times=3, **fault)
    assert len(client.all_training_runs()) == 10
    assert server.journal.count(RUNS) == 4


def test_closed_idle_connection_is_retried_without_delay(server, client_of):
    client = client_of(server, backoff=Backoff(60.0, 60.0))
    client.all_training_runs()
    server.drop_connections()
    started_at = real_time.monotonic()
    client.all_training_runs()
    assert real_time.monotonic() - started_at < 5


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "0.05"},
        {"Retry-After": "600", "retry-after-ms": "50"},
        {"Retry-After": formatdate(0, usegmt=True)},
    ],
)
def test_retry_after_header_sets_delay(server, client_of, headers):
    client = client_of(server, backoff=Backoff(60.0, 60.0))
    server.faults.add(RUNS, status=429, headers=headers)
    assert len(client.all_training_runs()) == 10


def test_retry_after_beyond_timeout_fails_at_once(server, client):
    server.faults.add(RUNS, status=429, headers={"Retry-After": "60"})
    started_at = real_time.monotonic()
    with pytest.raises(errors.RateLimited) as caught:
        client.all_training_runs()
    assert caught.value.retry_after_s == 60
    assert real_time.monotonic() - started_at < 5


def test_timeout_limits_all_attempts_together(server, client_of):
    client = client_of(server, timeout_s=0.4)
    rule = server.faults.add(RUNS, hang=True, times=None)
    started_at = real_time.monotonic()
    with pytest.raises(errors.RequestTimeout, match=r"within 0\.4 s"):
        client.all_training_runs()
    assert real_time.monotonic() - started_at < 2
    rule.release()


def test_timeout_limits_trickling_response(server, client_of):
    client = client_of(server, timeout_s=0.5)
    server.faults.add(RUNS, bytes_per_s=200, times=None)
    started_at = real_time.monotonic()
    with pytest.raises(errors.RequestTimeout):
        client.all_training_runs()
    assert real_time.monotonic() - started_at < 3


def test_retries_are_not_logged(server, client, caplog):
    caplog.set_level(logging.DEBUG)
    server.faults.add(RUNS, status=503, times=2)
    client.all_training_runs()
    assert [r.name for r in caplog.records if r.levelno > logging.DEBUG] == []


# --- no response ---------------------------------------------------------------------------------


def test_closed_port_fails_fast(server, client_of, telemetry):
    client = client_of(server, timeout_s=30.0)
    server.stop_listening()
    started_at = real_time.monotonic()
    with pytest.raises(errors.ConnectionFailed, match=r"no connection to 127\.0\.0\.1.*refused"):
        client.all_training_runs()
    assert real_time.monotonic() - started_at < 2
    assert requests_of(telemetry) == {RUNS: {"unreachable": 2}}
    server.resume_listening()
    assert len(client.all_training_runs()) == 10


def test_unknown_host_raises_connection_failed(client_of):
    server = SimpleNamespace(base_url="http://tinker.invalid")
    with pytest.raises(errors.ConnectionFailed, match=r"tinker\.invalid"):
        client_of(server).all_training_runs()


def test_connection_closed_repeatedly_raises_connection_failed(server, client):
    server.faults.add(RUNS, refuse=True, times=None)
    with pytest.raises(errors.ConnectionFailed, match="broke off"):
        client.all_training_runs()


@pytest.mark.parametrize(
    "script",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        http(200, b"<html>login</html>", "Content-Type: text/html"),
        http(200, b'{"training_runs": ['),
        http(200, b""),
        http(204),
        http(302, b"", "Location: https://elsewhere/secret?sig=1"),
        http(304),
    ],
)
def test_response_not_of_api_raises_protocol_error(bytes_of, client_of, script):
    server = bytes_of(script)
    with pytest.raises(errors.ProtocolError) as caught:
        client_of(server).all_training_runs()
    assert "sig" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert caught.value.endpoint == RUNS
    assert len(server.received) == 1


def connections(server):
    """The client addresses of a server's open connections."""
    port = f":{server.base_url.rpartition(':')[2].partition('/')[0]}"
    rows = [row.split() for row in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    local = f":{int(port[1:]):04X}"
    return {row[2] for row in rows if row[1].endswith(local) and row[3] == "01"}


def test_second_burst_reuses_connections(demo_server, client_of):
    server = demo_server(runs=900, checkpoints=0)
    client = client_of(server, concurrency=8)
    bursts = []
    for _ in range(2):
        # Seven requests are in flight before the first response: each needs a connection.
        rule = server.faults.add(RUNS, after=1, times=8, hold_until=7)
        assert len(client.all_training_runs()) == 900
        rule.remove()
        bursts.append(connections(server))
    assert bursts[0] <= bursts[1]
    assert 7 <= len(bursts[1]) <= 8


def test_response_over_size_limit_raises_protocol_error(server, tmp_path):
    credentials = Credentials(server.environment, home=str(tmp_path))
    request = Request(endpoints.RUNS, "training_runs")
    with (
        Transport(
            server.base_url,
            credentials,
            Telemetry(),
            concurrency=1,
            timeout_s=5.0,
            max_response_bytes=1000,
        ) as transport,
        pytest.raises(errors.ProtocolError, match="sent more than"),
    ):
        transport.send(request, transport.deadline())
    assert server.journal.count() == 1


def test_close_kills_credential_command(server, tmp_path):
    pid_file = tmp_path / "pid"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 60"
    credentials = Credentials(environ | {"TINKER_CREDENTIAL_CMD": command})
    client = Client(server.base_url, credentials, Telemetry())
    with ThreadPoolExecutor() as pool, client:
        call = pool.submit(client.list_training_runs)
        assert mount_table.wait_until(pid_file.exists, 10)
    with pytest.raises(errors.Unauthorized, match="status -9"):
        call.result(10)
    assert not mount_table.is_running(int(pid_file.read_text()))
    assert server.journal.count() == 0


def test_closed_client_raises_connection_failed(server, client):
    client.close()
    with pytest.raises(errors.ConnectionFailed, match="closed"):
        client.whoami()


# --- API keys ------------------------------------------------------------------------------------


def test_wrong_key_is_sent_once_per_backoff(server, client_of):
    time = FakeTime()
    client = client_of(server, key="tml-wrong", clock=time.clock)
    for _ in range(5):
        with pytest.raises(errors.Unauthorized) as caught:
            client.all_training_runs()
    assert caught.value.status == 401
    assert caught.value.is_local
    assert server.journal.count(RUNS) == 1
    time.advance(5)
    with pytest.raises(errors.Unauthorized):
        client.all_training_runs()
    assert server.journal.count(RUNS) == 2


def test_rotated_key_is_reloaded(server, client_of, tmp_path):
    key = tmp_path / "key"
    key.write_text("tml-old")
    client = client_of(server, environ={"TINKER_CREDENTIAL_CMD": f"cat {key}"})
    server.behaviour.api_keys.add("tml-old")
    client.all_training_runs()
    server.behaviour.api_keys.remove("tml-old")
    key.write_text(server.api_key)
    assert len(client.all_training_runs()) == 10
    assert [entry.status for entry in server.journal.entries(RUNS)] == [200, 401, 200]


def test_change_is_rechecked_before_second_key_is_sent(server, client_of, tmp_path):
    key = tmp_path / "key"
    key.write_text("tml-old")
    client = client_of(server, environ={"TINKER_CREDENTIAL_CMD": f"cat {key}"})
    server.behaviour.api_keys.add("tml-old")
    run = client.all_training_runs()[0]
    checkpoint = client.list_checkpoints(run.run_id)[0]
    ref = CheckpointRef(run.run_id, checkpoint.checkpoint_id, checkpoint.checkpoint_id)
    server.behaviour.api_keys.remove("tml-old")
    key.write_text(server.api_key)
    seen = []
    client.delete(
        ref, lambda failure, may_have_succeeded: seen.append((failure.status, may_have_succeeded))
    )
    assert seen == [(401, False)]
    assert [entry.status for entry in server.journal.entries("DELETE checkpoint")] == [401, 200]


def test_second_rejected_key_is_not_retried(server, client_of, tmp_path):
    counter = tmp_path / "count"
    client = client_of(
        server, environ={"TINKER_CREDENTIAL_CMD": f"echo x >> {counter}; wc -c < {counter}"}
    )
    with pytest.raises(errors.Unauthorized):
        client.all_training_runs()
    with pytest.raises(errors.Unauthorized):
        client.all_training_runs()
    assert server.journal.count(RUNS) == 2


def test_concurrent_requests_with_wrong_key_fail(server, client_of):
    client = client_of(server, key="tml-wrong")
    outcomes = []

    def send():
        try:
            client.all_training_runs()
        except errors.Unauthorized as error:
            outcomes.append(error)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 16
    requests = server.journal.count()
    with pytest.raises(errors.Unauthorized):
        client.all_training_runs()
    assert server.journal.count() == requests


def test_status_403_does_not_reject_key(server, client):
    server.faults.add(RUNS, status=403, body={"detail": "not yours"})
    with pytest.raises(errors.Unauthorized, match="not yours"):
        client.all_training_runs()
    assert len(client.all_training_runs()) == 10


def test_request_without_key_is_not_sent(server, client_of):
    client = client_of(server, environ={})
    with pytest.raises(errors.Unauthorized, match="tinker auth login"):
        client.all_training_runs()
    assert server.journal.count() == 0


def test_logs_contain_no_keys_or_urls(server, client, caplog):
    # Like `logging.basicConfig(level=DEBUG)` in an application.
    caplog.set_level(logging.DEBUG)
    run = client.all_training_runs()[0]
    checkpoint = client.list_checkpoints(run.run_id)[0]
    ref = CheckpointRef(run.run_id, checkpoint.checkpoint_id, checkpoint.checkpoint_id)
    url = client.archive(ref).url
    assert server.journal.entries("GET archive")[0].status == 302
    assert url.partition("?")[2]
    assert url.partition("?")[2] not in caplog.text
    assert server.api_key not in caplog.text
    assert "training_runs" not in caplog.text


def test_timeout_limits_connecting(client_of):
    """Connecting hangs if the backlog of the listener is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        server = SimpleNamespace(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        started_at = real_time.monotonic()
        with pytest.raises(errors.RequestTimeout, match="no connection"):
            client_of(server, timeout_s=0.3).whoami()
        assert real_time.monotonic() - started_at < 3


@pytest.mark.parametrize("is_accepted", [True, False])
def test_token_expired_by_local_clock_is_judged_by_api(server, client_of, is_accepted):
    token = jwt(real_time.time() - 3600)
    if is_accepted:
        server.behaviour.api_keys.add(token)
    client = client_of(server, key=token)
    for _ in range(3):
        if is_accepted:
            assert client.all_training_runs()
        else:
            with pytest.raises(errors.Unauthorized, match="TINKER_API_KEY expired at"):
                client.all_training_runs()
    assert server.journal.count(RUNS) == (3 if is_accepted else 1)
