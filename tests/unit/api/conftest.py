"""Fixtures: clients of demo servers and of servers that send given bytes."""

from contextlib import ExitStack

import pytest

from tests.support.hostile import HostileServer, close, response
from tests.support.server import demo_server, server  # noqa: F401
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.retry import Backoff
from tinkerfs.telemetry import Telemetry


def http(status, body=b"", *headers):
    """Return the bytes of a response that closes its connection."""
    return response(status, body, "Connection: close", *headers)


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def client_of(telemetry, tmp_path, monkeypatch):
    """A factory of clients of any server, with minimal delays between attempts."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:

        def make(server, *, environ=None, key="tml-demo-key", **options):
            environ = {"TINKER_API_KEY": key} if environ is None else environ
            credentials = Credentials(
                environ,
                home=str(tmp_path),
                **({"clock": options["clock"]} if "clock" in options else {}),
            )
            options = {"timeout_s": 10.0, "backoff": Backoff(0.001, 0.02)} | options
            return stack.enter_context(Client(server.base_url, credentials, telemetry, **options))

        yield make


@pytest.fixture
def client(client_of, server):  # noqa: F811
    """A client of the test's demo server."""
    return client_of(server)


@pytest.fixture
def bytes_of():
    """A factory of servers that send the given responses in order and repeat the last one."""
    with ExitStack() as stack:

        def make(*responses):
            server = stack.enter_context(HostileServer(runs=0))
            for each in responses[:-1]:
                server.on("*", each, close)
            server.on("*", responses[-1], close, times=None)
            return server

        yield make
