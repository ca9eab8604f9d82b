"""Demo servers for tests: `demo_server(...)` makes one that ends with the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tinkerfs.demo.server import DemoServer

MakeServer = Callable[..., DemoServer]


@pytest.fixture
def demo_server() -> Iterator[MakeServer]:
    """A factory of running servers, with the arguments of `DemoServer`."""
    with ExitStack() as stack:

        def make(**options: Any) -> DemoServer:
            return stack.enter_context(DemoServer(**options))

        yield make


@pytest.fixture
def server(demo_server: MakeServer) -> DemoServer:
    """A running server with 10 runs of 5 checkpoints."""
    return demo_server()
