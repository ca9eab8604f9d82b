"""What is in the trash: records against what the server lists, over crashes, processes and keys."""

import json
import math
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.clocks import FakeTime
from tests.support.drivers import opened as mounted
from tests.support.mount import wait_until
from tests.support.server import demo_server, server  # noqa: F401
from tinkerfs.api import models
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.listings import AccountListing, CheckpointListing
from tinkerfs.catalog.trash import SETTLED_S, Trash, TrashState

LISTINGS = ("GET training_runs/{run}/checkpoints", "GET checkpoints")
URL = "http://server.invalid"
RUN = "run-1"
DAY_S = 86_400
NS = 1_000_000_000


def listing(*checkpoints, run_id=RUN):
    """A run's listing of (name, time in s, expiry in s or None)."""
    records = (
        models.Checkpoint.of(
            f"weights/{name}",
            tinker_path=f"tinker://{run_id}/weights/{name}",
            time_ns=int(time_s * NS),
            expires_at_ns=None if expires_at_s is None else int(expires_at_s * NS),
            raw=b"{}",
        )
        for name, time_s, expires_at_s in checkpoints
    )
    return CheckpointListing.of(run_id, records)


def names(checkpoints):
    return sorted(checkpoint.name for checkpoint in checkpoints)


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def opened(tmp_path, time):
    """Opens the trash as another process does: `opened(key="a")`."""
    with ExitStack() as stack:

        def make(key="a", folder=tmp_path):
            store = stack.enter_context(MetadataStore(folder))
            return stack.enter_context(Trash(store, URL, lambda: key, time.clock))

        yield make


def trashed(trash, time, *, ttl_s=DAY_S, former_s=None, name="1"):
    """Remove a checkpoint as far as the server's confirmation; return its listing since."""
    [checkpoint] = listing((name, 100, former_s)).all
    trash.mark_set(trash.plan(checkpoint, ttl_s))
    return listing((name, 100, math.floor(time.now) + ttl_s))


# --- what counts as in the trash -----------------------------------------------------------------


def test_visible_with_a_confirmed_removal_leaves_it_out(opened, time):
    trash = opened()
    now = trashed(trash, time)
    assert names(trash.visible(RUN, now).all) == []
    assert trash.visible(RUN, now).kinds == ("weights",)
    assert names(trash.of_run(RUN, now)) == ["1"]
    user = AccountListing.of(now.all)
    assert trash.visible_of_user(user).by_key == {}
    assert trash.visible_of_user(user) is trash.visible_of_user(user)


def test_visible_without_records_is_the_listing_itself(opened):
    trash, now = opened(), listing(("1", 100, None))
    assert trash.visible(RUN, now) is now
    assert trash.visible_of_user(user := AccountListing.of(now.all)) is user


@pytest.mark.parametrize("expires_in_s", [None, DAY_S + 10, 30 * DAY_S])
def test_visible_after_the_expiry_was_put_off_elsewhere_has_it(opened, time, expires_in_s):
    trash = opened()
    trash.reconcile(RUN, trashed(trash, time))
    expires_at_s = None if expires_in_s is None else math.floor(time.now) + expires_in_s
    assert names(trash.visible(RUN, listing(("1", 100, expires_at_s))).all) == ["1"]


def test_visible_after_the_expiry_came_nearer_leaves_it_out(opened, time):
    trash = opened()
    trash.reconcile(RUN, trashed(trash, time))
    assert names(trash.visible(RUN, listing(("1", 100, time.now + 60))).all) == []


def test_visible_of_another_version_of_the_name_has_it(opened, time):
    trash = opened()
    trashed(trash, time)
    assert names(trash.visible(RUN, listing(("1", 101, time.now + DAY_S))).all) == ["1"]


def test_visible_of_a_server_with_another_clock_leaves_it_out(opened, time):
    trash = opened()
    trashed(trash, time)
    assert names(trash.visible(RUN, listing(("1", 100, time.now + 3 * DAY_S))).all) == []


def test_visible_with_a_plan_alone_has_it(opened, time):
    trash = opened()
    before = listing(("1", 100, time.now + 9 * DAY_S))
    assert trash.plan(*before.all, DAY_S).state is TrashState.PLANNED
    assert names(opened().visible(RUN, before).all) == ["1"]
    # Neither does an expiry that a user sets some time after the crash make it a removal.
    assert names(opened().visible(RUN, listing(("1", 100, time.now + 2 * DAY_S))).all) == ["1"]


@pytest.mark.parametrize("former_s", [None, 9 * DAY_S])
def test_visible_with_the_former_expiry_listed_has_it(opened, time, former_s):
    trash = opened()
    former_s = None if former_s is None else time.now + former_s
    trashed(trash, time, former_s=former_s)
    assert names(trash.visible(RUN, listing(("1", 100, former_s))).all) == ["1"]


