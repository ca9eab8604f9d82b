"""Listings of the metadata cache, with and without the trash."""

import threading

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.api import models
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.account_listing import AccountListing, AccountRecords
from tinkerfs.catalog.cached_listing import CachedListing, VisibleListing
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.catalog.trash import Trash
from tinkerfs.context import RequestContext, Validity
from tinkerfs.telemetry import Telemetry

CTX = RequestContext(timeout_s=10.0)
KEY = ("run", "weights", "1")


class Server:
    """Lists checkpoints by name and expiry; the second page waits for `second_page`."""

    def __init__(self, clock):
        self.expiries_ns = {"1": None, "2": None}
        self.second_page = threading.Event()
        self.second_page.set()
        self.requests = 0
        self.listing = CachedListing(
            MetadataCache(Telemetry(clock), clock),
            ("user",),
            self._load,
            CachePolicies.from_settings(30, 60).listing,
            self._on_read,
        )
        self.reads = 0

    def _on_read(self):
        self.reads += 1

    def _load(self, priority):
        self.requests += 1
        first, *others = (
            models.Checkpoint.from_fields(
                f"weights/{name}",
                tinker_path=f"tinker://run/weights/{name}",
                time_ns=10 - int(name),
                expires_at_ns=expires_at_ns,
                raw=b"{}",
            )
            for name, expires_at_ns in self.expiries_ns.items()
        )
        records = AccountRecords([first])
        priority.on_partial(records.table)
        assert self.second_page.wait(10)
        for record in others:
            records.add(record)
        priority.on_partial(records.table)
        return AccountListing.from_records(records)


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def server(time):
    return Server(time.clock)


def names(checkpoints):
    return [checkpoint.name for checkpoint in checkpoints]


def test_peek_sends_no_request(server):
    assert server.listing.peek(CTX) is None
    listing = server.listing.get(CTX)
    assert server.listing.peek(CTX) is server.listing.get(CTX) is listing
    assert (server.requests, server.reads) == (1, 2)


def test_last_changed_is_none_until_a_reload_differs(server, time):
    server.listing.get(CTX)
    server.listing.reload()
    assert server.listing.last_changed_ns() is None
    del server.expiries_ns["2"]
    server.listing.reload()
    assert server.listing.last_changed_ns() == int(time.now * 1e9)


def test_expire_requests_again_at_the_next_read(server):
    server.listing.get(CTX)
    assert not server.listing.prefetch()
    server.listing.expire()
    server.listing.get(CTX)
    assert server.requests == 2


def test_iter_yields_arrived_items_of_a_slow_listing(server):
    server.second_page.clear()
    items = server.listing.iter(CTX)
    assert next(items).name == "1"
    validity = Validity()
    assert server.listing.peek_partial(KEY, CTX.tracking(validity)).name == "1"
    assert validity.is_uncacheable
    assert server.listing.peek_partial(("run", "weights", "2"), CTX) is None
    server.second_page.set()
    assert names(items) == ["2"]


@pytest.mark.parametrize("is_slow", [False, True])
def test_visible_listing_leaves_out_the_trash(server, time, tmp_path, is_slow):
    with MetadataStore(tmp_path) as store, Trash(store, "url", lambda: "key", time.clock) as trash:
        visible = VisibleListing(server.listing, trash, trash.visible_in_account)
        assert visible.peek(CTX) is None
        assert visible.last_changed_ns() is None
        checkpoint = server.listing.get(CTX).get(KEY)
        record = trash.plan(checkpoint, 86_400)
        trash.mark_set(record)
        assert server.listing.last_changed_ns() is None
        assert visible.last_changed_ns() == int(time.now * 1e9)
        server.expiries_ns["1"] = record.expires_at_ns
        server.listing.reload()
        assert names(server.listing.get(CTX)) == ["1", "2"]
        assert names(visible.get(CTX)) == names(visible.peek(CTX)) == ["2"]
        if is_slow:
            server.listing._cache.clear()
            server.second_page.clear()
            threading.Timer(1, server.second_page.set).start()
        assert names(visible.iter(CTX)) == ["2"]
