"""Prefetches for traversals of generated accounts, without duplicate requests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tinkerfs.api import models
from tinkerfs.catalog.listings import CheckpointListing, RunListing
from tinkerfs.catalog.order_index import Order, OrderIndex
from tinkerfs.catalog.prefetcher import (
    MAX_TRAVERSALS,
    TRAVERSAL_TIMEOUT_S,
    SequencePrefetcher,
    following_checkpoint,
)

MAX_WINDOW = 16


class Account:
    """An account and the client processes that traverse it; responses arrive with the next read.

    Attributes:
        requested: the keys of all requests in order, prefetches included.
        prefetched: the keys of prefetches that were not read yet.
        prefetch_count: number of prefetches.
        max_ahead: largest number of prefetches that were not read yet.
        is_failing: whether the circuit breaker is open.
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
        self.requested, self.prefetched = [], set()
        self.prefetch_count = self.max_ahead = 0
        self.is_failing = False
        self.run_prefetcher = self._prefetcher(
            lambda run_id, order: self.runs.order.next(run_id, order), max_window
        )
        self.info_prefetcher = self._prefetcher(
            lambda key, order: following_checkpoint(key, order, self.runs, self._listed),
            max_window,
            group=lambda key: key[0],
        )

    def _prefetcher(self, following, max_window, **options):
        return SequencePrefetcher(
            following,
            self._prefetch,
            lambda: not self.is_failing,
            max_window,
            self.time.clock,
            **options,
        )

    def _listed(self, run_id):
        return self.listings[run_id] if run_id in self.requested else None

    def _prefetch(self, key):
        if key in self.requested:
            return False
        self.requested.append(key)
        self.prefetched.add(key)
        self.prefetch_count += 1
        self.max_ahead = max(self.max_ahead, len(self.prefetched))
        return True

    def list_run(self, run_id):
        self._read(self.run_prefetcher, run_id)
        return self.listings[run_id]

    def read_info(self, checkpoint):
        self._read(self.info_prefetcher, checkpoint.key)

    def _read(self, prefetcher, key):
        self.prefetched.discard(key)
        prefetcher.on_read(key)
        if key not in self.requested:
            prefetcher.on_access(key)
            assert key not in self.requested
            self.requested.append(key)

    def traverse(self, order, *, infos=True):
        for run_id in in_order(self.runs, order):
            listing = self.list_run(run_id)
            for checkpoint in in_order(listing, order) if infos else ():
                self.read_info(checkpoint)


def in_order(listing, order):
    """Return all runs, or the checkpoints of a run, in an order."""
    index = listing.order
    items = index._by_name if order.is_by_name else index._listed
    return items[:: order.step]


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
ORDERS = list(Order)


