"""Tests of cache expiry: the age of cached metadata, and the number of requests."""

import threading
import time

import pytest

from tests.support.drivers import outcome_of

RUN_CHECKPOINTS = "GET training_runs/{run}/checkpoints"


@pytest.fixture(scope="module")
def simulated(world):
    """A world with a fake clock; None for a mount, which uses the real clock."""
    return None if world.is_kernel else world


def test_listing_is_fresh_for_its_ttl(simulated):
    if simulated is None:
        return
    run = simulated.new_run("weights/1")
    listed = simulated.driver.listdir(simulated.kind_directory(run))
    simulated.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    simulated.driver.time.advance(29)
    assert simulated.driver.listdir(simulated.kind_directory(run)) == listed
    assert simulated.server.journal.count(RUN_CHECKPOINTS) == 1
    simulated.driver.time.advance(2)
    assert simulated.driver.listdir(simulated.kind_directory(run)) == ["1", "2"]
    assert simulated.server.journal.count(RUN_CHECKPOINTS) == 2


@pytest.mark.served("GET training_runs/{run}")
def test_negative_entry_expires_before_the_ttl(simulated):
    if simulated is None:
        return
    simulated.driver.listdir("runs")
    assert outcome_of(lambda: simulated.driver.stat("runs/later")) == "ENOENT"
    simulated.server.account.add_run("later")
    assert outcome_of(lambda: simulated.driver.stat("runs/later")) == "ENOENT"
    simulated.driver.time.advance(6)
    assert simulated.driver.stat("runs/later").is_directory
    simulated.server.account.remove_run("later")


@pytest.mark.expect_warnings("refresh E", "(list|stat) EIO")
def test_stale_listing_is_served_for_a_day_during_an_outage(simulated):
    if simulated is None:
        return
    run = simulated.new_run("weights/1")
    listed = simulated.driver.listdir(simulated.kind_directory(run))
    fault = simulated.server.faults.add(
        "api",
        times=None,
        status=503,
        body={"detail": "down for repairs"},
        headers={"x-should-retry": "false"},
    )
    try:
        simulated.driver.time.advance(31)
        assert simulated.driver.listdir(simulated.kind_directory(run)) == listed
        assert "down for repairs" in simulated.errors()
        assert '"stale_if_error_hits": ' in simulated.driver.read(".tinkerfs/stats.json").decode()
        simulated.driver.time.advance(23 * 3600)
        assert simulated.driver.listdir(simulated.kind_directory(run)) == listed
        simulated.driver.time.advance(2 * 3600)
        assert outcome_of(lambda: simulated.driver.listdir(f"{run}/checkpoints")) == "EIO"
    finally:
        fault.remove()
    simulated.driver.time.advance(3)
    assert simulated.driver.listdir(simulated.kind_directory(run)) == listed


@pytest.mark.expect_warnings("refresh E")
def test_tree_walk_during_an_outage_sends_few_requests(simulated):
    if simulated is None:
        return
    run = simulated.new_run("weights/1")
    simulated.driver.listdir(simulated.kind_directory(run))
    fault = simulated.server.faults.add(
        RUN_CHECKPOINTS, times=None, status=500, headers={"x-should-retry": "false"}
    )
    simulated.driver.time.advance(31)
    for _ in range(50):
        simulated.driver.listdir(simulated.kind_directory(run))
    fault.remove()
    assert fault.applied == 1


def test_refresh_invalidates_all_listings(world):
    run = world.new_run("weights/1")
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]
    world.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    assert world.driver.listdir(world.kind_directory(run)) == ["1"]
    world.driver.write(".tinkerfs/refresh", b"now\n")
    assert world.driver.listdir(world.kind_directory(run)) == ["1", "2"]
    assert world.driver.stat(f"{run}/checkpoints/weights/2").is_directory


def test_zero_ttl_sends_a_request_every_time(make_world):
    world = make_world(runs=1, checkpoints=1, settings={"ttl_s": 0.0})
    directory = f"runs/{world.server.account.run_ids[0]}/checkpoints"
    for _ in range(3):
        world.driver.listdir(directory)
    assert world.server.journal.count(RUN_CHECKPOINTS) >= 3


@pytest.mark.served("GET training_runs/{run}")
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.expect_warnings("list EIO")
def test_concurrent_listings_share_one_request_and_its_outcome(world, status):
    run = world.new_run("weights/1")
    world.driver.stat(run)
    effects = {} if status == 200 else {"status": 500, "headers": {"x-should-retry": "false"}}
    hold = world.server.faults.add(RUN_CHECKPOINTS, hang=True, times=None, **effects)
    outcomes = []

    def list_once():
        outcomes.append(outcome_of(lambda: world.driver.listdir(f"{run}/checkpoints")))

    threads = [threading.Thread(target=list_once) for _ in range(16)]
    try:
        for thread in threads:
            thread.start()
        hold.wait_for(1)
    finally:
        hold.release()
        for thread in threads:
            thread.join(20)
        hold.remove()
    assert outcomes == ["OK" if status == 200 else "EIO"] * 16
    # A failure is cached for two seconds, so late threads send no request either.
    assert world.server.journal.count(RUN_CHECKPOINTS) == 1


def test_own_change_is_visible_immediately(world):
    run = world.new_run("weights/1", "weights/2")
    checkpoint_dir = f"{run}/checkpoints/weights/1"
    world.driver.listdir("runs")
    if world.serves("POST publish"):
        for value, content in ((b"1", b"1\n"), (b"0", b"0\n")):
            world.driver.write(f"{checkpoint_dir}/published", value)
            assert world.driver.read(f"{checkpoint_dir}/published") == content
    world.driver.remove(f"rmtree {checkpoint_dir}")
    assert world.driver.listdir(world.kind_directory(run)) == ["2"]
    assert world.server.journal.count("GET training_runs") <= 2


@pytest.mark.served("GET training_runs")
def test_directory_mtime_changes_with_its_entries(make_world):
    world = make_world(runs=1, checkpoints=1, settings={"ttl_s": 0.05})
    run = world.new_run("weights/1", "weights/2")
    run_id = run.removeprefix("runs/")
    directories = ["checkpoints", f"{run}/checkpoints", world.kind_directory(run)]

    def times():
        if world.is_kernel:
            time.sleep(0.06)
        else:
            world.driver.time.advance(1)
        for directory in directories:
            world.driver.listdir(directory)
        return [world.driver.stat(directory).mtime_ns for directory in directories]

    def is_visible_after(change):
        before = times()
        change()
        return world.eventually(
            lambda: all(new > old for new, old in zip(times(), before, strict=True))
        )

    assert is_visible_after(lambda: world.server.account.add_checkpoint(run_id, "weights/3"))
    assert is_visible_after(lambda: world.server.account.delete_checkpoint(run_id, "weights/1"))
    directories[:] = ["runs", "models"]
    assert is_visible_after(lambda: world.server.account.remove_run(run_id))
    steady = times()
    assert times() == steady
