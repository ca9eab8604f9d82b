"""Tests of server differences: bare ids, other tinker paths, missing endpoints."""

import json

import pytest

from tests.support.account import api_calls
from tests.support.drivers import outcome_of
from tinkerfs.demo import serialization
from tinkerfs.demo.profiles import KIND_TYPES
from tinkerfs.demo.sample_data import Session

lists_bare_ids = pytest.mark.where(profile=lambda profile: profile.listed_ids == "name")
#: True for hatchery, which knows runs only by their checkpoints.
lists_no_runs = pytest.mark.where(profile=lambda profile: "GET training_runs" in profile.missing)


def tinker_path_text(world, run, checkpoint_id):
    """Return the expected content of `tinker_path`."""
    run_id = run.partition("/")[2]
    checkpoint = world.server.account.checkpoint(run_id, checkpoint_id)
    return f"{serialization.tinker_path(run_id, checkpoint, world.profile)}\n"


# Ids.


def test_checkpoints_are_listed_by_kind_and_name(world):
    for run in world.server.account.runs():
        checkpoint_dirs = [
            checkpoint_dir.partition("/checkpoints/")[2]
            for checkpoint_dir in world.checkpoint_dirs(f"runs/{run.id}")
        ]
        assert sorted(checkpoint_dirs) == sorted(checkpoint.id for checkpoint in run.checkpoints)
        for checkpoint in run.checkpoints:
            text = tinker_path_text(world, f"runs/{run.id}", checkpoint.id)
            checkpoint_dir = f"runs/{run.id}/checkpoints/{checkpoint.id}"
            assert world.driver.read(f"{checkpoint_dir}/tinker_path").decode() == text


def test_checkpoint_resolves_by_its_tinker_path(world):
    for run in world.server.account.runs():
        for checkpoint in run.checkpoints:
            text = tinker_path_text(world, f"runs/{run.id}", checkpoint.id)
            _, _, rest = text.strip().removeprefix("tinker://").partition("/")
            checkpoint_dir = f"runs/{run.id}/checkpoints/{rest}"
            assert world.driver.read(f"{checkpoint_dir}/tinker_path").decode() == text


@lists_bare_ids
def test_bare_id_of_one_checkpoint_is_an_unlisted_link(world):
    run = world.new_run("weights/a", "sampler_weights/b", "weights/sampler_weights")
    directory = f"{run}/checkpoints"
    assert world.driver.readlink(f"{directory}/a") == "weights/a"
    assert world.driver.readlink(f"{directory}/b") == "sampler_weights/b"
    assert world.driver.stat(f"{directory}/sampler_weights").is_directory, (
        "a kind's name is the kind"
    )
    assert set(world.driver.listdir(directory)) == {"weights", "sampler_weights"}
    for name, checkpoint_dir in (("a", "weights/a"), ("b", "sampler_weights/b")):
        text = tinker_path_text(world, run, checkpoint_dir)
        assert world.driver.read(f"{directory}/{name}/tinker_path").decode() == text
        content = world.driver.readlink(f"{directory}/{name}/archive_url")
        assert f"/.content/{run[5:]}/{checkpoint_dir}/" in content
    if world.profile.shares_names:
        world.server.account.add_checkpoint(run[5:], "weights/b")
        world.refresh()
        assert outcome_of(lambda: world.driver.readlink(f"{directory}/b")) == "ENOENT"


@pytest.mark.where(profile=lambda profile: profile.listed_ids == "kind/name")
def test_bare_name_is_enoent_where_ids_have_kinds(world):
    run = world.new_run("weights/a")
    assert outcome_of(lambda: world.driver.stat(f"{run}/checkpoints/a")) == "ENOENT"


def test_ambiguous_checkpoint_names_are_distinct(world):
    ids = ["weights/weights", "weights/x", "sampler_weights/only"]
    ids += ["sampler_weights/x"] * world.profile.shares_names
    run = world.new_run(*ids)
    text = sorted(
        world.driver.read(f"{p}/tinker_path").decode() for p in world.checkpoint_dirs(run)
    )
    assert text == sorted(tinker_path_text(world, run, checkpoint_id) for checkpoint_id in ids)
    for checkpoint_id in ids:
        path = f"{run}/checkpoints/{checkpoint_id}/tinker_path"
        assert world.driver.read(path).decode() == tinker_path_text(world, run, checkpoint_id)
    if world.profile.shares_names:
        assert world.driver.remove(f"rmtree {run}/checkpoints/weights/x") == ["OK"]
        remaining = {c.id for c in world.server.account.run(run.partition("/")[2]).checkpoints}
        assert remaining == set(ids) - {"weights/x"}


