"""Listing snapshots: when a mount serves the listings of an earlier mount."""

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
        models.Checkpoint.from_fields(
            checkpoint_id=name,
            tinker_path=f"tinker://{run_id}/{name}",
            raw=json.dumps(
                {"checkpoint_id": name, "tinker_path": f"tinker://{run_id}/{name}"}
            ).encode(),
        )
        for name in names
    )
    return CheckpointListing.from_records(run_id, records)


@contextmanager
def snapshots_of(directory, time, *, key="tml-one", url=URL):
    """Yield the snapshots for a mount that starts a second after the previous one."""
    time.advance(1)
    credentials = Credentials({"TINKER_API_KEY": key}, home=str(directory), clock=time.clock)
    credentials.get()
    with (
        MetadataStore(directory) as store,
        ListingSnapshots(store, url, credentials, time.clock, stale_s=DAY_S) as snapshots,
    ):
        yield snapshots


# --- snapshots -----------------------------------------------------------------------------------


def test_snapshots_in_the_next_mount_equal_the_listings(tmp_path, time):
    listing = checkpoints("r1", "weights/1", "sampler_weights/1")
    user = AccountListing.from_checkpoints(listing.all)
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is None
        snapshots.save_runs(runs("r1", "r2"))
        snapshots.save_checkpoints("r1", listing)
        snapshots.save_account(user)
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() == runs("r1", "r2")
        assert snapshots.checkpoints("r1") == listing
        assert snapshots.checkpoints("r2") is None
        assert snapshots.account() == user


def test_snapshot_of_a_long_listing_is_complete(tmp_path, time):
    many = runs(*(f"run-{n}" for n in range(1000)))
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(many)
        snapshots.save_checkpoints("empty", checkpoints("empty"))
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() == many
        assert snapshots.checkpoints("empty") == checkpoints("empty")


def test_snapshots_are_separate_by_key_and_server(tmp_path, time):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
    with snapshots_of(tmp_path, time, key="tml-other") as snapshots:
        assert snapshots.runs() is None
    with snapshots_of(tmp_path, time, url="http://other.invalid") as snapshots:
        assert snapshots.runs() is None
    for path in tmp_path.iterdir():
        assert b"tml-one" not in path.read_bytes()


def test_snapshots_with_an_unauthorized_key_are_not_served(tmp_path, time):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is not None
        snapshots._credentials.on_unauthorized(
            "tml-one", errors.Unauthorized("revoked", status=401)
        )
        assert snapshots.runs() is None


def test_snapshots_older_than_the_stale_limit_are_not_served(tmp_path, time):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
    time.advance(DAY_S - 2)
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is not None
    time.advance(2)
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is None


def test_snapshots_of_a_later_start_are_not_served(tmp_path, time):
    with snapshots_of(tmp_path, time) as early, snapshots_of(tmp_path, time) as late:
        late.save_runs(runs("r1"))
        late.__exit__(None, None, None)
        assert early.runs() is None
        assert late.runs() is None


def test_invalidate_run_deletes_the_snapshots_with_its_data(tmp_path, time):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
        for run_id in ("r1", "r2"):
            snapshots.save_checkpoints(run_id, checkpoints(run_id, "weights/1"))
        snapshots.invalidate_run("r1")
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is None
        assert snapshots.checkpoints("r1") is None
        assert snapshots.checkpoints("r2") is not None


def test_clear_deletes_every_snapshot_of_the_account_only(tmp_path, time):
    for key in ("tml-one", "tml-other"):
        with snapshots_of(tmp_path, time, key=key) as snapshots:
            snapshots.save_runs(runs(key))
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.clear()
        assert snapshots.runs() is None
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is None
    with snapshots_of(tmp_path, time, key="tml-other") as snapshots:
        assert snapshots.runs() == runs("tml-other")


def test_malformed_snapshots_are_not_served(tmp_path, time):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
    for garbage in (b"no zlib", module.zlib.compress(b"no JSON"), module.zlib.compress(b"{}")):
        with snapshots_of(tmp_path, time) as snapshots:
            snapshots._store.put_listing(snapshots._account_digest(), "runs", time.now - 1, garbage)
            assert snapshots.runs() is None


def test_evict_listings_evicts_the_oldest(tmp_path, time):
    with MetadataStore(tmp_path) as store:
        for number in range(10):
            store.put_listing("account", f"{number}", float(number), b"x" * 100)
        store.evict_listings(350)
        snapshots = [number for number in range(10) if store.listing("account", f"{number}")]
    assert snapshots == [7, 8, 9]


