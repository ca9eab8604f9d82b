"""The faces of the file system, each over an account of its own that one module's tests share."""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import BINDINGS, KINDS, opened
from tinkerfs.demo.server import DemoServer

_ALL = [pytest.param(kind, marks=pytest.mark.kernel if kind in BINDINGS else ()) for kind in KINDS]


@dataclass
class World:
    """A server, and a driver over its account."""

    server: DemoServer
    driver: object
    kind: str

    @property
    def is_kernel(self):
        return self.kind in BINDINGS

    def refresh(self):
        self.driver.write(".tinkerfs/refresh", b"1")

    def new_run(self, *names, **fields):
        """Add a run with checkpoints `<kind>/<name>`; return its folder."""
        run = self.server.account.add_run(**fields)
        for name in names:
            self.server.account.add_checkpoint(run.id, name)
        self.refresh()
        self.server.journal.clear()
        return f"runs/{run.id}"

    def errors(self):
        return self.driver.read(".tinkerfs/errors").decode()

    def changes(self):
        return self.driver.read(".tinkerfs/changes").decode()

    def eventually(self, condition):
        """Wait until the kernel's own second has passed, at most; others need none."""
        deadline = time.monotonic() + (2.5 if self.is_kernel else 0.0)
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture(scope="module", params=_ALL)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def make_world(kind, tmp_path_factory):
    """A factory of worlds: the arguments of `DemoServer`, and `settings` of the file system."""
    with ExitStack() as stack:

        def make(settings=None, **options):
            hands = None if kind in BINDINGS else FakeTime()
            clock = hands.clock.now if hands else time.time
            server = stack.enter_context(DemoServer(clock=clock, **options))
            folder = tmp_path_factory.mktemp(kind)
            driver = stack.enter_context(
                opened(kind, server, folder, time=hands, **(settings or {}))
            )
            return World(server, driver, kind)

        yield make


@pytest.fixture(scope="module")
def world(make_world):
    """An account of 3 runs with 5 checkpoints each."""
    return make_world(runs=3, checkpoints=5)
