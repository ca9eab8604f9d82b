"""What differs between servers: bare ids, other tinker paths, and what they lack."""

import json

import pytest

from tests.support.account import api_calls
from tests.support.drivers import outcome_of
from tinkerfs.demo import serialization
from tinkerfs.demo.profiles import KIND_TYPES
from tinkerfs.demo.sample_data import Session

lists_bare_ids = pytest.mark.where(profile=lambda profile: profile.listed_ids == "name")
#: Of hatchery: it knows runs by their checkpoints only.
lists_no_runs = pytest.mark.where(profile=lambda profile: "GET training_runs" in profile.missing)


def told_path(world, run, checkpoint_id):
    """What `tinker_path` reads of a checkpoint."""
    run_id = run.partition("/")[2]
    checkpoint = world.server.account.checkpoint(run_id, checkpoint_id)
    return f"{serialization.tinker_path(run_id, checkpoint, world.profile)}\n"


# Ids.


def test_checkpoints_are_listed_by_kind_and_name(world):
    for run in world.server.account.runs():
        places = [place.partition("/checkpoints/")[2] for place in world.places(f"runs/{run.id}")]
        assert sorted(places) == sorted(checkpoint.id for checkpoint in run.checkpoints)
        for checkpoint in run.checkpoints:
            told = told_path(world, f"runs/{run.id}", checkpoint.id)
            place = f"runs/{run.id}/checkpoints/{checkpoint.id}"
            assert world.driver.read(f"{place}/tinker_path").decode() == told


def test_checkpoint_resolves_by_its_tinker_path(world):
    for run in world.server.account.runs():
        for checkpoint in run.checkpoints:
            told = told_path(world, f"runs/{run.id}", checkpoint.id)
            _, _, rest = told.strip().removeprefix("tinker://").partition("/")
            place = f"runs/{run.id}/checkpoints/{rest}"
            assert world.driver.read(f"{place}/tinker_path").decode() == told


@lists_bare_ids
def test_bare_id_of_one_checkpoint_is_an_unlisted_link(world):
    run = world.new_run("weights/a", "sampler_weights/b", "weights/sampler_weights")
    folder = f"{run}/checkpoints"
    assert world.driver.readlink(f"{folder}/a") == "weights/a"
    assert world.driver.readlink(f"{folder}/b") == "sampler_weights/b"
    assert world.driver.stat(f"{folder}/sampler_weights").is_folder, "a kind's name is the kind"
    assert set(world.driver.listdir(folder)) == {"weights", "sampler_weights"}
    for name, place in (("a", "weights/a"), ("b", "sampler_weights/b")):
        told = told_path(world, run, place)
        assert world.driver.read(f"{folder}/{name}/tinker_path").decode() == told
        content = world.driver.readlink(f"{folder}/{name}/archive_url")
        assert f"/.content/{run[5:]}/{place}/" in content
    if world.profile.shares_names:
        world.server.account.add_checkpoint(run[5:], "weights/b")
        world.refresh()
        assert outcome_of(lambda: world.driver.readlink(f"{folder}/b")) == "ENOENT"


@pytest.mark.where(profile=lambda profile: profile.listed_ids == "kind/name")
def test_bare_name_is_enoent_where_ids_have_kinds(world):
    run = world.new_run("weights/a")
    assert outcome_of(lambda: world.driver.stat(f"{run}/checkpoints/a")) == "ENOENT"


def test_names_that_are_shared_or_called_like_a_kind_are_told_apart(world):
    ids = ["weights/weights", "weights/x", "sampler_weights/only"]
    ids += ["sampler_weights/x"] * world.profile.shares_names
    run = world.new_run(*ids)
    told = sorted(world.driver.read(f"{p}/tinker_path").decode() for p in world.places(run))
    assert told == sorted(told_path(world, run, checkpoint_id) for checkpoint_id in ids)
    for checkpoint_id in ids:
        path = f"{run}/checkpoints/{checkpoint_id}/tinker_path"
        assert world.driver.read(path).decode() == told_path(world, run, checkpoint_id)
    if world.profile.shares_names:
        assert world.driver.remove(f"rmtree {run}/checkpoints/weights/x") == ["OK"]
        left = {c.id for c in world.server.account.run(run.partition("/")[2]).checkpoints}
        assert left == set(ids) - {"weights/x"}


