"""Trash records against server listings, across crashes, processes and keys."""

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.clocks import FakeTime
from tests.support.mount import wait_until
from tinkerfs.api import models
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.account_listing import AccountListing
from tinkerfs.catalog.listings import CheckpointListing
from tinkerfs.catalog.trash import SETTLED_S, Trash, TrashState

URL = "http://server.invalid"
RUN = "run-1"
DAY_S = 86_400
NS = 1_000_000_000


def listing(*checkpoints, run_id=RUN):
    """Return a run's listing of (name, time in s, expiry in s or None)."""
    records = (
        models.Checkpoint.from_fields(
            f"weights/{name}",
            tinker_path=f"tinker://{run_id}/weights/{name}",
            time_ns=int(time_s * NS),
            expires_at_ns=None if expires_at_s is None else int(expires_at_s * NS),
            raw=b"{}",
        )
        for name, time_s, expires_at_s in checkpoints
    )
    return CheckpointListing.from_records(run_id, records)


def names(checkpoints):
    return sorted(checkpoint.name for checkpoint in checkpoints)


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def opened(tmp_path, time):
    """Return a function that opens the trash as another process does: `opened(key="a")`."""
    with ExitStack() as stack:

        def make(key="a", directory=tmp_path):
            store = stack.enter_context(MetadataStore(directory))
            return stack.enter_context(Trash(store, URL, lambda: key, time.clock))

        yield make


def trashed(trash, time, *, ttl_s=DAY_S, former_s=None, name="1"):
    """Remove a checkpoint up to the server's confirmation; return its listing afterwards."""
    [checkpoint] = listing((name, 100, former_s)).all
    trash.mark_set(trash.plan(checkpoint, ttl_s))
    return listing((name, 100, math.floor(time.now) + ttl_s))


# --- checkpoints in the trash --------------------------------------------------------------------


def test_visible_with_a_confirmed_removal_excludes_it(opened, time):
    trash = opened()
    current = trashed(trash, time)
    assert names(trash.visible(RUN, current).all) == []
    assert trash.visible(RUN, current).kinds == ("weights",)
    assert names(trash.of_run(RUN, current)) == ["1"]
    user = AccountListing.from_checkpoints(current.all)
    assert names(trash.visible_in_account(user)) == []
    assert trash.visible_in_account(user) is trash.visible_in_account(user)


def test_visible_without_records_is_the_listing_itself(opened):
    trash, current = opened(), listing(("1", 100, None))
    assert trash.visible(RUN, current) is current
    assert trash.visible_in_account(user := AccountListing.from_checkpoints(current.all)) is user


@pytest.mark.parametrize("expires_in_s", [None, DAY_S + 10, 30 * DAY_S])
def test_visible_after_the_expiry_was_postponed_includes_it(opened, time, expires_in_s):
    trash = opened()
    trash.reconcile(RUN, trashed(trash, time))
    expires_at_s = None if expires_in_s is None else math.floor(time.now) + expires_in_s
    assert names(trash.visible(RUN, listing(("1", 100, expires_at_s))).all) == ["1"]


def test_visible_after_the_expiry_was_advanced_excludes_it(opened, time):
    trash = opened()
    trash.reconcile(RUN, trashed(trash, time))
    assert names(trash.visible(RUN, listing(("1", 100, time.now + 60))).all) == []


def test_visible_with_another_version_includes_it(opened, time):
    trash = opened()
    trashed(trash, time)
    assert names(trash.visible(RUN, listing(("1", 101, time.now + DAY_S))).all) == ["1"]


def test_visible_with_a_skewed_server_clock_excludes_it(opened, time):
    trash = opened()
    trashed(trash, time)
    assert names(trash.visible(RUN, listing(("1", 100, time.now + 3 * DAY_S))).all) == []


def test_visible_with_a_plan_alone_includes_it(opened, time):
    trash = opened()
    before = listing(("1", 100, time.now + 9 * DAY_S))
    assert trash.plan(*before.all, DAY_S).state is TrashState.PLANNED
    assert names(opened().visible(RUN, before).all) == ["1"]
    # An expiry that a user sets after the crash is not a removal either.
    assert names(opened().visible(RUN, listing(("1", 100, time.now + 2 * DAY_S))).all) == ["1"]


@pytest.mark.parametrize("former_s", [None, 9 * DAY_S])
def test_visible_with_the_former_expiry_listed_includes_it(opened, time, former_s):
    trash = opened()
    former_s = None if former_s is None else time.now + former_s
    trashed(trash, time, former_s=former_s)
    assert names(trash.visible(RUN, listing(("1", 100, former_s))).all) == ["1"]


def test_visible_with_a_plan_and_its_expiry_excludes_it(opened, time):
    trash = opened()
    trash.plan(*listing(("1", 100, None)).all, DAY_S)
    current = listing(("1", 100, math.floor(time.now) + DAY_S))
    other = opened()
    assert names(other.visible(RUN, current).all) == []
    other.reconcile(RUN, current)
    assert other.record(*current.all).state is TrashState.LISTED


