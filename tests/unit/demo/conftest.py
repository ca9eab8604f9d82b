import httpx
import pytest

from tests.support.server import api_client, demo_server, server  # noqa: F401


@pytest.fixture
def api(server):  # noqa: F811
    """A client of the server's API."""
    with api_client(server) as client:
        yield client


@pytest.fixture
def web():
    """A client without key or base URL."""
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        yield client
