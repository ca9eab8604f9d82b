"""What a new mount shows of the last one's listings, and when it does not."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.clocks import FakeTime
from tests.support.drivers import opened, outcome_of
from tests.support.server import demo_server, server  # noqa: F401
from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.api.credentials import Credentials
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog import warm_start as module
from tinkerfs.catalog.listings import AccountListing, CheckpointListing, RunListing
from tinkerfs.catalog.warm_start import ListingSnapshots

RUNS, LISTING = "GET training_runs", "GET training_runs/{run}/checkpoints"
URL = "http://server.invalid"
DAY_S = 86400.0


@pytest.fixture
def time():
    return FakeTime()


def runs(*run_ids):
    return RunListing.from_runs(
        models.TrainingRun(run_id=run_id, raw=b'{"training_run_id":"%s"}' % run_id.encode())
        for run_id in run_ids
    )


def checkpoints(run_id, *names):
    records = (
        models.Checkpoint.of(
            checkpoint_id=name,
            tinker_path=f"tinker://{run_id}/{name}",
            raw=json.dumps(
                {"checkpoint_id": name, "tinker_path": f"tinker://{run_id}/{name}"}
            ).encode(),
        )
        for name in names
    )
    return CheckpointListing.of(run_id, records)


@contextmanager
def warm(folder, time, *, key="tml-one", url=URL):
    """What is kept, as a mount has it that begins a second after the one before."""
    time.advance(1)
    credentials = Credentials({"TINKER_API_KEY": key}, home=str(folder), clock=time.clock)
    credentials.get()
    with (
        MetadataStore(folder) as store,
        ListingSnapshots(store, url, credentials, time.clock, stale_s=DAY_S) as kept,
    ):
        yield kept


# --- what is kept --------------------------------------------------------------------------------


def test_listings_are_there_in_the_next_mount_as_the_server_told_them(tmp_path, time):
    listing = checkpoints("r1", "weights/1", "sampler_weights/1")
    user = AccountListing.of(listing.all)
    with warm(tmp_path, time) as kept:
        assert kept.runs() is None
        kept.save_runs(runs("r1", "r2"))
        kept.save_checkpoints("r1", listing)
        kept.save_account(user)
    with warm(tmp_path, time) as kept:
        assert kept.runs() == runs("r1", "r2")
        assert kept.checkpoints("r1") == listing
        assert kept.checkpoints("r2") is None
        assert kept.user() == user


def test_a_long_listing_is_kept_whole(tmp_path, time):
    many = runs(*(f"run-{n}" for n in range(1000)))
    with warm(tmp_path, time) as kept:
        kept.save_runs(many)
        kept.save_checkpoints("empty", checkpoints("empty"))
    with warm(tmp_path, time) as kept:
        assert kept.runs() == many
        assert kept.checkpoints("empty") == checkpoints("empty")


def test_another_key_or_server_never_sees_them_and_the_key_is_nowhere(tmp_path, time):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
    with warm(tmp_path, time, key="tml-other") as kept:
        assert kept.runs() is None
    with warm(tmp_path, time, url="http://other.invalid") as kept:
        assert kept.runs() is None
    for path in tmp_path.iterdir():
        assert b"tml-one" not in path.read_bytes()


def test_a_refused_key_sees_nothing(tmp_path, time):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
    with warm(tmp_path, time) as kept:
        assert kept.runs() is not None
        kept._credentials.on_unauthorized("tml-one", errors.Unauthorized("revoked", status=401))
        assert kept.runs() is None


def test_what_is_older_than_the_last_good_answer_may_be_is_not_shown(tmp_path, time):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
    time.advance(DAY_S - 2)
    with warm(tmp_path, time) as kept:
        assert kept.runs() is not None
    time.advance(2)
    with warm(tmp_path, time) as kept:
        assert kept.runs() is None


def test_a_mount_is_never_shown_what_itself_or_a_later_one_wrote(tmp_path, time):
    with warm(tmp_path, time) as early, warm(tmp_path, time) as late:
        late.save_runs(runs("r1"))
        late.__exit__(None, None, None)
        assert early.runs() is None
        assert late.runs() is None


def test_a_change_takes_what_tells_of_its_run(tmp_path, time):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
        for run_id in ("r1", "r2"):
            kept.save_checkpoints(run_id, checkpoints(run_id, "weights/1"))
        kept.changed("r1")
    with warm(tmp_path, time) as kept:
        assert kept.runs() is None
        assert kept.checkpoints("r1") is None
        assert kept.checkpoints("r2") is not None


def test_after_a_refresh_nothing_is_shown_and_nothing_is_left_of_the_account(tmp_path, time):
    for key in ("tml-one", "tml-other"):
        with warm(tmp_path, time, key=key) as kept:
            kept.save_runs(runs(key))
    with warm(tmp_path, time) as kept:
        kept.forget()
        assert kept.runs() is None
    with warm(tmp_path, time) as kept:
        assert kept.runs() is None
    with warm(tmp_path, time, key="tml-other") as kept:
        assert kept.runs() == runs("tml-other")


def test_what_cannot_be_read_any_more_is_not_there(tmp_path, time):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
    for garbage in (b"no zlib", module.zlib.compress(b"no JSON"), module.zlib.compress(b"{}")):
        with warm(tmp_path, time) as kept:
            kept._store.put_listing(kept._account(), "runs", time.now - 1, garbage)
            assert kept.runs() is None


def test_all_that_is_kept_is_bounded_and_the_oldest_go(tmp_path, time):
    with MetadataStore(tmp_path) as store:
        for number in range(10):
            store.put_listing("account", f"{number}", float(number), b"x" * 100)
        store.evict_listings(350)
        kept = [number for number in range(10) if store.listing("account", f"{number}")]
    assert kept == [7, 8, 9]


def test_a_listing_that_is_too_long_is_not_kept_nor_the_one_before(tmp_path, time, monkeypatch):
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1"))
    monkeypatch.setattr(module, "MAX_LISTING_BYTES", 100)
    with warm(tmp_path, time) as kept:
        kept.save_runs(runs("r1" * 100))
    with warm(tmp_path, time) as kept:
        assert kept.runs() is None


# --- what a mount makes of it --------------------------------------------------------------------


def counters(driver):
    return json.loads(driver.read(".tinkerfs/stats.json"))["counters"]


@pytest.fixture
def mount(server, tmp_path, time):  # noqa: F811
    """A factory of mounts of the server's account in process, one after the other."""

    @contextmanager
    def make():
        time.advance(1)
        with opened("process", server, tmp_path, time=time) as driver:
            yield driver

    return make