def test_visible_with_a_plan_whose_request_arrived_leaves_it_out(opened, time):
    trash = opened()
    trash.plan(*listing(("1", 100, None)).all, DAY_S)
    now = listing(("1", 100, math.floor(time.now) + DAY_S))
    other = opened()
    assert names(other.visible(RUN, now).all) == []
    other.reconcile(RUN, now)
    assert other.record(*now.all).state is TrashState.LISTED


def test_plan_with_a_nearer_expiry_leaves_that_and_is_done(opened, time):
    trash = opened()
    now = listing(("1", 100, time.now + 7200))
    record = trash.plan(*now.all, DAY_S)
    assert record.state is TrashState.LISTED
    assert record.expires_at_ns == record.former_expires_at_ns
    assert names(trash.visible(RUN, now).all) == []


# --- which records go ----------------------------------------------------------------------------


def test_reconcile_of_a_plan_that_came_to_nothing_drops_it_later(opened, time):
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
def test_reconcile_of_what_the_server_deleted_drops_it_later(opened, time, since):
    trash = opened()
    trashed(trash, time)
    gone = listing(*since)
    trash.reconcile(RUN, gone)
    assert trash.has_run(RUN)  # a server that lags may list it again
    time.advance(2 * DAY_S + 2)
    trash.reconcile(RUN, gone)
    assert not trash.has_run(RUN)


def test_former_ttl_below_an_hour_is_an_hour(opened, time):
    trash = opened()
    record = trash.plan(*listing(("1", 100, time.now + 7200)).all, 3600)
    assert record.former_ttl_s(time.now) == 7200
    assert record.former_ttl_s(time.now + 7000) == 3600
    assert record.former_ttl_s(time.now + 9000) == 3600
    assert trash.plan(*listing(("2", 100, None)).all, 3600).former_ttl_s(time.now) is None


# --- the store -----------------------------------------------------------------------------------


def test_plan_with_a_store_that_cannot_be_written_raises(opened, tmp_path):
    trash = opened()
    (tmp_path / "metadata.sqlite3").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"removed or replaced .*hint: mount again"):
        trash.plan(*listing(("1", 100, None)).all, DAY_S)
    assert not trash.has_run(RUN)


@pytest.mark.expect_warnings("made anew|goes on without")
def test_plan_with_a_store_that_is_not_open_raises(opened, tmp_path):
    (tmp_path / "metadata.sqlite3").mkdir()
    trash = opened()
    with pytest.raises(OSError, match="is not open"):
        trash.plan(*listing(("1", 100, None)).all, DAY_S)


def test_trash_of_two_processes_shows_the_others_changes(opened, time):
    one, other = opened(), opened()
    epoch = other.epoch
    now = trashed(one, time)
    wait_until(lambda: other.epoch != epoch)
    assert names(other.visible(RUN, now).all) == []
    other.forget(other.record(*now.all))
    wait_until(lambda: not one.has_run(RUN))
    assert names(one.visible(RUN, now).all) == ["1"]


def test_trash_with_foreign_bytes_in_the_store_ignores_them(opened, tmp_path, time):
    with MetadataStore(tmp_path) as store:
        for number, value in enumerate((b"", b"{}", b"[" * 10_000, b'{"run_id": 1}', b"\xff")):
            store.put_durable(f"trash {URL}", str(number), value)
    trash = opened()
    assert trash.run_ids() == []
    assert names(trash.visible(RUN, trashed(trash, time)).all) == []


def test_trash_of_odd_names_keeps_them_apart(opened, time):
    trash = opened()
    odd = ["a\nb", "\udcff", 'quote"', "ü", "a", "b"]
    for name in odd:
        trashed(trash, time, name=name)
    later = [(name, 100, time.now + DAY_S) for name in odd]
    again = opened()
    assert names(again.of_run(RUN, listing(*later))) == sorted(odd)


def test_store_files_have_no_key(opened, tmp_path, time):
    trashed(opened(key="secret-digest"), time)
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"weights" in data
    assert b"secret" not in data