@lists_bare_ids
def test_removing_a_bare_id_removes_nothing(world):
    run = world.new_run("weights/a", "weights/b", "sampler_weights/c")
    folder = f"{run}/checkpoints"
    assert world.driver.remove(f"unlink {folder}/a", f"rmtree {folder}/weights/b") == ["EPERM"] * 2
    assert world.driver.remove(f"rmdir {folder}/a") == ["ENOTDIR"]
    assert f"/{folder}/a\tunlink\tEPERM\tonly checkpoints can be removed" in world.errors()
    assert world.driver.remove(f"rmtree {folder}/weights/b") == ["OK"]
    left = {c.id for c in world.server.account.run(run[5:]).checkpoints}
    assert left == {"weights/a", "sampler_weights/c"}
    assert sorted(world.driver.listdir(folder)) == ["sampler_weights", "weights"]


def test_the_form_of_an_id_that_worked_is_remembered(make_world):
    world = make_world(runs=0)
    run = world.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    places = [f"{run}/checkpoints/sampler_weights/{n}" for n in range(6)]
    tries_archives = 2 if world.profile.archive_ids == "name" else 1
    if world.serves("GET archive"):
        for place in places[:3]:
            world.driver.read(f"{place}/archive_url")
        assert world.server.journal.count("GET archive") == tries_archives + 2
    assert world.driver.remove(*(f"rmtree {place}" for place in places)) == ["OK"] * 6
    tries_changes = 2 if world.profile.change_ids == "name" else 1
    assert world.server.journal.count("DELETE checkpoint") == tries_changes + 5


# What a server lacks.


@pytest.mark.parametrize(
    ("endpoint", "control", "value"),
    [("POST publish", "published", b"1"), ("PUT ttl", "expires_at", b"30d")],
)
@pytest.mark.where(profile=lambda profile: {"POST publish", "PUT ttl"} <= profile.missing)
def test_a_change_that_the_server_lacks_is_eopnotsupp_and_asked_for_rarely(
    world, endpoint, control, value
):
    run = world.new_run(*(f"weights/{n}" for n in range(8)))
    for _ in range(2):
        for n in range(8):
            place = f"{run}/checkpoints/weights/{n}"
            before = world.driver.read(f"{place}/{control}")
            path = f"{place}/{control}"
            assert outcome_of(lambda path=path: world.driver.write(path, value)) == "EOPNOTSUPP"
            assert world.driver.read(path) == before
    told = [line for line in world.errors().splitlines() if f"/{run}/" in line]
    assert "this server has no such endpoint" in told[0]
    asked = world.server.journal.count(endpoint)
    assert 1 <= asked <= 6  # three times, in either form of the id
    if not world.is_kernel:
        world.driver.time.advance(601)
        assert outcome_of(lambda: world.driver.write(path, value)) == "EOPNOTSUPP"
        assert asked < world.server.journal.count(endpoint) <= asked + 2


@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
def test_an_archive_that_the_server_lacks_is_eopnotsupp_and_asked_for_rarely(world):
    run = world.new_run(*(f"weights/{n}" for n in range(6)))
    for n in range(6):
        path = f"{run}/checkpoints/weights/{n}/archive_url"
        assert outcome_of(lambda path=path: world.driver.read(path)) == "EOPNOTSUPP"
    assert world.server.journal.count("GET archive") <= 6
    assert "this server has no such endpoint" in world.errors()
    assert world.driver.listdir(f"{run}/checkpoints/weights/0")


@pytest.mark.where(profile=lambda profile: profile.archive_kinds == {"sampler_weights"})
def test_an_archive_of_a_kind_that_has_none_is_eopnotsupp(world):
    run = world.new_run("sampler_weights/s", "sampler_weights/both", "weights/both", "weights/w")
    for name in ("weights/w", "weights/both"):
        path = f"{run}/checkpoints/{name}/archive_url"
        assert outcome_of(lambda path=path: world.driver.read(path)) == "EOPNOTSUPP"
    for name in ("sampler_weights/s", "sampler_weights/both"):
        url = world.driver.read(f"{run}/checkpoints/{name}/archive_url").decode()
        assert url.startswith(world.server.base_url)


@pytest.mark.served("GET training_runs/{run}")
@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
def test_an_archive_endpoint_that_is_gone_reads_otherwise_than_a_checkpoint_that_is(world):
    run = world.new_run("weights/here", "weights/gone")
    here = f"{run}/checkpoints/weights/here/archive_url"
    gone = f"{run}/checkpoints/weights/gone/archive_url"
    world.driver.stat(gone)
    assert outcome_of(lambda: world.driver.read(here)) == "EOPNOTSUPP"
    world.server.account.delete_checkpoint(run.partition("/")[2], "weights/gone")
    world.refresh()
    assert outcome_of(lambda: world.driver.read(gone)) == "ENOENT"


