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