def test_plan_with_an_earlier_expiry_needs_no_request(opened, time):
    trash = opened()
    current = listing(("1", 100, time.now + 7200))
    record = trash.plan(*current.all, DAY_S)
    assert record.state is TrashState.LISTED
    assert record.expires_at_ns == record.former_expires_at_ns
    assert names(trash.visible(RUN, current).all) == []


def test_plan_with_the_expiry_of_a_fast_server_needs_no_request(opened, time):
    # The server's clock is 300 s ahead: a request would set the expiry that is listed already.
    trash = opened()
    current = listing(("1", 100, time.now + 300 + DAY_S))
    assert trash.plan(*current.all, DAY_S).state is TrashState.LISTED
    assert names(trash.visible(RUN, current).all) == []


# --- discarded records ---------------------------------------------------------------------------


def test_reconcile_of_a_plan_without_effect_discards_it_later(opened, time):
    trash = opened()
    before = listing(("1", 100, None))
    trash.plan(*before.all, DAY_S)
    time.advance(SETTLED_S - 1)
    trash.reconcile(RUN, before)
    assert trash.has_run(RUN)
    time.advance(2)
    trash.reconcile(RUN, before)
    assert not trash.has_run(RUN)
    assert not opened().has_run(RUN)


@pytest.mark.parametrize("since", [(), (("1", 101, None),)])
def test_reconcile_of_a_deleted_checkpoint_discards_it_later(opened, time, since):
    trash = opened()
    trashed(trash, time)
    gone = listing(*since)
    trash.reconcile(RUN, gone)
    assert trash.has_run(RUN)  # a server with eventual consistency may list it again
    time.advance(2 * DAY_S + 2)
    trash.reconcile(RUN, gone)
    assert not trash.has_run(RUN)


def test_former_ttl_below_an_hour_becomes_an_hour(opened, time):
    trash = opened()
    record = trash.plan(*listing(("1", 100, time.now + 7200)).all, 3600)
    assert record.former_ttl_s(time.now) == 7200
    assert record.former_ttl_s(time.now + 7000) == 3600
    assert record.former_ttl_s(time.now + 9000) == 3600
    assert trash.plan(*listing(("2", 100, None)).all, 3600).former_ttl_s(time.now) is None


# --- the store -----------------------------------------------------------------------------------


def test_plan_with_an_unwritable_store_raises(opened, tmp_path):
    trash = opened()
    (tmp_path / "metadata.sqlite3").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"removed or replaced .*hint: mount again"):
        trash.plan(*listing(("1", 100, None)).all, DAY_S)
    assert not trash.has_run(RUN)


@pytest.mark.expect_warnings("created again|goes on without")
def test_plan_with_a_closed_store_raises(opened, tmp_path):
    (tmp_path / "metadata.sqlite3").mkdir()
    trash = opened()
    with pytest.raises(OSError, match="is not open"):
        trash.plan(*listing(("1", 100, None)).all, DAY_S)


def test_trash_sees_changes_by_another_process(opened, time):
    one, other = opened(), opened()
    generation = other.generation
    current = trashed(one, time)
    wait_until(lambda: other.generation != generation)
    assert names(other.visible(RUN, current).all) == []
    other.discard(other.record(*current.all))
    wait_until(lambda: not one.has_run(RUN))
    assert names(one.visible(RUN, current).all) == ["1"]


def test_trash_ignores_malformed_records_in_the_store(opened, tmp_path, time):
    with MetadataStore(tmp_path) as store:
        for number, value in enumerate((b"", b"{}", b"[" * 10_000, b'{"run_id": 1}', b"\xff")):
            store.put_durable(f"trash {URL}", str(number), value)
    trash = opened()
    assert trash.run_ids() == []
    assert names(trash.visible(RUN, trashed(trash, time)).all) == []


def test_trash_distinguishes_odd_names(opened, time):
    trash = opened()
    odd = ["a\nb", "\udcff", 'quote"', "ü", "a", "b"]
    for name in odd:
        trashed(trash, time, name=name)
    later = [(name, 100, time.now + DAY_S) for name in odd]
    again = opened()
    assert names(again.of_run(RUN, listing(*later))) == sorted(odd)


def test_store_files_do_not_contain_the_key(opened, tmp_path, time):
    trashed(opened(key="secret-digest"), time)
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"weights" in data
    assert b"secret" not in data


# --- accounts ------------------------------------------------------------------------------------


def test_trash_of_another_key_counts_for_own_runs_only(opened, time):
    current = trashed(opened(key="a"), time)
    other = opened(key="b")
    assert names(other.visible(RUN, current).all) == ["1"]
    assert other.run_ids() == []
    assert other.unknown_run_ids() == {RUN}
    other.add_own_runs(["run-2"])
    assert names(other.visible(RUN, current).all) == ["1"]
    other.add_own_runs([RUN])
    assert names(other.visible(RUN, current).all) == []
    assert other.run_ids() == [RUN]


