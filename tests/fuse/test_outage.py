"""Outage of the API and recovery, while processes keep listing and reading."""

import contextlib
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.support.account import account, make_account
from tests.support.server import demo_server

__all__ = ["account", "demo_server", "make_account"]

#: Kinds of outage: a fault of every endpoint, and the error message for data that is not cached.
OUTAGES = {
    "refused": ({"refuse": True}, "No route to host"),
    "hanging": ({"hang": True}, "Connection timed out"),
    "500": ({"status": 500, "headers": {"x-should-retry": "false"}}, "Input/output error"),
    "html": ({"html": True, "status": 200}, "Protocol error"),
    "half json": ({"half_json": True}, "Protocol error"),
}


class Gateway:
    """Forwards connections to a server, and forgets them all when the network changes."""

    def __init__(self, server_port):
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._network = 0
        self.connections = 0
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def change_network(self):
        """Discard what arrives on present connections, without closing them."""
        self._network += 1

    def close(self):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self.connections += 1
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(
                        target=self._pump, args=(*pair, self._network), daemon=True
                    ).start()

    def _pump(self, source, target, network):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if network == self._network:
                    target.sendall(data)
            if network == self._network:
                target.shutdown(socket.SHUT_WR)


def test_network_change_costs_one_short_timeout(make_account, demo_server):
    gateway = Gateway(urlsplit(demo_server(runs=3).base_url).port)
    module = "tinkerfs.api.network_backend"
    constants = {f"{module}.IDLE_S": 0.0, f"{module}.IDLE_RESPONSE_TIMEOUT_S": 0.5}
    account = make_account(
        settings={"base_url": gateway.url, "ttl_s": 0.0, "timeout_s": 60.0, "constants": constants}
    )
    assert account.sh("ls runs").returncode == 0
    before = gateway.connections
    gateway.change_network()
    started = time.monotonic()
    assert account.sh("ls runs").returncode == 0
    assert time.monotonic() - started < 30, "the dead connection has a timeout of its own"
    assert gateway.connections > before
    gateway.close()


@pytest.mark.parametrize("kind", OUTAGES)
def test_outage_serves_cached_data_and_recovers(make_account, kind):
    account = make_account(runs=3, checkpoints=3, settings={"ttl_s": 0.2, "timeout_s": 3.0})
    seen, unseen = account.server.account.run_ids[:2]
    script = f"ls -lR runs/{seen} && cat runs/{seen}/latest/info.json"
    cached = account.sh(f"{script}; ls runs")
    assert cached.returncode == 0
    options, expected = OUTAGES[kind]
    fault = account.server.faults.add("api", times=None, **options)
    time.sleep(0.3)  # the TTL
    # The first request of an endpoint waits for its retries; then its circuit breaker is open.
    for _ in range(3):
        assert expected in account.sh(f"ls runs/{unseen}/checkpoints").stderr
        account.sh(script)
    account.server.journal.clear()
    started = time.monotonic()
    rounds = 0
    while rounds < 2 or time.monotonic() - started < 3:
        rounds += 1
        done = account.sh(script)
        assert done.returncode == 0
        # A probe times out after 2 s; all other requests return at once.
        done = account.sh(f"ls runs/{unseen}/checkpoints")
        assert done.returncode != 0
        assert expected in done.stderr
        assert account.sh("ls runs/never-seen").returncode != 0
    # One probe per second of each of the 4 endpoints, plus the requests that open the breakers.
    took_s = time.monotonic() - started
    assert account.server.journal.count("api") <= 4 * (took_s + 3)
    assert kind == "refused" or account.server.journal.count("api") > 0
    fault.remove()
    assert account.eventually(
        lambda: account.sh(f"{script} && ls runs/{unseen}/checkpoints && ls runs").returncode == 0,
        15,
    )
