import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from tests.support.faults import FaultPlan
from tests.support.faulty_server import FaultyServer
from tests.support.server import api_client


def port_of(url):
    return int(url.rpartition(":")[2])


def test_server_has_two_origins(server):
    assert server.base_url.startswith("http://127.0.0.1:")
    assert port_of(server.base_url) != port_of(server.store_url)
    assert server.api_key.startswith("tml-")
    assert server.environment == {
        "TINKER_BASE_URL": server.base_url,
        "TINKER_API_KEY": server.api_key,
    }


def test_connections_are_persistent(api, server):
    with socket.create_connection(("127.0.0.1", port_of(server.base_url))) as client:
        request = f"GET /api/v1/training_runs HTTP/1.1\r\nX-API-Key: {server.api_key}\r\n\r\n"
        for _ in range(3):
            client.sendall(request.encode())
            received = b""
            while b"\r\n\r\n" not in received:
                received += client.recv(65536)
            head, _, body = received.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            while len(body) < length:
                body += client.recv(65536)


def test_response_on_a_persistent_connection_is_fast(api):
    api.get("healthz")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        api.get("training_runs")
        times.append(time.perf_counter() - start)
    # With Nagle's algorithm against delayed acknowledgements, each would take 40 ms.
    assert min(times) < 0.03


def test_server_serves_200_concurrent_clients(server):
    rule = server.faults.add("GET training_runs", hold_until=200, times=200)
    address = ("127.0.0.1", port_of(server.base_url))
    request = f"GET /api/v1/training_runs HTTP/1.1\r\nX-API-Key: {server.api_key}\r\n\r\n"
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(200)
        ]
        for client in clients:
            client.sendall(request.encode())
        assert all(client.recv(15) == b"HTTP/1.1 200 OK" for client in clients)
        assert rule.applied == 200
        assert server.journal.max_in_flight() == 200


def test_stop_and_resume_listening(api, server, web):
    url, store_url = server.base_url, server.archive_url(server.account.run_ids[0], "weights/0001")
    assert api.get("healthz").is_success
    server.stop_listening()
    for target in (f"{url}/api/v1/healthz", store_url):
        with pytest.raises(httpx.ConnectError):
            web.get(target)
    with pytest.raises(httpx.TransportError):
        api.get("healthz")
    server.resume_listening()
    assert server.base_url == url
    assert api.get("healthz").is_success
    assert web.get(store_url).is_success
    server.stop_listening("store")
    assert api.get("healthz").is_success
    with pytest.raises(httpx.TransportError):
        web.get(store_url)


def test_stop_listening_aborts_hanging_requests(api, server):
    rule = server.faults.add("GET healthz", hang=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.get, "healthz")
        rule.wait_for(1)
        server.stop_listening()
        with pytest.raises(httpx.TransportError):
            waiting.result(5)


def test_drop_connections_closes_idle_connections(api, server):
    assert api.get("healthz").is_success
    server.drop_connections()
    time.sleep(0.05)
    assert api.get("healthz").is_success


def test_close_twice_and_before_start_is_allowed():
    FaultyServer(runs=1).close()
    server = FaultyServer(runs=1).start()
    server.close()
    server.close()


def test_close_ends_every_thread():
    before = threading.active_count()
    with FaultyServer(runs=1) as server, api_client(server) as api:
        api.get("healthz")
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_start_on_a_used_port_raises(server):
    with pytest.raises(OSError, match="in use"):
        FaultyServer(runs=1, port=port_of(server.base_url)).start()


def test_start_on_a_given_port_uses_it():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with FaultyServer(runs=1, port=port) as server:
        assert server.base_url == f"http://127.0.0.1:{port}"


def test_custom_fault_plan_is_used(demo_server):
    faults = FaultPlan()
    faults.add("api", status=500)
    server = demo_server(faults=faults)
    assert server.faults is faults
    with api_client(server) as api:
        assert [api.get("healthz").status_code for _ in range(2)] == [500, 200]


def test_unknown_profiles_and_options_raise():
    with pytest.raises(KeyError):
        FaultyServer(profile="nothing")
    with pytest.raises(TypeError):
        FaultyServer(colour="blue")


def test_malformed_requests_do_not_affect_others(api, server):
    for request in (b"\r\n\r\n", b"x" * 70_000, b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port_of(server.base_url))) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert api.get("healthz").is_success
