"""Tests of the runs of other users by owner, and of runs by project."""

import posixpath

import pytest

from tests.support.account import api_calls, deletes
from tests.support.drivers import outcome_of
from tinkerfs.demo.sample_data import SampleData, Session

#: The owner of the runs that are not the account's.
OTHER_OWNER = SampleData(runs=1, checkpoints=0).foreign_run(0).owner

lists_shared = pytest.mark.where(profile=lambda profile: profile.lists_accessible)


def target(world, link):
    """Return the target of a link from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(link), world.driver.readlink(link)))


def session(session_id, project_id, *run_ids):
    return Session(
        id=session_id,
        created_at_s=1.7e9,
        run_ids=list(run_ids),
        samplers={},
        display_name=None,
        project_id=project_id,
    )


@lists_shared
def test_shared_lists_the_runs_of_others_by_owner(make_world):
    world = make_world(runs=3, checkpoints=1, foreign_runs=4)
    account = world.server.account
    first, *others = account.foreign_run_ids
    account.run(first).owner = "a/b"
    assert set(world.driver.listdir("shared")) == {"a%2Fb", OTHER_OWNER}
    assert world.driver.listdir("shared/a%2Fb") == [first]
    assert set(world.driver.listdir(f"shared/{OTHER_OWNER}")) == set(others)
    for run_id in others:
        assert target(world, f"shared/{OTHER_OWNER}/{run_id}") == f"runs/{run_id}"
        assert world.driver.stat(f"runs/{run_id}").is_directory
        assert not set(world.driver.listdir("runs")) & {run_id}
    assert outcome_of(lambda: world.driver.stat("shared/demo-user")) == "ENOENT"
    own = account.run_ids[0]
    assert outcome_of(lambda: world.driver.stat(f"shared/{OTHER_OWNER}/{own}")) == "ENOENT"
    # One page of the own runs, and one of the accessible ones.
    assert api_calls(world.server) == {"GET training_runs": 2}


@lists_shared
def test_shared_omits_an_own_run_newer_than_the_listing(make_world):
    world = make_world(runs=2)
    world.driver.listdir("runs")
    world.server.account.add_run()
    assert world.driver.listdir("shared") == [OTHER_OWNER]


@lists_shared
def test_shared_is_listed_by_pages(make_world):
    world = make_world(runs=150, checkpoints=1, foreign_runs=130)
    assert len(world.driver.listdir(f"shared/{OTHER_OWNER}")) == 130
    assert api_calls(world.server) == {"GET training_runs": 2 + 3}


@lists_shared
def test_shared_run_without_an_owner_is_unknown(make_world):
    world = make_world(runs=1, checkpoints=1, foreign_runs=1)
    (run_id,) = world.server.account.foreign_run_ids
    world.server.account.run(run_id).extra["model_owner"] = None
    assert world.driver.listdir("shared") == ["unknown"]


@pytest.mark.where(
    profile=lambda profile: (
        not profile.lists_accessible and "GET training_runs" not in profile.missing
    )
)
def test_shared_is_empty_where_scopes_are_ignored(make_world):
    world = make_world(runs=2, checkpoints=1)
    assert world.driver.listdir("shared") == []


@pytest.mark.served("GET sessions")
def test_projects_list_the_runs_of_their_sessions(make_world):
    world = make_world(runs=0)
    runs = [world.new_run("weights/a").removeprefix("runs/") for _ in range(4)]
    account = world.server.account
    account.add_session(session("s1", "red", runs[0], runs[1]))
    account.add_session(session("s2", "red", runs[1], runs[2]))
    account.add_session(session("s3", "blue", runs[3]))
    assert set(world.driver.listdir("projects")) == {"red", "blue"}
    assert api_calls(world.server) == {"POST sessions/search": 1}
    assert set(world.driver.listdir("projects/red")) == set(runs[:3])
    assert api_calls(world.server) == {"POST sessions/search": 1, "GET sessions/{session}": 2}
    assert target(world, f"projects/red/{runs[0]}") == f"runs/{runs[0]}"
    assert outcome_of(lambda: world.driver.stat(f"projects/blue/{runs[0]}")) == "ENOENT"
    assert outcome_of(lambda: world.driver.stat("projects/green")) == "ENOENT"


@pytest.mark.served("GET sessions")
def test_sessions_of_a_project_are_requested_in_parallel(make_world):
    world = make_world(runs=80, checkpoints=1, latency_s=0.02)
    assert len(world.driver.listdir("projects/demo-project")) == 80
    assert world.server.journal.count("GET sessions/{session}") == 40
    assert world.server.journal.max_in_flight("GET sessions/{session}") > 2


@pytest.mark.served("GET sessions")
def test_projects_are_empty_without_session_search(make_world):
    world = make_world(runs=4, checkpoints=1)
    world.server.faults.add("POST sessions/search", times=None, status=404)
    assert world.driver.listdir("projects") == []


def test_stat_of_a_team_view_takes_no_request(make_world):
    world = make_world(runs=2, checkpoints=1)
    for name in ("shared", "projects"):
        assert world.driver.stat(name).is_directory
    assert api_calls(world.server) == {}


@lists_shared
def test_links_of_team_views_cannot_be_removed(make_world):
    world = make_world(runs=2, checkpoints=1, foreign_runs=1)
    (foreign,) = world.server.account.foreign_run_ids
    own = world.server.account.run_ids[0]
    for step in (
        f"unlink shared/{OTHER_OWNER}/{foreign}",
        "rmtree shared",
        f"unlink projects/demo-project/{own}",
        "rmtree projects/demo-project",
    ):
        assert world.driver.remove(step) == ["EPERM"]
    assert deletes(world.server) == 0