def test_trash_after_a_key_rotation_in_the_mount_counts(tmp_path, time):
    keys = ["a"]
    with MetadataStore(tmp_path) as store, Trash(store, URL, lambda: keys[-1], time.clock) as trash:
        current = trashed(trash, time)
        assert names(trash.visible(RUN, current).all) == []
        keys.append("b")
        assert names(trash.visible(RUN, current).all) == []


def test_trash_of_another_server_does_not_count(opened, tmp_path, time):
    current = trashed(opened(), time)
    with (
        MetadataStore(tmp_path) as store,
        Trash(store, f"{URL}2", lambda: "a", time.clock) as other,
    ):
        assert names(other.visible(RUN, current).all) == ["1"]


# --- removals, crashes, restorations and changes by other clients in any order -------------------


class TrashMachine(RuleBasedStateMachine):
    """A visible listing is the server's listing minus the checkpoints that the model removed."""

    def __init__(self):
        super().__init__()
        self.stack = ExitStack()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # each record is synced
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        self.time = FakeTime()
        self.server = dict.fromkeys(("1", "2", "3"), (100.0, None))
        self.removed = set()
        self.process = None
        self.restart()

    @initialize(skew_s=st.sampled_from([-300, 0, 300]))
    def set_clock(self, skew_s):
        self.skew_s = skew_s

    def teardown(self):
        self.process.close()
        self.stack.close()

    def _expiring(self, name, ttl_s):
        expires_at_s = None if ttl_s is None else math.floor(self.time.now + self.skew_s) + ttl_s
        self.server[name] = (self.server[name][0], expires_at_s)

    def _listed(self):
        current = listing(*((name, *values) for name, values in self.server.items()))
        self.trash.reconcile(RUN, current)
        return current

    @rule()
    def restart(self):
        """Start a new process, as after a crash."""
        if self.process is not None:
            self.process.close()
        self.process = ExitStack()
        store = self.process.enter_context(MetadataStore(self.directory))
        self.trash = self.process.enter_context(Trash(store, URL, lambda: "key", self.time.clock))

    @rule(
        name=st.sampled_from("123"),
        ttl_s=st.sampled_from([3600, DAY_S]),
        crash=st.sampled_from([None, "before the request", "after the request"]),
    )
    def remove(self, name, ttl_s, crash):
        checkpoint = self.trash.visible(RUN, self._listed()).get("weights", name)
        if checkpoint is None:
            return
        record = self.trash.plan(checkpoint, ttl_s)
        if record.state is TrashState.PLANNED:
            if crash == "before the request":
                self.restart()
                return
            self._expiring(name, ttl_s)
            if crash is None:
                self.trash.mark_set(record)
        if crash is not None:
            self.restart()
        self.removed.add(name)

    @rule(
        name=st.sampled_from("123"),
        crash=st.sampled_from([None, "before the request", "after the request"]),
    )
    def restore(self, name, crash):
        checkpoint = self._listed().get("weights", name)
        if checkpoint is None or name not in self.removed:
            return
        record = self.trash.record(checkpoint)
        if checkpoint.record.expires_at_ns != record.former_expires_at_ns:
            if crash == "before the request":
                self.restart()
                return
            self._expiring(name, record.former_ttl_s(self.time.now))
            if crash == "after the request":
                self.removed.remove(name)
                self.restart()
                return
        self.trash.discard(record)
        self.removed.remove(name)

    @rule(name=st.sampled_from("123"))
    def save_again(self, name):
        self.server[name] = (self.time.now, None)
        self.removed.discard(name)

    @rule(name=st.sampled_from("123"), ttl_s=st.sampled_from([None, 10 * DAY_S]))
    def postpone_by_another_client(self, name, ttl_s):
        if name in self.server:
            self._expiring(name, ttl_s)
            self.removed.discard(name)

    @rule(name=st.sampled_from("123"), ttl_s=st.sampled_from([None, 3600, 5 * DAY_S]))
    def set_expiry(self, name, ttl_s):
        checkpoint = self.trash.visible(RUN, self._listed()).get("weights", name)
        if checkpoint is not None:
            record = self.trash.record(checkpoint)
            if record is not None:
                self.trash.discard(record)
            self._expiring(name, ttl_s)

    @rule(seconds=st.sampled_from([1, SETTLED_S + 1, 3000, DAY_S // 2, 3 * DAY_S]))
    def advance(self, seconds):
        self.time.advance(seconds)
        for name, (_, expires_at_s) in list(self.server.items()):
            if expires_at_s is not None and expires_at_s <= self.time.now + self.skew_s:
                del self.server[name]
                self.removed.discard(name)

    @invariant()
    def listings_exclude_the_trash(self):
        current = self._listed()
        visible = sorted(self.server.keys() - self.removed)
        assert names(self.trash.visible(RUN, current).all) == visible
        assert names(self.trash.of_run(RUN, current)) == sorted(self.removed)
        user = AccountListing.from_checkpoints(current.all)
        assert names(self.trash.visible_in_account(user)) == visible


TestTrashMachine = TrashMachine.TestCase
TestTrashMachine.settings = settings(max_examples=40, stateful_step_count=20)