def test_too_large_listing_deletes_the_previous_snapshot(tmp_path, time, monkeypatch):
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1"))
    monkeypatch.setattr(module, "MAX_LISTING_BYTES", 100)
    with snapshots_of(tmp_path, time) as snapshots:
        snapshots.save_runs(runs("r1" * 100))
    with snapshots_of(tmp_path, time) as snapshots:
        assert snapshots.runs() is None


# --- mounts --------------------------------------------------------------------------------------


def counters(driver):
    return json.loads(driver.read(".tinkerfs/stats.json"))["counters"]


@pytest.fixture
def mount(server, tmp_path, time):  # noqa: F811
    """Return a factory of consecutive in-process mounts of the server's account."""

    @contextmanager
    def make():
        time.advance(1)
        with opened("process", server, tmp_path, time=time) as driver:
            yield driver

    return make


def test_slow_server_serves_snapshots_and_revalidates(server, mount):  # noqa: F811
    run_id = server.account.run_ids[0]
    with mount() as driver:
        before = driver.listdir("runs")
        group = f"runs/{run_id}/checkpoints/weights"
        names = driver.listdir(group)
        assert "warm_start_hits" not in counters(driver)
    added = server.account.add_run().id
    server.account.add_checkpoint(run_id, "weights/new")
    server.journal.clear()
    with mount() as driver:
        hung = server.faults.add(RUNS, hang=True), server.faults.add(LISTING, hang=True)
        assert driver.listdir("runs") == before
        assert driver.listdir(group) == names
        assert counters(driver)["warm_start_hits"] == 2
        for rule in hung:
            rule.wait_for(1)
            rule.release()
        while added not in driver.listdir("runs") or "new" not in driver.listdir(group):
            os.sched_yield()
        assert server.journal.count(RUNS) == server.journal.count(LISTING) == 1


def test_fast_server_serves_its_own_response(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    added = server.account.add_run().id
    with mount() as driver:
        assert added in driver.listdir("runs")
        assert "warm_start_hits" not in counters(driver)


@pytest.mark.parametrize(
    "path", ["runs/{run}/checkpoints/weights/new", "checkpoints/{run}@weights@new"]
)
def test_snapshots_never_prove_absence(server, mount, path):  # noqa: F811
    run_id = server.account.run_ids[0]
    with mount() as driver:
        driver.listdir("runs")
        driver.listdir(f"runs/{run_id}/checkpoints/weights")
        driver.listdir("checkpoints")
    server.account.add_checkpoint(run_id, "weights/new")
    with mount() as driver, ThreadPoolExecutor(1) as pool:
        driver.listdir("runs")
        hung = (
            server.faults.add(LISTING, hang=True),
            server.faults.add("GET checkpoints", hang=True),
        )
        driver.listdir(f"runs/{run_id}/checkpoints/weights")
        driver.listdir("checkpoints")
        assert counters(driver)["warm_start_hits"] == 2
        stat = pool.submit(driver.stat, path.format(run=run_id))
        for rule in hung:
            rule.release()
        assert stat.result(10)


@pytest.mark.expect_warnings("EHOSTUNREACH")
def test_outage_with_a_snapshot_is_reported(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    with mount() as driver:
        server.stop_listening("api")
        outcomes = set()
        while "EHOSTUNREACH" not in outcomes:  # a snapshot may be served until then
            outcomes.add(str(outcome_of(lambda: driver.listdir("runs"))))
        assert outcome_of(lambda: driver.listdir("runs")) == "EHOSTUNREACH"
        server.resume_listening()


@pytest.mark.expect_warnings("EACCES")
def test_unauthorized_key_with_a_snapshot_raises(server, mount):  # noqa: F811
    with mount() as driver:
        driver.listdir("runs")
    server.behaviour.api_keys.clear()
    with mount() as driver:
        assert outcome_of(lambda: driver.listdir("runs")) == "EACCES"


def test_deleted_checkpoint_is_absent_from_the_next_snapshot(server, mount, tmp_path, time):  # noqa: F811
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/gone")
    path = f"runs/{run_id}/checkpoints/weights/gone"
    for exists in (True, False):
        with mount() as driver:
            driver.listdir("runs")
            driver.stat(path)
            if not exists:
                assert driver.remove(f"rmtree {path}") == ["OK"]
        with snapshots_of(
            tmp_path / "cache", time, key=server.api_key, url=server.base_url
        ) as snapshots:
            listing = snapshots.checkpoints(run_id)
            assert (listing is not None and listing.get("weights", "gone") is not None) == exists
