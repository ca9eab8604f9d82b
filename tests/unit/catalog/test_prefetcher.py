"""Prefetches for traversals of generated accounts, without duplicate requests."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.catalog import prefetcher
from tinkerfs.catalog.listings import Checkpoint, CheckpointListing, RunListing
from tinkerfs.catalog.prefetcher import (
    TRAVERSAL_TIMEOUT_S,
    OrderIndex,
    TraversalOrder,
    TraversalPrefetcher,
    in_order,
)
from tinkerfs.context import Priority

MAX_WINDOW = 16


class Account:
    """An account and a client process that traverses it; prefetches complete late.

    Attributes:
        requested: the keys of all requests in order, prefetches included.
        prefetch_count: number of prefetches.
        max_outstanding: largest number of outstanding prefetches of a traversal.
    """

    def __init__(self, runs, max_window=MAX_WINDOW):
        self.runs = RunListing.from_runs(
            models.TrainingRun(run_id=run_id, raw=b"{}") for run_id in runs
        )
        self.listings = {
            run_id: CheckpointListing.from_records(
                run_id,
                (models.Checkpoint.from_fields(checkpoint_id=name, raw=b"{}") for name in names),
            )
            for run_id, names in runs.items()
        }
        self.time = FakeTime()
        self.prefetcher = TraversalPrefetcher(max_window, self.time.clock)
        self.requested, self.prefetch_count = [], 0
        self.max_outstanding = 0
        self._in_flight = []

    def list_run(self, run_id):
        if self.prefetcher.is_prefetched(run_id):
            self._prefetch(self.prefetcher.on_run_access(run_id, self.runs))
        if run_id not in self.requested:
            self._prefetch(self.prefetcher.on_run_access(run_id, self.runs))
            self._request(run_id)
        self._complete(run_id)
        return self.listings[run_id]

    def read_info(self, checkpoint, knows_siblings=True):
        siblings = self.listings[checkpoint.run_id] if knows_siblings else None
        if self.prefetcher.is_prefetched(checkpoint.key) or checkpoint.key not in self.requested:
            self._prefetch(self.prefetcher.on_info_access(checkpoint, siblings, self.runs))
        if checkpoint.key not in self.requested:
            self._request(checkpoint.key)
        self._complete(checkpoint.key)

    def traverse(self, order, *, infos=True):
        index = OrderIndex(self.runs.by_id)
        for position in range(len(index)):
            listing = self.list_run(index.name(order, position))
            for checkpoint in in_order(listing, order) if infos else ():
                self.read_info(checkpoint)

    def _request(self, key):
        assert key not in self.requested
        self.requested.append(key)
        self._in_flight.append(key)

    def _complete(self, key):
        """Complete every request up to the one with a key."""
        while key in self._in_flight:
            completed = self._in_flight.pop(0)
            if isinstance(completed, str):
                for traversal in self.prefetcher.on_listing(completed, self.listings[completed]):
                    self._prefetch(traversal)

    def _prefetch(self, traversal):
        while traversal is not None and (item := self.prefetcher.next(traversal)) is not None:
            key = item if isinstance(item, str) else item.key
            if key not in self.requested:
                self._request(key)
                self.prefetch_count += 1
                self.max_outstanding = max(self.max_outstanding, len(traversal.outstanding))
                continue
            if isinstance(item, str) and item not in self._in_flight:
                self.prefetcher.on_listing(item, self.listings[item])
            self.prefetcher.drop(traversal, item)


def numbered(runs, checkpoints=3):
    names = [f"weights/{n}" for n in range(checkpoints)]
    return {f"r{n:03}": names for n in range(runs)}


def shuffled(runs):
    """Return the runs in an order in which no neighbours are neighbours by name."""
    names = sorted(runs)
    return {name: runs[name] for name in names[::2] + names[1::2]}


ACCOUNTS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.sampled_from(["", "weights/", "sampler_weights/"]), st.text("xyz", min_size=1)
        ).map("".join),
        max_size=5,
        unique=True,
    ),
    max_size=12,
)


@given(ACCOUNTS, st.sampled_from(list(TraversalOrder)), st.booleans(), st.integers(2, 20))
def test_traversal_requests_all_once_and_stays_within_its_window(runs, order, infos, max_window):
    account = Account(runs, max_window)
    account.traverse(order, infos=infos)
    wanted = {*account.runs.by_id}
    if infos:
        wanted |= {c.key for listing in account.listings.values() for c in in_order(listing, order)}
    assert set(account.requested) == wanted
    assert len(account.requested) == len(wanted)
    assert account.max_outstanding <= 2 * max_window


@given(ACCOUNTS, st.data())
def test_accesses_in_any_order_request_existing_keys_only_once(runs, data):
    account = Account(runs)
    every = [c for listing in account.listings.values() for c in listing.all]
    accesses = st.sampled_from([*runs, *every]) if runs else st.nothing()
    for access in data.draw(st.lists(accesses, max_size=30)) if runs else ():
        if isinstance(access, str):
            account.list_run(access)
        else:
            account.read_info(access)
        account.time.advance(data.draw(st.sampled_from([0, 1, TRAVERSAL_TIMEOUT_S + 1])))
    assert set(account.requested) <= {*runs, *(c.key for c in every)}


@given(ACCOUNTS, st.sampled_from(list(TraversalOrder)))
def test_order_index_converts_between_names_and_positions(runs, order):
    index = OrderIndex(runs)
    names = [index.name(order, position) for position in range(len(index))]
    wanted = sorted(runs) if order.is_by_name else list(runs)
    assert names == (wanted[::-1] if order.is_backwards else wanted)
    assert [index.position(order, name) for name in names] == list(range(len(names)))
    assert index.position(order, "absent") is None


@pytest.mark.parametrize("order", list(TraversalOrder))
def test_run_access_prefetches_from_the_second_adjacent_run_on(order):
    account = Account(shuffled(numbered(40)))
    index = OrderIndex(account.runs.by_id)
    account.list_run(index.name(order, 5))
    account.list_run(index.name(order, 5))
    assert account.prefetch_count == 0
    account.list_run(index.name(order, 6))
    assert account.requested[1:5] == [index.name(order, position) for position in range(7, 11)]


def test_run_access_to_distant_runs_prefetches_nothing():
    account = Account(numbered(40))
    for run_id in ("r005", "r010", "r012", "r020"):
        account.list_run(run_id)
    assert account.prefetch_count == 0


def test_run_access_at_long_intervals_prefetches_nothing():
    account = Account(numbered(40))
    for number in range(5):
        account.list_run(f"r{number:03}")
        account.time.advance(TRAVERSAL_TIMEOUT_S + 0.1)
    assert account.prefetch_count == 0


def test_run_access_widens_the_window_with_correct_predictions():
    account = Account(numbered(100))
    outstanding = []
    for number in range(8):
        account.list_run(f"r{number:03}")
        outstanding.append(len(account.requested) - number - 1)
    assert outstanding == [0, 4, 8, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW]


def test_info_access_in_two_runs_prefetches_infos_of_the_next():
    account = Account(numbered(10, checkpoints=4))
    for run_id in ("r000", "r001"):
        for checkpoint in in_order(account.list_run(run_id), TraversalOrder.BY_NAME):
            account.read_info(checkpoint)
    assert ("r002", "weights", "0") in account.requested
    assert "r003" in account.requested


def test_info_access_prefetches_a_few_siblings_then_more():
    account = Account(numbered(1, checkpoints=100))
    ordered = in_order(account.list_run("r000"), TraversalOrder.BY_NAME)
    outstanding = []
    for number in range(3, 8):
        account.read_info(ordered[number])
        outstanding.append(account.prefetch_count - (number - 3))
    assert outstanding == [4, 8, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW]
    assert set(account.requested[1:]) == {each.key for each in ordered[3 : 8 + MAX_WINDOW]}


@pytest.mark.parametrize("order", list(TraversalOrder))
def test_info_access_twice_reveals_the_order(order):
    # Listed in steps of eight: neighbours in one order are not neighbours in the other.
    names = [f"weights/{n:02}" for n in sorted(range(40), key=lambda n: n % 8)]
    account = Account({"r000": names})
    ordered = in_order(account.list_run("r000"), order)
    account.read_info(ordered[20])
    guessed = list(account.requested)
    account.read_info(ordered[21])
    next_keys = [each.key for each in ordered[22:] if each.key not in guessed]
    requested = [key for key in account.requested[len(guessed) :] if key != ordered[21].key]
    assert requested == next_keys[: len(requested)]
    assert len(requested) >= 4


def test_info_access_without_order_stops_searching_for_one(monkeypatch):
    account = Account(numbered(1, checkpoints=400))
    ordered = in_order(account.list_run("r000"), TraversalOrder.BY_NAME)
    searches = []
    monkeypatch.setattr(prefetcher, "_are_next", lambda *args: searches.append(args) or False)
    for number in range(400):
        account.read_info(ordered[number * 37 % 400])
    assert len(searches) <= 10 * len(TraversalOrder)


def test_info_access_once_prefetches_four_siblings_only():
    account = Account(numbered(1, checkpoints=100))
    account.read_info(in_order(account.list_run("r000"), TraversalOrder.BY_NAME)[50])
    for _ in range(3):
        account._complete(account.requested[-1])
        account.time.advance(TRAVERSAL_TIMEOUT_S)
    assert account.prefetch_count == 4


@given(st.permutations(range(12)))
def test_info_access_without_order_soon_prefetches_all(numbers):
    account = Account(numbered(1, checkpoints=12))
    listing = account.list_run("r000")
    ordered = in_order(listing, TraversalOrder.LISTED)
    keys = [ordered[number].key for number in numbers[:6]]
    # Neighbours in an order suggest a traversal, which starts with a small window.
    assume(
        not any(
            prefetcher._are_next(listing, order, *pair)
            for order in TraversalOrder
            for pair in pairwise(keys)
        )
    )
    for number in numbers[:6]:
        account.read_info(ordered[number])
    assert len(account.requested) == 13


def test_traversal_in_another_order_is_recognised_at_run_three():
    # The first two runs are neighbours in both orders.
    names = ["r000", "r001", *(f"r{n:03}" for n in range(2, 40, 2))]
    names += [f"r{n:03}" for n in range(3, 40, 2)]
    account = Account(dict.fromkeys(names, ()))
    account.traverse(TraversalOrder.BY_NAME)
    assert len(account.requested) == len(names)
    assert account.prefetch_count > len(names) / 2


def test_two_concurrent_traversals_are_both_prefetched():
    account = Account(numbered(200))
    for number in range(20):
        account.list_run(f"r{number:03}")
        account.list_run(f"r{100 + number:03}")
    assert {"r020", "r030", "r120", "r130"} <= set(account.requested)


def test_traversal_that_stops_is_not_prefetched():
    account = Account(numbered(40))
    account.list_run("r000")
    account.list_run("r001")
    account.time.advance(TRAVERSAL_TIMEOUT_S + 0.1)
    (run_id,) = [r for r in account.requested if account.prefetcher.is_prefetched(r)][:1]
    requested = list(account.requested)
    account._complete(requested[-1])
    assert account.requested == requested
    account.list_run("r030")
    assert not account.prefetcher.is_prefetched(run_id)


@pytest.mark.parametrize("is_demand", [False, True])
def test_stop_on_outage_ends_the_traversal_of_a_prefetch(is_demand):
    account = Account(numbered(40))
    account.list_run("r000")
    account.list_run("r001")
    assert account.prefetcher.is_prefetched("r003")
    with (
        pytest.raises(errors.ServerError),
        account.prefetcher.stop_on_outage("r002", Priority(is_demand=is_demand)),
    ):
        raise errors.ServerError("down")
    assert account.prefetcher.is_prefetched("r003") == is_demand


def test_access_to_unknown_runs_and_siblings_starts_no_traversal():
    empty = TraversalPrefetcher(MAX_WINDOW, FakeTime().clock)
    for number in range(3):
        assert empty.on_run_access(f"r{number}", None) is None
        record = models.Checkpoint.from_fields(checkpoint_id=f"weights/{number}", raw=b"{}")
        assert empty.on_info_access(Checkpoint.from_record("r", record), None, None) is None
    empty.clear()