@pytest.mark.where(profile=lambda profile: "weights" in profile.weights_info_kinds != KIND_TYPES)
def test_weights_infos_of_a_kind_that_has_none_are_asked_for_rarely(make_world):
    world = make_world(runs=0)
    kinds = sorted(world.profile.kinds)
    run = world.new_run(*(f"{kind}/{kind}{n}" for kind in kinds for n in range(12)))
    for place in world.places(run):
        info = json.loads(world.driver.read(f"{place}/info.json"))
        kind = info["checkpoint_id"].rpartition("/")[2].rstrip("0123456789")
        assert ("lora_rank" in info) == (kind in world.profile.weights_info_kinds)
    world.server.journal.wait_until_idle()
    asked = [entry.status for entry in world.server.journal.entries("POST weights_info")]
    lacking = len(set(kinds) - world.profile.weights_info_kinds)
    assert asked.count(200) == 12 * (len(kinds) - lacking)
    # Three of the kind, and those that were under way beside them.
    assert lacking * 3 <= asked.count(400) <= lacking * (3 + 8)
    assert len([line for line in world.errors().splitlines() if f"/{run}/" in line]) <= 12


@pytest.mark.where(profile=lambda profile: "GET sessions" in profile.missing)
def test_a_server_without_sessions_shows_an_empty_folder_and_says_so(make_world):
    world = make_world(runs=1, checkpoints=1)
    assert world.driver.listdir("sessions") == []
    assert outcome_of(lambda: world.driver.stat("sessions/any")) == "ENOENT"
    assert world.driver.listdir("samplers") == []
    assert "EOPNOTSUPP" in world.errors()
    world.server.journal.clear()
    for _ in range(5):
        assert world.driver.listdir("sessions") == []
        if not world.is_kernel:
            world.driver.time.advance(60)
    assert api_calls(world.server) == {}
    if not world.is_kernel:
        world.driver.time.advance(301)
        assert world.driver.listdir("sessions") == []
        assert api_calls(world.server) == {"POST sessions/search": 1, "GET sessions": 1}


@pytest.mark.served("GET samplers/{sampler}")
@pytest.mark.where(profile=lambda profile: "GET sessions" in profile.missing)
def test_a_sampler_resolves_where_sessions_do_not(world):
    run = world.new_run("sampler_weights/s")
    path = f"tinker://{run[5:]}/sampler_weights/s"
    samplers = {"q:sample:0": ("Qwen/Qwen3-8B", path)}
    world.server.account.add_session(
        Session(id="q", created_at_s=1.7e9, run_ids=[], samplers=samplers, display_name=None)
    )
    told = world.driver.read("samplers/q:sample:0/checkpoint/tinker_path")
    assert told.decode() == f"{path}\n"


@pytest.mark.served("GET training_runs")
@pytest.mark.where(profile=lambda profile: "GET checkpoints" in profile.missing)
def test_views_are_made_of_the_runs_listings_asked_side_by_side(make_world):
    world = make_world(runs=40, checkpoints=3, latency_s=0.01)
    for view in ("checkpoints", "published", "expiring", "adapters"):
        world.driver.listdir(view)
    assert len(world.driver.listdir("checkpoints")) == 120
    assert api_calls(world.server) == {
        "GET checkpoints": 1,
        "GET training_runs": 1,
        "GET training_runs/{run}/checkpoints": 40,
    }
    assert world.server.journal.max_in_flight("GET training_runs/{run}/checkpoints") > 2


@lists_no_runs
def test_a_server_that_lists_no_runs_shows_an_empty_folder_and_resolves_what_is_asked_for(
    make_world,
):
    world = make_world(runs=2, checkpoints=5)
    assert world.driver.listdir("runs") == []
    assert world.driver.listdir("checkpoints") == []
    assert world.driver.listdir("models") == []
    assert "EOPNOTSUPP" in world.errors()
    for run in world.server.account.runs():
        assert world.driver.stat(f"runs/{run.id}").is_folder
        info = json.loads(world.driver.read(f"runs/{run.id}/info.json"))
        assert info["training_run_id"] == run.id
        listed = world.driver.listdir(f"runs/{run.id}/checkpoints")
        assert set(listed) == {c.kind for c in run.checkpoints}
        for checkpoint in run.checkpoints:
            place = f"runs/{run.id}/checkpoints/{checkpoint.name}"
            told = world.driver.read(f"{place}/tinker_path").decode()
            assert told == f"tinker://{run.id}/checkpoints/{checkpoint.name}\n"
            assert json.loads(world.driver.read(f"{place}/info.json"))["base_model"]
    assert outcome_of(lambda: world.driver.stat("runs/nobody")) == "ENOENT"
