"""Weights of a demo server's checkpoints, with everything behind them, without a mount."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from tests.support.server import demo_server  # noqa: F401
from tinkerfs.api.client import CheckpointRef, Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.cache.blocks import BlockCache
from tinkerfs.cache.store import Store
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.archives import Archives
from tinkerfs.weights.content import Subject, Weights


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def weights_of(tmp_path):
    """A factory: the weights behind a server, as one mount has them; each call is another mount."""
    with ExitStack() as stack:

        def make(server, *, limit_bytes=1 << 34, timeout_s=10.0, clock=SYSTEM_CLOCK, **options):
            telemetry = Telemetry()
            environ = {"TINKER_API_KEY": server.api_key}
            credentials = Credentials(environ, home=str(tmp_path), clock=clock)
            client = stack.enter_context(
                Client(server.base_url, credentials, telemetry, timeout_s=timeout_s, clock=clock)
            )
            folder = tmp_path / "cache"
            folder.mkdir(mode=0o700, exist_ok=True)
            store = stack.enter_context(Store(folder))
            cache = BlockCache(folder / "blocks", telemetry, limit_bytes=limit_bytes, floor_bytes=0)
            burst = options.pop("burst", 0)
            archives = Archives(client, telemetry, clock, timeout_s=timeout_s, burst=burst)
            weights = stack.enter_context(
                Weights(archives, store, cache, telemetry, timeout_s=timeout_s, **options)
            )
            return SimpleNamespace(
                weights=weights, telemetry=telemetry, cache=cache, archives=archives, store=store
            )

        yield make


def subject_of(server, kind="weights", *, run=0, number=0):
    """Return a checkpoint of a server as weights are asked for, and its two ids."""
    run = list(server.account.runs())[run]
    found = [each for each in run.checkpoints if each.id.startswith(f"{kind}/")]
    checkpoint = found[number]
    ref = CheckpointRef(run.id, checkpoint.id, checkpoint.id, is_known=True)
    key = (run.id, checkpoint.id, checkpoint.time_s)
    return Subject(server.base_url, key, ref, f"/{run.id}/{checkpoint.id}", 0)


def truth(server, subject, name):
    """Return the bytes that a member must have."""
    content = server.files(subject.ref.run_id, subject.ref.path_id)[name]
    return content.read(0, content.size_bytes)
