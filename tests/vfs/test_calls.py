"""What looking costs: calls counted at the server."""

import json

import pytest

from tests.support.account import api_calls, checkpoint_ids


@pytest.mark.served("GET training_runs")
def test_a_thousand_runs_are_ten_calls_and_none_when_warm(make_world):
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
def test_listing_everything_is_one_call_a_run_and_no_weights_info(make_world):
    world = make_world(runs=10, checkpoints=4)
    found = set()
    for run_id in world.driver.listdir("runs"):
        world.driver.listdir(f"runs/{run_id}")
        for place in world.places(f"runs/{run_id}"):
            assert "info.json" in world.driver.listdir(place)
            path = world.driver.read(f"{place}/tinker_path").decode()
            found.add(path.strip().removeprefix("tinker://"))
    assert found == checkpoint_ids(world.server)
    assert api_calls(world.server) == {
        "GET training_runs": 1,
        "GET training_runs/{run}/checkpoints": 10,
    }


@pytest.mark.served("GET training_runs/{run}")
def test_a_run_asked_for_by_name_is_one_call(world):
    run_id = world.server.account.run_ids[0]
    world.refresh()
    world.server.journal.clear()
    for _ in range(3):
        assert world.driver.stat(f"runs/{run_id}").is_folder
        assert world.driver.read(f"runs/{run_id}/info.json")
    assert api_calls(world.server) == {"GET training_runs/{run}": 1}


@pytest.mark.served("GET training_runs/{run}")
def test_a_name_that_is_not_there_is_asked_for_once(world):
    from tests.support.drivers import outcome_of

    world.driver.listdir("runs")
    world.server.journal.clear()
    for _ in range(5):
        assert outcome_of(lambda: world.driver.stat("runs/absent-1/checkpoints")) == "ENOENT"
    assert api_calls(world.server) == {"GET training_runs/{run}": 1}


@pytest.mark.served("GET training_runs")
def test_every_page_is_followed_whatever_the_server_says_of_it(world):
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
def test_a_run_that_moves_between_pages_is_listed_once_and_none_is_missed(world):
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
def test_a_walk_is_asked_ahead_of_side_by_side_and_costs_no_call_more(make_world, is_sorted):
    world = make_world(runs=24, checkpoints=3, latency_s=0.02)
    runs = world.driver.listdir("runs")
    for run_id in sorted(runs) if is_sorted else runs:
        for place in world.places(f"runs/{run_id}"):
            assert json.loads(world.driver.read(f"{place}/info.json"))
    world.server.journal.wait_until_idle()
    asked = {entry.body for entry in world.server.journal.entries(INFO)}
    calls = api_calls(world.server)
    assert calls[LISTING] == 24
    assert calls[INFO] == len(asked)
    if world.profile.kinds <= world.profile.weights_info_kinds:
        assert calls[INFO] == len(checkpoint_ids(world.server))
    assert 4 < world.server.journal.max_in_flight() <= 8


@pytest.mark.served("GET training_runs")
def test_a_look_at_some_runs_is_no_walk(make_world):
    world = make_world(runs=24, checkpoints=2)
    listed = world.driver.listdir("runs")
    apart = []  # no two of them beside each other, as listed or by name
    for run_id in listed:
        rows = (listed, sorted(listed))
        if all(abs(row.index(run_id) - row.index(other)) > 1 for row in rows for other in apart):
            apart.append(run_id)
    for run_id in apart[:4]:
        for place in world.places(f"runs/{run_id}"):
            world.driver.listdir(place)
    world.server.journal.wait_until_idle()
    assert api_calls(world.server)[LISTING] == 4


@pytest.mark.served("GET training_runs")
def test_where_listings_are_fresh_for_no_time_none_is_asked_for_ahead(make_world):
    world = make_world(runs=12, checkpoints=1, settings={"ttl_s": 1.0})
    runs = sorted(world.driver.listdir("runs"))
    for run_id in runs[:4]:
        list(world.places(f"runs/{run_id}"))
    world.server.journal.wait_until_idle()
    paths = {entry.path for entry in world.server.journal.entries(LISTING)}
    assert len(paths) == 4


@pytest.mark.served("GET training_runs")
@pytest.mark.where(profile=lambda profile: profile.name == "official")
def test_no_more_calls_at_once_than_the_option_says(make_world):
    world = make_world(runs=24, checkpoints=3, latency_s=0.01, settings={"concurrency": 3})
    for run_id in sorted(world.driver.listdir("runs")):
        for place in world.places(f"runs/{run_id}"):
            world.driver.read(f"{place}/info.json")
    world.server.journal.wait_until_idle()
    assert world.server.journal.max_in_flight() == 3
    assert world.server.journal.count() == 1 + 24 + 72
