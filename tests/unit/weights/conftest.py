"""Fixtures: the weights of a demo server's checkpoints, without a mount."""

import itertools
import os
import re
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from tests.support.server import demo_server  # noqa: F401
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.shared_cache import SharedBlockCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import store_connection
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.reader import WeightsReader
from tinkerfs.weights.url_cache import SignedUrlCache


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _patient_connections(monkeypatch):
    """Never send a request again because a busy machine was slow to respond to the first one."""
    monkeypatch.setattr(store_connection, "PROBE_S", 60.0)


@contextmanager
def weights_in(
    directory,
    base_url,
    api_key,
    *,
    limit_bytes=1 << 34,
    timeout_s=10.0,
    clock=SYSTEM_CLOCK,
    telemetry=None,
    shared=None,
    **options,
):
    """Open a weights reader of a server with its caches, as a mount has them.

    Its blocks are in the directory `shared`, if that is given, which other hosts may use.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    telemetry = Telemetry() if telemetry is None else telemetry
    credentials = Credentials({"TINKER_API_KEY": api_key}, home=str(directory), clock=clock)
    limits = {"max_bytes": limit_bytes, "min_free_bytes": 0}
    if shared is None:
        cache = BlockCache(directory / "blocks", telemetry, **limits)
    else:
        form = {"owner": os.getuid(), "has_locks": True, "memory_bytes": 1 << 24}
        cache = SharedBlockCache(shared, telemetry, **form, **limits)
    bounds = {"timeout_s": timeout_s}
    with Client(base_url, credentials, telemetry, clock=clock, **bounds) as client:
        burst = options.pop("burst", 0)
        archives = SignedUrlCache(
            client, telemetry, clock, burst=burst, outage_timeout_s=timeout_s, **bounds
        )
        with (
            MetadataStore(directory) as store,
            Exports(client, store, telemetry, clock, **bounds) as exports,
            WeightsReader(
                archives, exports, store, cache, telemetry, **bounds, **options
            ) as weights,
        ):
            yield SimpleNamespace(
                weights=weights, exports=exports, telemetry=telemetry, cache=cache, store=store
            )


@pytest.fixture
def weights_of(tmp_path):
    """Return a factory of readers of a server, which share a disk cache."""
    with ExitStack() as stack:

        def make(server, **options):
            directory = tmp_path / "cache"
            mount = weights_in(directory, server.base_url, server.api_key, **options)
            return stack.enter_context(mount)

        yield make


def assert_disjoint(entries, size_bytes):
    """Assert that requests of a store's log have no byte in common, and about `size_bytes`."""
    ranges = sorted(map(range_of, entries))
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges)), ranges
    assert size_bytes <= sum(stop - start for start, stop in ranges) < size_bytes + (2 << 20)


def range_of(entry):
    """Return the requested bytes [start, stop) of a log entry."""
    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", entry.range).groups()
    return int(first), int(last) + 1


def subject_of(server, kind="weights", *, run=0, number=0):
    """Return a checkpoint of a server as a `CheckpointVersion`."""
    run = list(server.account.runs())[run]
    found = [each for each in run.checkpoints if each.id.startswith(f"{kind}/")]
    checkpoint = found[number]
    ref = CheckpointRef(run.id, checkpoint.id, checkpoint.id, exists=True)
    key = (run.id, checkpoint.id, checkpoint.time_s)
    return CheckpointVersion(server.base_url, key, ref, f"/{run.id}/{checkpoint.id}", 0)


def truth(server, subject, name):
    """Return the expected bytes of a member."""
    content = server.files(subject.ref.run_id, subject.ref.path_id)[name]
    return content.read(0, content.size_bytes)
