"""Demo servers for tests. A test module or a conftest imports the fixtures that it uses:

from tests.support.server import demo_server, server  # noqa: F401
"""

from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.support.faulty_server import FaultyServer


@pytest.fixture
def demo_server():
    """A factory of running servers with the arguments of `FaultyServer`, closed after the test."""
    with ExitStack() as stack:

        def make(**options):
            return stack.enter_context(FaultyServer(**options))

        yield make


@pytest.fixture
def server(demo_server):
    """A running server with 10 runs of 5 checkpoints."""
    return demo_server()


@contextmanager
def api_client(server, **options):
    """An authenticated HTTP client of the API, for paths such as `training_runs`."""
    options = {"headers": {"X-API-Key": server.api_key}, "timeout": 10.0} | options
    with httpx.Client(base_url=f"{server.base_url}/api/v1/", trust_env=False, **options) as client:
        yield client


@pytest.fixture
def api(server):
    """A client of the server's API."""
    with api_client(server) as client:
        yield client


@pytest.fixture
def web():
    """A client without key or base URL."""
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        yield client
