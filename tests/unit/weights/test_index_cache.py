"""Indexes are loaded once, and those of changed weights are dropped."""

import threading

import pytest

from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.context import RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import index_cache
from tinkerfs.weights.index_cache import IndexCache

NOTHING = {"max_bytes": 0, "min_free_bytes": 0}
CTX = RequestContext(timeout_s=10.0)


@pytest.fixture
def indexes(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache, "encode_index", str.encode)
    monkeypatch.setattr(index_cache, "decode_index", bytes.decode)
    with MetadataStore(tmp_path) as store:
        yield IndexCache(store, BlockCache(None, Telemetry(), **NOTHING), 10.0)


def test_index_is_loaded_once_and_again_after_a_failure(indexes):
    loads = []

    def load():
        loads.append(1)
        if len(loads) == 1:
            raise ValueError("corrupt")
        return "index"

    with pytest.raises(ValueError, match="corrupt"):
        indexes.get("key", lambda: load, "test", CTX)
    for _ in range(2):
        assert indexes.get("key", lambda: load, "test", CTX) == "index"
    assert len(loads) == 2
    assert not indexes.is_loading("key")


def test_index_dropped_while_loading_is_not_cached(indexes):
    started, held = threading.Event(), threading.Event()

    def load():
        started.set()
        assert held.wait(10)
        return "old"

    found = []
    caller = threading.Thread(
        target=lambda: found.append(indexes.get("key", lambda: load, "test", CTX))
    )
    caller.start()
    assert started.wait(10)
    assert indexes.is_loading("key")
    indexes.drop("key")
    held.set()
    caller.join(10)
    assert found == ["old"]
    assert indexes.cached("key") is None
    assert indexes.get("key", lambda: lambda: "new", "test", CTX) == "new"
