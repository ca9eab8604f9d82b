"""Walks over made-up accounts: recognised late enough, followed, and nothing asked twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.catalog import prefetcher
from tinkerfs.catalog.listings import Checkpoint, CheckpointListing, RunListing
from tinkerfs.catalog.prefetcher import (
    WALK_WINDOW_S,
    OrderIndex,
    TraversalOrder,
    TraversalPrefetcher,
    in_order,
)
from tinkerfs.context import Priority

MOST = 16


class Account:
    """Runs with checkpoints, and somebody who goes through them; what is asked ahead comes late.

    Attributes:
        asked: every call, in order, whoever made it.
        ahead: how many of these were asked ahead.
    """

    def __init__(self, runs, most=MOST):
        self.runs = RunListing.from_runs(
            models.TrainingRun(run_id=run_id, raw=b"{}") for run_id in runs
        )
        self.listings = {
            run_id: CheckpointListing.of(
                run_id, (models.Checkpoint.of(checkpoint_id=name, raw=b"{}") for name in names)
            )
            for run_id, names in runs.items()
        }
        self.time = FakeTime()
        self.walks = TraversalPrefetcher(most, self.time.clock)
        self.asked, self.ahead = [], 0
        self.most_ahead = 0
        self._under_way = []

    def look_into(self, run_id):
        if self.walks.is_ahead(run_id):
            self._go(self.walks.on_run_access(run_id, self.runs))
        if run_id not in self.asked:
            self._go(self.walks.on_run_access(run_id, self.runs))
            self._ask(run_id)
        self._come(run_id)
        return self.listings[run_id]

    def read_info(self, checkpoint, knows_siblings=True):
        siblings = self.listings[checkpoint.run_id] if knows_siblings else None
        if self.walks.is_ahead(checkpoint.key) or checkpoint.key not in self.asked:
            self._go(self.walks.on_info_access(checkpoint, siblings, self.runs))
        if checkpoint.key not in self.asked:
            self._ask(checkpoint.key)
        self._come(checkpoint.key)

    def walk(self, order, *, infos=True):
        places = OrderIndex(self.runs.by_id)
        for at in range(len(places)):
            listing = self.look_into(places.name(order, at))
            for checkpoint in in_order(listing, order) if infos else ():
                self.read_info(checkpoint)

    def _ask(self, key):
        assert key not in self.asked
        self.asked.append(key)
        self._under_way.append(key)

    def _come(self, key):
        """Let everything come that was asked for up to a key."""
        while key in self._under_way:
            come = self._under_way.pop(0)
            if isinstance(come, str):
                for walk in self.walks.listed(come, self.listings[come]):
                    self._go(walk)

    def _go(self, walk):
        while walk is not None and (step := self.walks.next(walk)) is not None:
            key = step if isinstance(step, str) else step.key
            if key not in self.asked:
                self._ask(key)
                self.ahead += 1
                self.most_ahead = max(self.most_ahead, len(walk.outstanding))
                continue
            if isinstance(step, str) and step not in self._under_way:
                self.walks.listed(step, self.listings[step])
            self.walks.drop(walk, step)


def numbered(runs, checkpoints=3):
    names = [f"weights/{n}" for n in range(checkpoints)]
    return {f"r{n:03}": names for n in range(runs)}


def shuffled(runs):
    """The same, listed in an order in which no two stand beside each other that do by name."""
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
def test_a_whole_walk_asks_for_everything_once_and_never_far_ahead(runs, order, infos, most):
    account = Account(runs, most)
    account.walk(order, infos=infos)
    wanted = {*account.runs.by_id}
    if infos:
        wanted |= {c.key for listing in account.listings.values() for c in in_order(listing, order)}
    assert set(account.asked) == wanted
    assert len(account.asked) == len(wanted)
    assert account.most_ahead <= 2 * most


@given(ACCOUNTS, st.data())
def test_looks_in_any_order_ask_for_nothing_that_is_not_there_and_nothing_twice(runs, data):
    account = Account(runs)
    every = [c for listing in account.listings.values() for c in listing.all]
    looks = st.sampled_from([*runs, *every]) if runs else st.nothing()
    for look in data.draw(st.lists(looks, max_size=30)) if runs else ():
        if isinstance(look, str):
            account.look_into(look)
        else:
            account.read_info(look)
        account.time.advance(data.draw(st.sampled_from([0, 1, WALK_WINDOW_S + 1])))
    assert set(account.asked) <= {*runs, *(c.key for c in every)}


@given(ACCOUNTS, st.sampled_from(list(TraversalOrder)))
def test_places(runs, order):
    places = OrderIndex(runs)
    row = [places.name(order, place) for place in range(len(places))]
    wanted = sorted(runs) if order.is_by_name else list(runs)
    assert row == (wanted[::-1] if order.is_backwards else wanted)
    assert [places.place(order, name) for name in row] == list(range(len(row)))
    assert places.place(order, "absent") is None


@pytest.mark.parametrize("order", list(TraversalOrder))
def test_one_run_is_no_walk_and_the_second_beside_it_is(order):
    account = Account(shuffled(numbered(40)))
    places = OrderIndex(account.runs.by_id)
    account.look_into(places.name(order, 5))
    account.look_into(places.name(order, 5))
    assert account.ahead == 0
    account.look_into(places.name(order, 6))
    assert account.asked[1:5] == [places.name(order, at) for at in range(7, 11)]


def test_runs_that_are_not_beside_each_other_are_no_walk():
    account = Account(numbered(40))
    for run_id in ("r005", "r010", "r012", "r020"):
        account.look_into(run_id)
    assert account.ahead == 0


def test_runs_beside_each_other_at_long_intervals_are_no_walk():
    account = Account(numbered(40))
    for number in range(5):
        account.look_into(f"r{number:03}")
        account.time.advance(WALK_WINDOW_S + 0.1)
    assert account.ahead == 0


def test_more_is_asked_ahead_only_as_the_walk_goes_on():
    account = Account(numbered(100))
    ahead = []
    for number in range(8):
        account.look_into(f"r{number:03}")
        ahead.append(len(account.asked) - number - 1)
    assert ahead == [0, 4, 8, MOST, MOST, MOST, MOST, MOST]


def test_a_walk_for_weights_infos_has_them_asked_from_the_first_of_the_next_run():
    account = Account(numbered(10, checkpoints=4))
    for run_id in ("r000", "r001"):
        for checkpoint in in_order(account.look_into(run_id), TraversalOrder.BY_NAME):
            account.read_info(checkpoint)
    assert ("r002", "weights", "0") in account.asked
    assert "r003" in account.asked


def test_the_first_weights_info_has_a_few_asked_ahead_and_the_next_ones_more():
    account = Account(numbered(1, checkpoints=100))
    row = in_order(account.look_into("r000"), TraversalOrder.BY_NAME)
    ahead = []
    for number in range(3, 8):
        account.read_info(row[number])
        ahead.append(account.ahead - (number - 3))
    assert ahead == [4, 8, MOST, MOST, MOST]
    assert set(account.asked[1:]) == {each.key for each in row[3 : 8 + MOST]}


@pytest.mark.parametrize("order", list(TraversalOrder))
def test_the_second_weights_info_tells_the_order(order):
    # Listed in steps of eight: what stands beside a name in one order does not in the other.
    names = [f"weights/{n:02}" for n in sorted(range(40), key=lambda n: n % 8)]
    account = Account({"r000": names})
    row = in_order(account.look_into("r000"), order)
    account.read_info(row[20])
    guessed = list(account.asked)
    account.read_info(row[21])
    coming = [each.key for each in row[22:] if each.key not in guessed]
    asked = [key for key in account.asked[len(guessed) :] if key != row[21].key]
    assert asked == coming[: len(asked)]
    assert len(asked) >= 4


def test_who_has_no_order_is_not_asked_for_one_again_and_again(monkeypatch):
    account = Account(numbered(1, checkpoints=400))
    row = in_order(account.look_into("r000"), TraversalOrder.BY_NAME)
    sought = []
    monkeypatch.setattr(prefetcher, "_are_next", lambda *args: sought.append(args) or False)
    for number in range(400):
        account.read_info(row[number * 37 % 400])
    assert len(sought) <= 10 * len(TraversalOrder)


def test_who_asks_for_one_weights_info_of_a_run_and_no_more_has_four_others_asked():
    account = Account(numbered(1, checkpoints=100))
    account.read_info(in_order(account.look_into("r000"), TraversalOrder.BY_NAME)[50])
    for _ in range(3):
        account._come(account.asked[-1])
        account.time.advance(WALK_WINDOW_S)
    assert account.ahead == 4


@given(st.permutations(range(12)))
def test_who_asks_for_infos_in_no_order_soon_has_all_of_them_asked(numbers):
    account = Account(numbered(1, checkpoints=12))
    row = in_order(account.look_into("r000"), TraversalOrder.LISTED)
    for number in numbers[:6]:
        account.read_info(row[number])
    assert len(account.asked) == 13


def test_a_walk_in_another_order_than_it_seemed_is_followed_from_its_third_run():
    # Two stand beside each other in both orders.
    names = ["r000", "r001", *(f"r{n:03}" for n in range(2, 40, 2))]
    names += [f"r{n:03}" for n in range(3, 40, 2)]
    account = Account(dict.fromkeys(names, ()))
    account.walk(TraversalOrder.BY_NAME)
    assert len(account.asked) == len(names)
    assert account.ahead > len(names) / 2


def test_two_who_walk_at_a_time_are_both_followed():
    account = Account(numbered(200))
    for number in range(20):
        account.look_into(f"r{number:03}")
        account.look_into(f"r{100 + number:03}")
    assert {"r020", "r030", "r120", "r130"} <= set(account.asked)


def test_who_stops_is_asked_nothing_ahead_any_more():
    account = Account(numbered(40))
    account.look_into("r000")
    account.look_into("r001")
    account.time.advance(WALK_WINDOW_S + 0.1)
    (run_id,) = [r for r in account.asked if account.walks.is_ahead(r)][:1]
    asked = list(account.asked)
    account._come(asked[-1])
    assert account.asked == asked
    account.look_into("r030")
    assert not account.walks.is_ahead(run_id)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_an_outage_ends_asking_ahead_unless_somebody_waits(is_awaited):
    account = Account(numbered(40))
    account.look_into("r000")
    account.look_into("r001")
    assert account.walks.is_ahead("r003")
    with (
        pytest.raises(errors.ServerError),
        account.walks.stop_on_outage("r002", Priority(is_demand=is_awaited)),
    ):
        raise errors.ServerError("down")
    assert account.walks.is_ahead("r003") == is_awaited


def test_unknown_runs_and_siblings_are_no_walk():
    walks = TraversalPrefetcher(MOST, FakeTime().clock)
    for number in range(3):
        assert walks.on_run_access(f"r{number}", None) is None
        record = models.Checkpoint.of(checkpoint_id=f"weights/{number}", raw=b"{}")
        assert walks.on_info_access(Checkpoint.from_record("r", record), None, None) is None
    walks.clear()