@pytest.mark.parametrize("place", ["runs/{run}/checkpoints/weights", "checkpoints"])
def test_warm_start_after_a_kill_leaves_out_the_trash(tmp_path, time, server, place, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tinkerfs.cache.metadata.PATIENCE_AT_START_S", 0.0)
    run_id = server.account.run_ids[0]
    place = place.format(run=run_id)
    database = tmp_path / "cache/metadata.sqlite3"
    with mounted("process", server, tmp_path, time=time) as driver:
        before = driver.listdir(place)
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT * FROM listings").fetchall()
    with mounted("process", server, tmp_path, time=time, trash_s=float(DAY_S)) as driver:
        assert driver.remove(f"rmtree runs/{run_id}/checkpoints/weights/0001") == ["OK"]
    # A process that is killed at once has not written down yet that its listings are out of date.
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany("INSERT OR REPLACE INTO listings VALUES (?, ?, ?, ?)", rows)
    time.advance(1)
    with mounted("process", server, tmp_path, time=time) as driver, ThreadPoolExecutor(1) as pool:
        held = [server.faults.add(each, hang=True) for each in LISTINGS]
        listed = pool.submit(driver.listdir, place)
        held[place == "checkpoints"].wait_for(1)
        counters = json.loads(driver.read(".tinkerfs/stats.json"))["counters"]
        for rule in held:
            rule.release()
        assert "warm_starts" not in counters
        assert len(listed.result(10)) == len(before) - 1


# --- accounts ------------------------------------------------------------------------------------


def test_trash_under_another_key_counts_for_own_runs_only(opened, time):
    now = trashed(opened(key="a"), time)
    other = opened(key="b")
    assert names(other.visible(RUN, now).all) == ["1"]
    assert other.run_ids() == []
    assert other.unknown_run_ids() == {RUN}
    other.add_own_runs(["run-2"])
    assert names(other.visible(RUN, now).all) == ["1"]
    other.add_own_runs([RUN])
    assert names(other.visible(RUN, now).all) == []
    assert other.run_ids() == [RUN]


def test_trash_after_the_key_was_replaced_in_a_mount_counts(tmp_path, time):
    keys = ["a"]
    with MetadataStore(tmp_path) as store, Trash(store, URL, lambda: keys[-1], time.clock) as trash:
        now = trashed(trash, time)
        assert names(trash.visible(RUN, now).all) == []
        keys.append("b")
        assert names(trash.visible(RUN, now).all) == []


def test_trash_of_another_server_does_not_count(opened, tmp_path, time):
    now = trashed(opened(), time)
    with (
        MetadataStore(tmp_path) as store,
        Trash(store, f"{URL}2", lambda: "a", time.clock) as other,
    ):
        assert names(other.visible(RUN, now).all) == ["1"]


# --- any order of removals, crashes, restorations and what others do -----------------------------


class TrashMachine(RuleBasedStateMachine):
    """A listing with trash is the server's listing minus what the model says was removed."""

    def __init__(self):
        super().__init__()
        self.stack = ExitStack()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # each record is synced
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
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
        now = listing(*((name, *values) for name, values in self.server.items()))
        self.trash.reconcile(RUN, now)
        return now

    @rule()
    def restart(self):
        """Begin a new process, as after a crash."""
        if self.process is not None:
            self.process.close()
        self.process = ExitStack()
        store = self.process.enter_context(MetadataStore(self.folder))
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
        self.trash.forget(record)
        self.removed.remove(name)

    @rule(name=st.sampled_from("123"))
    def save_again(self, name):
        self.server[name] = (self.time.now, None)
        self.removed.discard(name)

    @rule(name=st.sampled_from("123"), ttl_s=st.sampled_from([None, 10 * DAY_S]))
    def put_off_elsewhere(self, name, ttl_s):
        if name in self.server:
            self._expiring(name, ttl_s)
            self.removed.discard(name)

    @rule(name=st.sampled_from("123"), ttl_s=st.sampled_from([None, 3600, 5 * DAY_S]))
    def set_expiry(self, name, ttl_s):
        checkpoint = self.trash.visible(RUN, self._listed()).get("weights", name)
        if checkpoint is not None:
            record = self.trash.record(checkpoint)
            if record is not None:
                self.trash.forget(record)
            self._expiring(name, ttl_s)

    @rule(seconds=st.sampled_from([1, SETTLED_S + 1, 3000, DAY_S // 2, 3 * DAY_S]))
    def advance(self, seconds):
        self.time.advance(seconds)
        for name, (_, expires_at_s) in list(self.server.items()):
            if expires_at_s is not None and expires_at_s <= self.time.now + self.skew_s:
                del self.server[name]
                self.removed.discard(name)

    @invariant()
    def listings_are_the_servers_minus_the_trash(self):
        now = self._listed()
        left = sorted(self.server.keys() - self.removed)
        assert names(self.trash.visible(RUN, now).all) == left
        assert names(self.trash.of_run(RUN, now)) == sorted(self.removed)
        user = AccountListing.of(now.all)
        assert names(self.trash.visible_of_user(user).by_key.values()) == left


TestTrashMachine = TrashMachine.TestCase
TestTrashMachine.settings = settings(max_examples=40, stateful_step_count=20)
