"""Fixtures of the conformance suite, which runs with all drivers and servers.

A *variant* is a driver and a server profile: every driver with the official service, every other
profile in process, and the profile that differs most also through the kernel. Every test runs with
every variant, unless a marker restricts it: `served("PUT ttl")` requires endpoints, and
`where(profile=...)` requires that a predicate of the profile is true. Only tests marked with
`every_binding` run under each FUSE binding, the others under one. The tests of a module share one
account per variant.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import BINDINGS, KINDS, opened
from tests.support.faulty_server import FaultyServer
from tinkerfs.demo.profiles import PROFILES

_VARIANTS = [
    *((kind, "official") for kind in KINDS),
    *(("process", profile) for profile in PROFILES if profile != "official"),
    ("mfusepy3", "skyrl"),
]
_PARAMS = [
    pytest.param(
        (kind, profile),
        id=kind if profile == "official" else f"{kind}-{profile}",
        marks=pytest.mark.kernel if kind in BINDINGS else (),
    )
    for kind, profile in _VARIANTS
]


def pytest_configure(config):
    """Register the markers of this suite."""
    for line in (
        "served(*endpoints): only for servers with these endpoints",
        "where(profile): only for servers for which this predicate of the profile is true",
        "every_binding: under every FUSE binding, because the outcome may depend on it",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config, items):
    """Deselect tests for the variants that their markers exclude."""
    selected = [item for item in items if _applies(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _applies(item)])
    items[:] = selected


def _applies(item):
    callspec = getattr(item, "callspec", None)
    if callspec is None or "variant" not in callspec.params:
        return True
    kind, profile_name = callspec.params["variant"]
    if kind in BINDINGS[:-1] and item.get_closest_marker("every_binding") is None:
        return False
    profile = PROFILES[profile_name]
    endpoints = {name for mark in item.iter_markers("served") for name in mark.args}
    predicates = [mark.kwargs["profile"] for mark in item.iter_markers("where")]
    return not endpoints & profile.missing and all(is_true(profile) for is_true in predicates)


@dataclass
class World:
    """A server, and a driver with its account."""

    server: FaultyServer
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

    def member(self, name):
        """Return the name in `files/` of a file of an adapter, given by PEFT's name."""
        return self.profile.member_names.get(name, name)

    def kind_directory(self, run, kind="weights"):
        """Return the directory of a run's checkpoints of one kind."""
        return f"{run}/checkpoints/{kind}"

    def checkpoint_dirs(self, run):
        """Yield the directory of every listed checkpoint of a run."""
        directory = f"{run}/checkpoints"
        for kind in self.driver.listdir(directory):
            yield from (
                f"{directory}/{kind}/{name}" for name in self.driver.listdir(f"{directory}/{kind}")
            )

    def walk(self, directory=""):
        """Yield path and status below a directory, including unlisted runs."""
        names = self.driver.listdir(directory)
        if directory == "runs" and not self.serves("GET training_runs"):
            names = self.server.account.run_ids
        for name in names:
            path = f"{directory}/{name}" if directory else name
            status = self.driver.stat(path)
            yield path, status
            if status.is_directory:
                yield from self.walk(path)

    def refresh(self):
        self.driver.write(".tinkerfs/refresh", b"1")

    def new_run(self, *names, **fields):
        """Add a run with checkpoints `<kind>/<name>`, and return its directory."""
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
        """Wait for a condition until the kernel's attribute cache has expired."""
        deadline = time.monotonic() + (2.5 if self.is_kernel else 0.0)
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture(scope="module", params=_PARAMS)
def variant(request):
    """The kind of the driver, and the name of the server profile."""
    return request.param


@pytest.fixture(autouse=True)
def _expect_missing_endpoint_warnings(request, expect_warnings):
    """Expect warnings about missing endpoints, except from the official server."""
    if "variant" in request.fixturenames and request.getfixturevalue("variant")[1] != "official":
        expect_warnings("EOPNOTSUPP this server has no such endpoint", "weights info EINVAL")


@pytest.fixture(scope="module")
def make_world(variant, tmp_path_factory):
    """Return a factory that takes arguments of `FaultyServer`, and `settings`."""
    kind, profile = variant
    with ExitStack() as stack:

        def make(settings=None, **options):
            fake_time = None if kind in BINDINGS else FakeTime()
            clock = fake_time.clock.now if fake_time else time.time
            server = stack.enter_context(FaultyServer(profile=profile, clock=clock, **options))
            directory = tmp_path_factory.mktemp(kind)
            driver = stack.enter_context(
                opened(kind, server, directory, time=fake_time, **(settings or {}))
            )
            return World(server, driver, kind)

        yield make


@pytest.fixture(scope="module")
def world(make_world):
    """An account with 3 runs of 5 checkpoints each."""
    return make_world(runs=3, checkpoints=5)
