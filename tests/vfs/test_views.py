"""Tests of the views, of sessions and samplers, and of names that are not listed."""

import json
import posixpath
import time

import pytest

from tests.support.account import HOSTILE_NAMES, api_calls, can_be_listed, deletes
from tests.support.drivers import outcome_of
from tinkerfs import name_encoding
from tinkerfs.demo.sample_data import Session

VIEWS = ("checkpoints", "published", "expiring")


def target(world, link):
    """Return the target of a link from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(link), world.driver.readlink(link)))


def checkpoint_path(run_id, checkpoint_id):
    kind, _, name = checkpoint_id.partition("/")
    directory = f"runs/{name_encoding.encode(run_id)}/checkpoints"
    return f"{directory}/{name_encoding.encode(kind)}/{name_encoding.encode(name)}"


def user_checkpoints(world, matches=lambda _checkpoint: True):
    """Return name and path of the matching checkpoints of the user."""
    return {
        name_encoding.encode_composite((run.id, *checkpoint.id.split("/", 1))): checkpoint_path(
            run.id, checkpoint.id
        )
        for run in world.server.account.runs()
        for checkpoint in run.checkpoints
        if matches(checkpoint)
    }


#: For servers that list runs, and report whether a checkpoint is public and when it expires.
has_all_fields = pytest.mark.where(
    profile=lambda profile: (
        not {"public", "expires_at"} & profile.omitted
        and "GET training_runs" not in profile.missing
    )
)

MATCHES = {
    "checkpoints": lambda _checkpoint: True,
    "published": lambda checkpoint: checkpoint.is_public,
    "expiring": lambda checkpoint: checkpoint.expires_at_s is not None,
}


@pytest.mark.served("GET training_runs")
@pytest.mark.parametrize(
    "view",
    [
        "checkpoints",
        pytest.param("published", marks=has_all_fields),
        pytest.param("expiring", marks=has_all_fields),
    ],
)
def test_view_links_to_every_matching_checkpoint(world, view):
    expected = user_checkpoints(world, MATCHES[view])
    assert expected
    listed = world.driver.listdir(view)
    assert len(listed) == len(set(listed))
    assert {name: target(world, f"{view}/{name}") for name in listed} == expected
    for name in listed[:2]:
        assert world.driver.read(f"{view}/{name}/tinker_path").startswith(b"tinker://")
    assert outcome_of(lambda: world.driver.stat(f"{view}/a@b@c")) == "ENOENT"
    assert outcome_of(lambda: world.driver.stat(f"{view}/a@b")) == "ENOENT"


@pytest.mark.served("GET training_runs")
def test_view_is_sorted_by_the_time_of_the_checkpoints(world):
    times = [
        world.driver.stat(f"checkpoints/{n}").mtime_ns for n in world.driver.listdir("checkpoints")
    ]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) > 1
    assert world.driver.stat("checkpoints").mtime_ns >= times[0]


@has_all_fields
def test_mtime_of_expiring_links_is_the_expiry(world):
    expiries = {
        name_encoding.encode_composite((run.id, *c.id.split("/", 1))): c.expires_at_s
        for run in world.server.account.runs()
        for c in run.checkpoints
        if c.expires_at_s is not None
    }
    for name, expires_at_s in expiries.items():
        shown_s = world.driver.stat(f"expiring/{name}").mtime_ns / 1e9
        assert shown_s == pytest.approx(expires_at_s, abs=1)


@pytest.mark.served("GET checkpoints")
def test_view_requests_only_the_account_listing(make_world):
    world = make_world(runs=30, checkpoints=10)
    pages = -(-300 // (world.profile.account_page_max or 1000))
    for view in VIEWS:
        for name in world.driver.listdir(view):
            world.driver.readlink(f"{view}/{name}")
    assert api_calls(world.server) == {"GET checkpoints": pages}


@pytest.mark.served("GET training_runs")
def test_models_contains_the_runs_by_base_model(world):
    world.new_run(base_model="Qwen/Qwen3-8B", run_id="two")
    world.new_run(base_model="plain", run_id="one")
    world.new_run(base_model="/data/models/own", run_id="deep")
    found = {}
    for first in world.driver.listdir("models"):
        for second in world.driver.listdir(f"models/{first}"):
            path = f"models/{first}/{second}"
            if world.driver.stat(path).is_link:
                found[target(world, path)] = first
                continue
            for run in world.driver.listdir(path):
                found[target(world, f"{path}/{run}")] = f"{first}/{second}"
    expected = {f"runs/{run.id}": run.base_model for run in world.server.account.runs()}
    expected["runs/deep"] = "data/models%2Fown"
    assert found == expected
    assert outcome_of(lambda: world.driver.listdir("models/nobody")) == "ENOENT"
    assert outcome_of(lambda: world.driver.listdir("models/Qwen/none")) == "ENOENT"
    for run_id in ("one", "two", "deep"):
        world.server.account.remove_run(run_id)
    world.refresh()


@pytest.mark.served("GET sessions")
def test_listing_sessions_takes_no_request_per_session(make_world):
    world = make_world(runs=900, checkpoints=0)
    listed = world.driver.listdir("sessions")
    assert listed == world.server.account.session_ids()
    assert len(listed) == 450
    for session_id in listed[:10]:
        created_at_s = world.server.account.session(session_id).created_at_s
        shown_s = world.driver.stat(f"sessions/{session_id}").mtime_ns / 1e9
        assert shown_s == pytest.approx(created_at_s, abs=1)
    assert api_calls(world.server) == {"POST sessions/search": 3}


@pytest.mark.served("GET sessions")
def test_session_contains_its_runs_and_samplers(world):
    account = world.server.account
    session = account.session(world.driver.listdir("sessions")[0])
    directory = f"sessions/{session.id}"
    assert world.driver.listdir(directory) == ["info.json", "trace.pftrace", "runs", "samplers"]
    info = json.loads(world.driver.read(f"{directory}/info.json"))
    assert info["session_id"] == session.id
    assert info["training_run_ids"] == session.run_ids
    assert info["created_at"]
    assert info["status"] == session.status
    runs = {
        target(world, f"{directory}/runs/{n}") for n in world.driver.listdir(f"{directory}/runs")
    }
    assert runs == {f"runs/{run_id}" for run_id in session.run_ids}
    for sampler_id in world.driver.listdir(f"{directory}/samplers"):
        assert target(world, f"{directory}/samplers/{sampler_id}") == f"samplers/{sampler_id}"
        sampler = json.loads(world.driver.read(f"{directory}/samplers/{sampler_id}/info.json"))
        base_model, path = session.samplers[sampler_id]
        assert (sampler["sampler_id"], sampler["base_model"]) == (sampler_id, base_model)
        serves = f"samplers/{sampler_id}/checkpoint"
        if path is None:
            assert outcome_of(lambda: world.driver.readlink(serves)) == "ENOENT"  # noqa: B023
        else:
            assert world.driver.read(f"{serves}/tinker_path").decode().strip() == path
    assert set(world.driver.listdir("samplers")) >= set(session.samplers)


@pytest.mark.served("GET sessions")
def test_session_info_has_the_search_result_without_a_listing(make_world):
    world = make_world(runs=0)
    run = world.new_run("weights/a", "weights/b")[5:]
    failed = {"type": "server_failed"}
    session = Session(
        id="s", created_at_s=1.7e9, run_ids=[run], samplers={}, display_name=None, status=failed
    )
    world.server.account.add_session(session)
    info = json.loads(world.driver.read("sessions/s/info.json"))
    assert (info["status"], info["checkpoints_count"]) == (failed, 2)
    assert info["checkpoint_storage_bytes"] == 2 * 64 * 1024
    assert api_calls(world.server) == {"POST sessions/search": 1, "GET sessions/{session}": 1}


@pytest.mark.served("GET sessions")
def test_session_info_without_a_search_has_the_record(make_world):
    world = make_world(runs=4, checkpoints=1)
    world.server.faults.add("POST sessions/search", times=None, status=404)
    first, second = world.server.account.session_ids()
    for session_id in (first, second):
        info = json.loads(world.driver.read(f"sessions/{session_id}/info.json"))
        assert info["session_id"] == session_id
        assert info["training_run_ids"]
    assert world.server.journal.count("POST sessions/search") == 1


@pytest.mark.served("GET samplers/{sampler}")
def test_sampler_without_a_checkpoint_has_no_link(world):
    samplers = {
        "s:sample:0": ("Qwen/Qwen3-8B", None),
        "s:sample:1": ("Qwen/Qwen3-8B", "tinker://some-run/0001"),
        "s:sample:2": ("Qwen/Qwen3-8B", "no path at all"),
    }
    session = Session(id="s", created_at_s=1.7e9, run_ids=[], samplers=samplers, display_name=None)
    world.server.account.add_session(session)
    shown = {name: world.driver.listdir(f"samplers/{name}") for name in samplers}
    assert shown == {
        "s:sample:0": ["info.json"],
        "s:sample:1": ["info.json", "checkpoint"],
        "s:sample:2": ["info.json"],
    }
    assert target(world, "samplers/s:sample:1/checkpoint") == "runs/some-run/checkpoints/0001"


# Unlisted names.


@has_all_fields
def test_foreign_run_resolves_unlisted(world):
    account = world.server.account
    world.refresh()
    world.driver.listdir("runs")
    foreign = account.foreign_run_ids[0]
    assert foreign not in world.driver.listdir("runs")
    assert json.loads(world.driver.read(f"runs/{foreign}/info.json"))["training_run_id"] == foreign
    checkpoint = next(c for c in account.run(foreign).checkpoints if c.is_public)
    path = world.driver.read(f"{checkpoint_path(foreign, checkpoint.id)}/tinker_path")
    assert path.decode() == f"tinker://{foreign}/{checkpoint.id}\n"


@pytest.mark.served("GET training_runs/{run}")
def test_unlisted_checkpoint_resolves_by_its_path(world):
    account = world.server.account
    foreign = account.foreign_run_ids[0]
    checkpoint = next(c for c in account.run(foreign).checkpoints if c.is_public)
    fault = world.server.faults.add(
        "GET training_runs/{run}/checkpoints", times=None, status=404, body={"detail": "not yours"}
    )
    world.refresh()
    directory = checkpoint_path(foreign, checkpoint.id)
    world.server.journal.clear()
    info = json.loads(world.driver.read(f"{directory}/info.json"))
    assert info["base_model"] == account.run(foreign).base_model
    assert world.driver.read(f"{directory}/tinker_path").startswith(b"tinker://")
    assert world.server.journal.count("POST weights_info") == 1
    fault.remove()


@pytest.mark.served("GET sessions")
def test_lookup_of_an_absent_name_takes_one_request(world):
    world.refresh()
    world.driver.listdir("runs")
    foreign = world.server.account.foreign_run_ids[0]
    own = world.server.account.run_ids[0]
    world.driver.listdir(f"runs/{foreign}/checkpoints")
    world.driver.listdir(f"runs/{own}/checkpoints")
    for path, calls in (
        ("sessions/absent", {"GET sessions/{session}": 1}),
        ("samplers/absent", {"GET samplers/{sampler}": 1}),
        ("runs/absent-too", {"GET training_runs/{run}": 1}),
        (f"runs/{foreign}/checkpoints/weights/absent", {"POST weights_info": 1}),
        (f"runs/{own}/checkpoints/weights/absent", {}),
        ("checkpoints/a@weights@b", {}),
    ):
        world.driver.listdir("checkpoints")
        world.server.journal.clear()
        for _ in range(4):
            assert outcome_of(lambda: world.driver.stat(path)) == "ENOENT", path  # noqa: B023
        assert api_calls(world.server) == calls, path


# Changes.


@pytest.mark.served("GET training_runs")
def test_own_change_is_visible_in_every_view(world):
    run = world.new_run("weights/v1", "weights/v2")
    run_id = run.removeprefix("runs/")
    first, second = (
        name_encoding.encode_composite((run_id, "weights", name)) for name in ("v1", "v2")
    )
    assert first in world.driver.listdir("checkpoints")
    assert first not in world.driver.listdir("published")
    if world.serves("POST publish"):
        world.driver.write(f"checkpoints/{first}/published", b"1")
        assert first in world.driver.listdir("published")
    if world.serves("PUT ttl"):
        world.driver.write(f"checkpoints/{first}/expires_at", b"12h")
        assert first in world.driver.listdir("expiring")
        soon_s = world.driver.stat(f"expiring/{first}").mtime_ns / 1e9
        now_s = world.driver.time.clock.now() if world.driver.time else time.time()
        assert soon_s == pytest.approx(now_s + 12 * 3600, abs=60)
    world.server.journal.clear()
    assert world.driver.remove(f"rmtree {run}/checkpoints/weights/v2") == ["OK"]
    assert deletes(world.server) == 1
    for view in VIEWS:
        assert second not in world.driver.listdir(view)
    world.server.account.remove_run(run_id)
    world.refresh()


@pytest.mark.served("GET training_runs")
def test_removal_in_a_view_is_eperm(world):
    world.server.journal.clear()
    link = world.driver.listdir("checkpoints")[0]
    steps = [f"unlink checkpoints/{link}", "rmdir checkpoints", "rmdir models", "rmdir sessions"]
    if world.serves("GET sessions"):
        session = world.server.account.session_ids()[0]
        steps += [
            f"unlink sessions/{session}/info.json",
            f"rmdir sessions/{session}/runs",
            f"rmdir sessions/{session}",
        ]
    for step in steps:
        assert world.driver.remove(step) == ["EPERM"], step
    assert deletes(world.server) == 0


# Hostile names.


@pytest.mark.served("GET training_runs")
def test_views_contain_hostile_names(make_world):
    world = make_world(runs=1, checkpoints=1)
    account = world.server.account
    names = [n for n in HOSTILE_NAMES if n not in (".", "..") and can_be_listed(world.profile, n)]
    for number, name in enumerate(names):
        run = account.add_run(f"r{number}@weights", base_model=f"org/{name}")
        account.add_checkpoint(run.id, f"weights/{name}")
    expected = user_checkpoints(world)
    listed = world.driver.listdir("checkpoints")
    assert {name: target(world, f"checkpoints/{name}") for name in listed} == expected
    for name in listed:
        assert world.driver.stat(f"checkpoints/{name}/tinker_path").size > 0
    shown = {
        target(world, f"models/org/{model}/{run}")
        for model in world.driver.listdir("models/org")
        for run in world.driver.listdir(f"models/org/{model}")
    }
    assert shown == {f"runs/r{number}@weights" for number, name in enumerate(names) if name}


@pytest.mark.served("GET checkpoints", "GET sessions")
@pytest.mark.parametrize("missing", ["GET checkpoints", "POST sessions/search"])
def test_missing_listing_is_combined_from_others(make_world, missing):
    world = make_world(runs=12, checkpoints=2, latency_s=0.02)
    world.server.faults.add(missing, times=None, status=404, body={"detail": "Not Found"})
    for _ in range(2):
        world.refresh() if world.is_kernel else world.driver.time.advance(40)
        assert set(world.driver.listdir("checkpoints")) == set(user_checkpoints(world))
        assert world.driver.listdir("sessions") == world.server.account.session_ids()
    assert world.driver.listdir("published")
    if missing == "GET checkpoints":
        assert world.server.journal.max_in_flight("GET training_runs/{run}/checkpoints") > 1
    if not world.is_kernel:  # a refresh also resets the capability cache
        assert world.server.journal.count(missing) == 1
