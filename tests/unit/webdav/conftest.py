"""A server over the account of a demo server, which logs its requests."""

from contextlib import ExitStack

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.webdav import DavClient, served
from tinkerfs.app import open_app
from tinkerfs.config import Settings


class Site:
    """A WebDAV server, its file system and the API server behind it."""

    def __init__(self, stack, server, directory, monkeypatch, *, settings=None, **options):
        monkeypatch.setenv("TINKER_API_KEY", server.api_key)
        cache_dir = directory / "cache"
        cache_dir.mkdir(mode=0o700, exist_ok=True)
        values = Settings(base_url=server.base_url, cache_dir=str(cache_dir), **(settings or {}))
        self.server = server
        self.filesystem = stack.enter_context(open_app(values)).filesystem
        options = {"is_read_only": values.read_only} | options
        self.webdav = stack.enter_context(served(self.filesystem, **options))
        self.url = self.webdav.url
        self._stack = stack
        self.client = self.connect()
        run = server.account.runs()[0]
        self.run = f"/runs/{run.id}"
        self.checkpoint = f"{self.run}/checkpoints/{run.checkpoints[0].id}"

    def connect(self, **options):
        client = DavClient(self.url, **options)
        self._stack.callback(client.close)
        return client

    def calls(self):
        """Return the endpoints that were requested since the last call."""
        endpoints = [entry.endpoint for entry in self.server.journal.entries("api")]
        self.server.journal.clear()
        return endpoints


@pytest.fixture
def make_site(tmp_path, monkeypatch):
    """A factory of sites; the arguments are those of `FaultyServer`, `Settings` and `served`."""
    with ExitStack() as stack:

        def make(*, runs=2, checkpoints=2, size_bytes=None, **options):
            sized = {} if size_bytes is None else {"size_bytes": size_bytes}
            server = FaultyServer(runs=runs, checkpoints=checkpoints, **sized)
            stack.enter_context(server)
            return Site(stack, server, tmp_path, monkeypatch, **options)

        yield make


@pytest.fixture
def site(make_site):
    """A site of two runs with two checkpoints each."""
    return make_site()


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    """A site for the tests of a module that change nothing."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as monkeypatch:
        server = stack.enter_context(FaultyServer(runs=2, checkpoints=2))
        yield Site(stack, server, tmp_path_factory.mktemp("shared"), monkeypatch)
