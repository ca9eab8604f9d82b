"""Tests of the number of API requests that metadata operations send."""

import json

import pytest

from tests.support.account import api_calls, checkpoint_ids


@pytest.mark.served("GET training_runs")
def test_listing_1000_runs_takes_ten_requests_once(make_world):
    world = make_world(runs=1000, checkpoints=0, latency_s=0.02)
    assert len(world.driver.listdir("runs")) == 1000
    assert api_calls(world.server) == {"GET training_runs": 10}
    assert world.server.journal.max_in_flight("GET training_runs") > 1
    world.server.journal.clear()
    assert len(world.driver.listdir("runs")) == 1000
    for run_id in world.server.account.run_ids[::100]:
        assert world.driver.stat(f"runs/{run_id}/info.json").size > 100
        assert json.loads(world.driver.read(f"runs/{run_id}/info.json"))
    assert api_calls(world.server) == {}


@pytest.mark.served("GET training_runs")
def test_listing_everything_takes_one_request_per_run(make_world):
    world = make_world(runs=10, checkpoints=4)
    found = set()
    for run_id in world.driver.listdir("runs"):
        world.driver.listdir(f"runs/{run_id}")
        for checkpoint_dir in world.checkpoint_dirs(f"runs/{run_id}"):
            assert "info.json" in world.driver.listdir(checkpoint_dir)
            path = world.driver.read(f"{checkpoint_dir}/tinker_path").decode()
            found.add(path.strip().removeprefix("tinker://"))
    assert found == checkpoint_ids(world.server)
    assert api_calls(world.server) == {
        "GET training_runs": 1,
        "GET training_runs/{run}/checkpoints": 10,
    }


@pytest.mark.served("GET training_runs/{run}")
def test_lookup_of_a_run_takes_one_request(world):
    run_id = world.server.account.run_ids[0]
    world.refresh()
    world.server.journal.clear()
    for _ in range(3):
        assert world.driver.stat(f"runs/{run_id}").is_directory
        assert world.driver.read(f"runs/{run_id}/info.json")
    assert api_calls(world.server) == {"GET training_runs/{run}": 1}


@pytest.mark.served("GET training_runs/{run}")
def test_lookup_of_an_absent_run_takes_one_request(world):
    from tests.support.drivers import outcome_of

    world.driver.listdir("runs")
    world.server.journal.clear()
    for _ in range(5):
        assert outcome_of(lambda: world.driver.stat("runs/absent-1/checkpoints")) == "ENOENT"
    assert api_calls(world.server) == {"GET training_runs/{run}": 1}


@pytest.mark.served("GET training_runs")
def test_listing_follows_every_page_despite_wrong_totals(world):
    account = world.server.account
    added = [account.add_run().id for _ in range(30)]
    try:
        for effects in (
            {"page_max": 7},
            {"page_max": 7, "cursor": "missing"},
            {"page_max": 7, "cursor": "null"},
            {"total_count": 5, "page_max": 10},
            {"total_count": 500, "page_max": 10},
        ):
            fault = world.server.faults.add("GET training_runs", times=None, **effects)
            world.refresh()
            assert sorted(world.driver.listdir("runs")) == sorted(account.run_ids), effects
            fault.remove()
    finally:
        world.server.faults.clear()
        for run_id in added:
            account.remove_run(run_id)
        world.refresh()


@pytest.mark.served("GET training_runs")
def test_run_that_moves_between_pages_is_listed_once(world):
    account = world.server.account
    added = [account.add_run().id for _ in range(25)]
    try:
        last = account.run_ids[-1]
        world.server.faults.add("GET training_runs", times=None, page_max=10)
        world.server.faults.add("GET training_runs", after=1, call=lambda: account.touch(last))
        world.refresh()
        listed = world.driver.listdir("runs")
        assert sorted(listed) == sorted(account.run_ids)
    finally:
        world.server.faults.clear()
        for run_id in added:
            account.remove_run(run_id)
        world.refresh()