@lists_bare_ids
def test_removing_a_bare_id_removes_nothing(world):
    run = world.new_run("weights/a", "weights/b", "sampler_weights/c")
    directory = f"{run}/checkpoints"
    assert (
        world.driver.remove(f"unlink {directory}/a", f"rmtree {directory}/weights/b")
        == ["EPERM"] * 2
    )
    assert world.driver.remove(f"rmdir {directory}/a") == ["ENOTDIR"]
    assert f"/{directory}/a\tunlink\tEPERM\tonly checkpoints can be removed" in world.errors()
    assert world.driver.remove(f"rmtree {directory}/weights/b") == ["OK"]
    remaining = {c.id for c in world.server.account.run(run[5:]).checkpoints}
    assert remaining == {"weights/a", "sampler_weights/c"}
    assert sorted(world.driver.listdir(directory)) == ["sampler_weights", "weights"]


def test_accepted_id_form_is_remembered(make_world):
    world = make_world(runs=0)
    run = world.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    checkpoint_dirs = [f"{run}/checkpoints/sampler_weights/{n}" for n in range(6)]
    tries_archives = 2 if world.profile.archive_ids == "name" else 1
    if world.serves("GET archive"):
        for checkpoint_dir in checkpoint_dirs[:3]:
            world.driver.read(f"{checkpoint_dir}/archive_url")
        assert world.server.journal.count("GET archive") == tries_archives + 2
    assert (
        world.driver.remove(*(f"rmtree {checkpoint_dir}" for checkpoint_dir in checkpoint_dirs))
        == ["OK"] * 6
    )
    tries_changes = 2 if world.profile.change_ids == "name" else 1
    assert world.server.journal.count("DELETE checkpoint") == tries_changes + 5


# Missing endpoints.


@pytest.mark.parametrize(
    ("endpoint", "control", "value"),
    [("POST publish", "published", b"1"), ("PUT ttl", "expires_at", b"30d")],
)
@pytest.mark.where(profile=lambda profile: {"POST publish", "PUT ttl"} <= profile.missing)
def test_unsupported_change_is_eopnotsupp_and_rarely_retried(world, endpoint, control, value):
    run = world.new_run(*(f"weights/{n}" for n in range(8)))
    for _ in range(2):
        for n in range(8):
            checkpoint_dir = f"{run}/checkpoints/weights/{n}"
            before = world.driver.read(f"{checkpoint_dir}/{control}")
            path = f"{checkpoint_dir}/{control}"
            assert outcome_of(lambda path=path: world.driver.write(path, value)) == "EOPNOTSUPP"
            assert world.driver.read(path) == before
    text = [line for line in world.errors().splitlines() if f"/{run}/" in line]
    assert "this server has no such endpoint" in text[0]
    requests = world.server.journal.count(endpoint)
    assert 1 <= requests <= 6  # three times, in both forms of the id
    if not world.is_kernel:
        world.driver.time.advance(601)
        assert outcome_of(lambda: world.driver.write(path, value)) == "EOPNOTSUPP"
        assert requests < world.server.journal.count(endpoint) <= requests + 2


@pytest.mark.where(profile=lambda profile: profile.publishes_to_hub)
def test_publishing_to_a_hub_succeeds_once_and_changes_no_record(world):
    checkpoint_dir = f"{world.new_run('weights/a')}/checkpoints/weights/a"
    world.driver.write(f"{checkpoint_dir}/published", b"1")
    assert world.server.journal.count("POST publish") == 1
    world.refresh()
    assert world.driver.read(f"{checkpoint_dir}/published") == b"0\n"


@pytest.mark.where(profile=lambda profile: profile.has_archive_ids)
def test_archive_with_an_own_id_has_the_members_of_mlx(world):
    files = f"{world.new_run('weights/a')}/checkpoints/weights/a/files"
    assert {"adapters.safetensors", "config.json"} <= set(world.driver.listdir(files))
    assert "/api/v1/archives/" in world.driver.read(files.replace("files", "archive_url")).decode()


@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
def test_unsupported_archive_is_eopnotsupp_and_rarely_retried(world):
    run = world.new_run(*(f"weights/{n}" for n in range(6)))
    for n in range(6):
        path = f"{run}/checkpoints/weights/{n}/archive_url"
        assert outcome_of(lambda path=path: world.driver.read(path)) == "EOPNOTSUPP"
    assert world.server.journal.count("GET archive") <= 6
    assert "this server has no such endpoint" in world.errors()
    assert world.driver.listdir(f"{run}/checkpoints/weights/0")