@given(ACCOUNTS, st.sampled_from(ORDERS), st.booleans(), st.integers(2, 20))
def test_traversal_requests_all_once_and_stays_within_its_window(runs, order, infos, max_window):
    account = Account(runs, max_window)
    account.traverse(order, infos=infos)
    wanted = {*account.runs.by_id}
    if infos:
        wanted |= {c.key for listing in account.listings.values() for c in listing.all}
    assert set(account.requested) == wanted
    assert len(account.requested) == len(wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_traversal_prefetches_nearly_all_within_its_window(order):
    account = Account(shuffled(numbered(40)))
    account.traverse(order)
    assert account.max_ahead <= 2 * MAX_WINDOW
    assert len(account.requested) - account.prefetch_count <= 6
    assert account.prefetched == set()


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


@given(st.lists(st.text("abc"), unique=True), st.sampled_from(ORDERS))
def test_order_index_iterates_in_each_order(names, order):
    index = OrderIndex(names)
    wanted = sorted(names) if order.is_by_name else list(names)
    wanted = wanted[:: order.step]
    assert index.first(order) == (wanted[0] if wanted else None)
    assert [index.next(name, order) for name in wanted] == [*wanted[1:], None][: len(wanted)]
    assert [index.next(name, order.reversed) for name in wanted] == [None, *wanted][: len(wanted)]
    assert index.next("absent", order) is None


@pytest.mark.parametrize("order", ORDERS)
def test_run_access_prefetches_from_the_second_adjacent_run_on(order):
    account = Account(shuffled(numbered(40)))
    names = in_order(account.runs, order)
    account.list_run(names[5])
    account.list_run(names[5])
    assert account.prefetch_count == 0
    account.list_run(names[6])
    assert account.requested == [names[5], *names[7:11], names[6]]


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
    ahead = []
    for number in range(8):
        account.list_run(f"r{number:03}")
        ahead.append(len(account.prefetched))
    assert ahead == [0, 4, 8, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW]


def test_run_access_past_skipped_runs_releases_their_places():
    account = Account(numbered(100))
    for number in (0, 1, 5, 13):
        account.list_run(f"r{number:03}")
    assert {f"r{number:03}" for number in range(14, 30)} <= account.prefetched


def test_run_access_after_cached_runs_continues_behind_them():
    account = Account(numbered(100))
    account.requested += [f"r{number:03}" for number in range(2, 30)]
    account.list_run("r000")
    account.list_run("r001")
    assert account.prefetched == {"r030", "r031", "r032", "r033"}


def test_info_access_continues_in_the_next_listed_run():
    account = Account(numbered(10, checkpoints=4))
    for run_id in ("r000", "r001", "r002"):
        account.list_run(run_id)
    for checkpoint in in_order(account.listings["r000"], Order.BY_NAME):
        account.read_info(checkpoint)
    assert ("r001", "weights", "0") in account.prefetched
    assert {key[0] for key in account.prefetched if isinstance(key, tuple)} <= {
        *(run_id for run_id in account.requested if isinstance(run_id, str))
    }


def test_info_access_prefetches_a_few_siblings_then_more():
    account = Account(numbered(1, checkpoints=100))
    ordered = in_order(account.list_run("r000"), Order.BY_NAME)
    ahead = []
    for number in range(3, 8):
        account.read_info(ordered[number])
        ahead.append(len(account.prefetched))
    assert ahead == [4, 8, MAX_WINDOW, MAX_WINDOW, MAX_WINDOW]
    assert set(account.requested[1:]) == {each.key for each in ordered[3 : 8 + MAX_WINDOW]}


@pytest.mark.parametrize("order", ORDERS)
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


@given(st.permutations(range(0, 400, 7)))
def test_info_access_without_order_prefetches_four_siblings_only(numbers):
    account = Account(numbered(1, checkpoints=400))
    by_name = in_order(account.list_run("r000"), Order.BY_NAME)
    for number in numbers:
        account.read_info(by_name[number])
    assert account.prefetch_count <= 4


def test_info_access_once_prefetches_four_siblings_only():
    account = Account(numbered(1, checkpoints=100))
    account.read_info(in_order(account.list_run("r000"), Order.BY_NAME)[50])
    assert account.prefetch_count == 4


def test_traversal_in_another_order_is_recognised_at_run_three():
    # The first two runs are neighbours in both orders.
    names = ["r000", "r001", *(f"r{n:03}" for n in range(2, 40, 2))]
    names += [f"r{n:03}" for n in range(3, 40, 2)]
    account = Account(dict.fromkeys(names, ()))
    account.traverse(Order.BY_NAME)
    assert len(account.requested) == len(names)
    assert account.prefetch_count > len(names) / 2


def test_two_concurrent_traversals_are_both_prefetched():
    account = Account(numbered(200))
    for number in range(20):
        account.list_run(f"r{number:03}")
        account.list_run(f"r{100 + number:03}")
    assert {"r020", "r030", "r120", "r130"} <= account.prefetched


def test_traversal_survives_some_accesses_elsewhere():
    account = Account(numbered(400))
    account.list_run("r000")
    account.list_run("r001")
    for number in range(100, 100 + 2 * (MAX_TRAVERSALS - 2), 2):
        account.list_run(f"r{number:03}")
    account.list_run("r002")
    assert "r010" in account.prefetched


def test_traversal_that_stops_is_not_prefetched():
    account = Account(numbered(40))
    account.list_run("r000")
    account.list_run("r001")
    account.time.advance(TRAVERSAL_TIMEOUT_S + 0.1)
    requested = list(account.requested)
    account.list_run("r003")
    assert account.requested == requested


def test_traversal_with_an_open_breaker_prefetches_nothing():
    account = Account(numbered(40))
    account.list_run("r000")
    account.is_failing = True
    for number in range(1, 5):
        account.list_run(f"r{number:03}")
    assert account.prefetch_count == 0
    account.is_failing = False
    account.list_run("r005")
    account.list_run("r006")
    assert account.prefetch_count == 4


def test_access_to_unknown_items_starts_no_traversal():
    account = Account({})
    for number in range(3):
        account.run_prefetcher.on_access(f"r{number}")
        account.info_prefetcher.on_access(("r", "weights", str(number)))
    account.run_prefetcher.clear()
    assert account.requested == []