LISTING, INFO = "GET training_runs/{run}/checkpoints", "POST weights_info"


@pytest.mark.served("GET training_runs")
@pytest.mark.parametrize("is_sorted", [True, False])
def test_tree_walk_prefetches_without_extra_requests(make_world, is_sorted):
    world = make_world(runs=24, checkpoints=3, latency_s=0.02)
    runs = world.driver.listdir("runs")
    for run_id in sorted(runs) if is_sorted else runs:
        for checkpoint_dir in world.checkpoint_dirs(f"runs/{run_id}"):
            assert json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))
    world.server.journal.wait_until_idle()
    requests = {entry.body for entry in world.server.journal.entries(INFO)}
    calls = api_calls(world.server)
    assert calls[LISTING] == 24
    assert calls[INFO] == len(requests)
    if world.profile.kinds <= world.profile.weights_info_kinds:
        assert calls[INFO] == len(checkpoint_ids(world.server))
    assert 4 < world.server.journal.max_in_flight() <= 8


@pytest.mark.served("GET training_runs")
def test_reading_separate_runs_does_not_prefetch(make_world):
    world = make_world(runs=24, checkpoints=2)
    listed = world.driver.listdir("runs")
    separate = []  # no two runs are adjacent, in listing order or by name
    for run_id in listed:
        rows = (listed, sorted(listed))
        if all(abs(row.index(run_id) - row.index(other)) > 1 for row in rows for other in separate):
            separate.append(run_id)
    for run_id in separate[:4]:
        for checkpoint_dir in world.checkpoint_dirs(f"runs/{run_id}"):
            world.driver.listdir(checkpoint_dir)
    world.server.journal.wait_until_idle()
    assert api_calls(world.server)[LISTING] == 4


@pytest.mark.served("GET training_runs")
@pytest.mark.expect_warnings("EIO")
def test_tree_walk_with_an_open_breaker_does_not_prefetch(make_world):
    world = make_world(runs=24, checkpoints=1)
    if world.is_kernel:  # the clock is not simulated
        return
    runs = sorted(world.driver.listdir("runs"))
    world.server.faults.add(LISTING, times=None, status=500, headers={"x-should-retry": "false"})
    accessed = [*runs[:6:2], *runs[10:14]]
    for run_id in accessed:
        with pytest.raises(OSError, match="500"):
            world.driver.listdir(f"runs/{run_id}/checkpoints")
        world.server.journal.wait_until_idle()
        world.driver.time.advance(2)  # the next request is a probe
    requested = [entry.path for entry in world.server.journal.entries(LISTING)]
    assert [path.split("/")[-2] for path in requested] == accessed


@pytest.mark.served("GET training_runs")
def test_short_ttl_disables_prefetching(make_world):
    world = make_world(runs=12, checkpoints=1, settings={"ttl_s": 1.0})
    runs = sorted(world.driver.listdir("runs"))
    for run_id in runs[:4]:
        list(world.checkpoint_dirs(f"runs/{run_id}"))
    world.server.journal.wait_until_idle()
    paths = {entry.path for entry in world.server.journal.entries(LISTING)}
    assert len(paths) == 4


@pytest.mark.served("GET training_runs")
@pytest.mark.where(profile=lambda profile: profile.name == "official")
def test_concurrent_requests_are_limited_by_the_option(make_world):
    world = make_world(runs=24, checkpoints=3, latency_s=0.01, settings={"concurrency": 3})
    for run_id in sorted(world.driver.listdir("runs")):
        for checkpoint_dir in world.checkpoint_dirs(f"runs/{run_id}"):
            world.driver.read(f"{checkpoint_dir}/info.json")
    world.server.journal.wait_until_idle()
    assert world.server.journal.max_in_flight() == 3
    assert world.server.journal.count() == 1 + 24 + 72
