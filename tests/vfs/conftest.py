"""The faces of the file system, each over an account of its own that one module's tests share.

A face is a driver over a server: every driver over the official service, the other servers in
process, and through the kernel the one of them that differs most. Every test is for every face but
where a mark says whom it is about: `served("PUT ttl")`, those who have these endpoints;
`where(profile=...)`, those of whose profile that function is true.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import BINDINGS, KINDS, opened
from tinkerfs.demo.profiles import PROFILES
from tinkerfs.demo.server import DemoServer

_FACES = [
    *((kind, "official") for kind in KINDS),
    *(("process", profile) for profile in PROFILES if profile != "official"),
    ("mfusepy3", "skyrl"),
]
_ALL = [
    pytest.param(
        (kind, profile),
        id=kind if profile == "official" else f"{kind}-{profile}",
        marks=pytest.mark.kernel if kind in BINDINGS else (),
    )
    for kind, profile in _FACES
]


def pytest_configure(config):
    """Register the markers that are made here."""
    for line in (
        "served(*endpoints): about the servers that have these endpoints",
        "where(profile): about the servers of whose profile this is true, a function of it",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config, items):
    """Leave each test out for the faces that it is not about."""
    meant = [item for item in items if _is_meant(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_meant(item)])
    items[:] = meant


def _is_meant(item):
    callspec = getattr(item, "callspec", None)
    if callspec is None or "face" not in callspec.params:
        return True
    profile = PROFILES[callspec.params["face"][1]]
    endpoints = {name for mark in item.iter_markers("served") for name in mark.args}
    predicates = [mark.kwargs["profile"] for mark in item.iter_markers("where")]
    return not endpoints & profile.missing and all(is_true(profile) for is_true in predicates)


@dataclass
class World:
    """A server, and a driver over its account."""

    server: DemoServer
    driver: object
    kind: str

    @property
    def is_kernel(self):
        return self.kind in BINDINGS

    @property
    def profile(self):
        return self.server.profile

    def serves(self, endpoint):
        return endpoint not in self.profile.missing

    def group(self, run, kind="weights"):
        """The folder that lists a run's checkpoints of a kind."""
        return f"{run}/checkpoints/{kind}"

    def places(self, run):
        """The folder of each checkpoint that a run's listing shows."""
        folder = f"{run}/checkpoints"
        for kind in self.driver.listdir(folder):
            yield from (
                f"{folder}/{kind}/{name}" for name in self.driver.listdir(f"{folder}/{kind}")
            )

    def walk(self, folder=""):
        """Every name below a folder, links not followed; runs also where none are listed."""
        names = self.driver.listdir(folder)
        if folder == "runs" and not self.serves("GET training_runs"):
            names = self.server.account.run_ids
        for name in names:
            path = f"{folder}/{name}" if folder else name
            status = self.driver.stat(path)
            yield path, status
            if status.is_folder:
                yield from self.walk(path)

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
def face(request):
    """The kind of a driver, and the name of a server's profile."""
    return request.param


@pytest.fixture(autouse=True)
def _announce_what_the_server_lacks(request, expect_warnings):
    """Expect what is told of a server that is not the official one."""
    if "face" in request.fixturenames and request.getfixturevalue("face")[1] != "official":
        expect_warnings("EOPNOTSUPP this server has no such endpoint", "weights info EINVAL")


@pytest.fixture(scope="module")
def make_world(face, tmp_path_factory):
    """A factory of worlds: the arguments of `DemoServer`, and `settings` of the file system."""
    kind, profile = face
    with ExitStack() as stack:

        def make(settings=None, **options):
            hands = None if kind in BINDINGS else FakeTime()
            clock = hands.clock.now if hands else time.time
            server = stack.enter_context(DemoServer(profile=profile, clock=clock, **options))
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