@pytest.mark.where(profile=lambda profile: profile.archive_kinds == {"sampler_weights"})
def test_archive_of_an_unsupported_kind_is_eopnotsupp(world):
    run = world.new_run("sampler_weights/s", "sampler_weights/both", "weights/both", "weights/w")
    for name in ("weights/w", "weights/both"):
        path = f"{run}/checkpoints/{name}/archive_url"
        assert outcome_of(lambda path=path: world.driver.read(path)) == "EOPNOTSUPP"
    for name in ("sampler_weights/s", "sampler_weights/both"):
        url = world.driver.read(f"{run}/checkpoints/{name}/archive_url").decode()
        assert url.startswith(world.server.base_url)


@pytest.mark.served("GET training_runs/{run}")
@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
def test_missing_endpoint_differs_from_a_missing_checkpoint(world):
    run = world.new_run("weights/here", "weights/gone")
    here = f"{run}/checkpoints/weights/here/archive_url"
    gone = f"{run}/checkpoints/weights/gone/archive_url"
    world.driver.stat(gone)
    assert outcome_of(lambda: world.driver.read(here)) == "EOPNOTSUPP"
    world.server.account.delete_checkpoint(run.partition("/")[2], "weights/gone")
    world.refresh()
    assert outcome_of(lambda: world.driver.read(gone)) == "ENOENT"


@pytest.mark.where(profile=lambda profile: "weights" in profile.weights_info_kinds != KIND_TYPES)
def test_weights_info_of_an_unsupported_kind_is_rarely_retried(make_world):
    world = make_world(runs=0)
    kinds = sorted(world.profile.kinds)
    run = world.new_run(*(f"{kind}/{kind}{n}" for kind in kinds for n in range(12)))
    for checkpoint_dir in world.checkpoint_dirs(run):
        info = json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))
        kind = info["checkpoint_id"].rpartition("/")[2].rstrip("0123456789")
        assert ("lora_rank" in info) == (kind in world.profile.weights_info_kinds)
    world.server.journal.wait_until_idle()
    requests = [entry.status for entry in world.server.journal.entries("POST weights_info")]
    lacking = len(set(kinds) - world.profile.weights_info_kinds)
    assert requests.count(200) == 12 * (len(kinds) - lacking)
    # Three requests per kind, and those that were in flight at the same time.
    assert lacking * 3 <= requests.count(400) <= lacking * (3 + 8)
    assert len([line for line in world.errors().splitlines() if f"/{run}/" in line]) <= 12


@pytest.mark.where(profile=lambda profile: "GET sessions" in profile.missing)
def test_sessions_are_empty_on_a_server_without_sessions(make_world):
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
def test_sampler_resolves_on_a_server_without_sessions(world):
    run = world.new_run("sampler_weights/s")
    path = f"tinker://{run[5:]}/sampler_weights/s"
    samplers = {"q:sample:0": ("Qwen/Qwen3-8B", path)}
    world.server.account.add_session(
        Session(id="q", created_at_s=1.7e9, run_ids=[], samplers=samplers, display_name=None)
    )
    text = world.driver.read("samplers/q:sample:0/checkpoint/tinker_path")
    assert text.decode() == f"{path}\n"


@pytest.mark.served("GET training_runs")
@pytest.mark.where(profile=lambda profile: "GET checkpoints" in profile.missing)
def test_views_combine_the_listings_of_all_runs(make_world):
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
def test_runs_resolve_on_a_server_that_lists_none(
    make_world,
):
    world = make_world(runs=2, checkpoints=5)
    assert world.driver.listdir("runs") == []
    assert world.driver.listdir("checkpoints") == []
    assert world.driver.listdir("models") == []
    assert "EOPNOTSUPP" in world.errors()
    for run in world.server.account.runs():
        assert world.driver.stat(f"runs/{run.id}").is_directory
        info = json.loads(world.driver.read(f"runs/{run.id}/info.json"))
        assert info["training_run_id"] == run.id
        listed = world.driver.listdir(f"runs/{run.id}/checkpoints")
        assert set(listed) == {c.kind for c in run.checkpoints}
        for checkpoint in run.checkpoints:
            checkpoint_dir = f"runs/{run.id}/checkpoints/{checkpoint.name}"
            text = world.driver.read(f"{checkpoint_dir}/tinker_path").decode()
            assert text == f"tinker://{run.id}/checkpoints/{checkpoint.name}\n"
            assert json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))["base_model"]
    assert outcome_of(lambda: world.driver.stat("runs/nobody")) == "ENOENT"