def test_a_slow_server_s_listings_are_shown_at_once_and_refreshed_behind(server, mount):  # noqa: F811
    run_id = server.account.run_ids[0]
    with mount() as driver:
        before = driver.listdir("runs")
        group = f"runs/{run_id}/checkpoints/weights"
        names = driver.listdir(group)
        assert "warm_starts" not in counters(driver)
    added = server.account.add_run().id
    server.account.add_checkpoint(run_id, "weights/new")
    server.journal.clear()
    with mount() as driver:
        held = server.faults.add(RUNS, hang=True), server.faults.add(LISTING, hang=True)
        assert driver.listdir("runs") == before
        assert driver.listdir(group) == names
        assert counters(driver)["warm_starts"] == 2
        for rule in held:
            rule.wait_for(1)
            rule.release()
        while added not in driver.listdir("runs") or "new" not in driver.listdir(group):
            os.sched_yield()
        assert server.journal.count(RUNS) == server.journal.count(LISTING) == 1


def test_a_quick_server_s_own_answer_is_shown(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    added = server.account.add_run().id
    with mount() as driver:
        assert added in driver.listdir("runs")
        assert "warm_starts" not in counters(driver)


@pytest.mark.parametrize(
    "place", ["runs/{run}/checkpoints/weights/new", "checkpoints/{run}@weights@new"]
)
def test_that_something_is_not_there_is_never_said_of_what_was_kept(server, mount, place):  # noqa: F811
    run_id = server.account.run_ids[0]
    with mount() as driver:
        driver.listdir("runs")
        driver.listdir(f"runs/{run_id}/checkpoints/weights")
        driver.listdir("checkpoints")
    server.account.add_checkpoint(run_id, "weights/new")
    with mount() as driver, ThreadPoolExecutor(1) as pool:
        driver.listdir("runs")
        held = (
            server.faults.add(LISTING, hang=True),
            server.faults.add("GET checkpoints", hang=True),
        )
        driver.listdir(f"runs/{run_id}/checkpoints/weights")
        driver.listdir("checkpoints")
        assert counters(driver)["warm_starts"] == 2
        look = pool.submit(driver.stat, place.format(run=run_id))
        for rule in held:
            rule.release()
        assert look.result(10)


@pytest.mark.expect_warnings("EHOSTUNREACH")
def test_an_outage_is_told_as_without_it(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    with mount() as driver:
        server.stop_listening("api")
        outcomes = set()
        while "EHOSTUNREACH" not in outcomes:  # it may be shown until that is known
            outcomes.add(str(outcome_of(lambda: driver.listdir("runs"))))
        assert outcome_of(lambda: driver.listdir("runs")) == "EHOSTUNREACH"
        server.resume_listening()


@pytest.mark.expect_warnings("EACCES")
def test_a_key_that_is_refused_shows_nothing(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    server.behaviour.api_keys.clear()
    with mount() as driver:
        assert outcome_of(lambda: driver.listdir("runs")) == "EACCES"


def test_what_this_mount_deleted_is_not_kept_for_the_next(server, mount, tmp_path, time):  # noqa: F811
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/gone")
    place = f"runs/{run_id}/checkpoints/weights/gone"
    for is_there in (True, False):
        with mount() as driver:
            driver.listdir("runs")
            driver.stat(place)
            if not is_there:
                assert driver.remove(f"rmtree {place}") == ["OK"]
        with warm(tmp_path / "cache", time, key=server.api_key, url=server.base_url) as kept:
            listing = kept.checkpoints(run_id)
            assert (listing is not None and listing.get("weights", "gone") is not None) == is_there
