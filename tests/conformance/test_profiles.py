"""Servers that are not the official one: bare ids, missing endpoints, other tinker paths."""

import json

import pytest

from tests.support.drivers import outcome_of

pytestmark = pytest.mark.expect_warnings("weights info EINVAL", "EOPNOTSUPP")


@pytest.fixture(scope="module")
def skyrl(make_world):
    return make_world(profile="skyrl", runs=2, checkpoints=5)


@pytest.fixture(scope="module")
def hatchery(make_world):
    return make_world(profile="hatchery", runs=2, checkpoints=5)


@pytest.fixture(scope="module")
def newer(make_world):
    return make_world(profile="official-0.36", runs=2, checkpoints=5)


def test_bare_ids_are_shown_bare_and_those_that_collide_with_their_kind(skyrl):
    for run in skyrl.server.account.runs():
        names = [c.name for c in run.checkpoints]
        folder = f"runs/{run.id}/checkpoints"
        bare = {name for name in names if names.count(name) == 1}
        kinds = {c.kind for c in run.checkpoints if c.name not in bare}
        assert bare
        assert kinds
        assert set(skyrl.driver.listdir(folder)) == bare | kinds
        for kind in kinds:
            wanted = {c.name for c in run.checkpoints if c.kind == kind and c.name not in bare}
            assert set(skyrl.driver.listdir(f"{folder}/{kind}")) == wanted


def test_kind_and_name_always_resolve(skyrl):
    for run in skyrl.server.account.runs():
        names = [c.name for c in run.checkpoints]
        for checkpoint in run.checkpoints:
            place = f"runs/{run.id}/checkpoints/{checkpoint.id}"
            told = skyrl.driver.read(f"{place}/tinker_path").decode()
            assert told == f"tinker://{run.id}/{checkpoint.id}\n"
            if names.count(checkpoint.name) == 1:
                bare = f"runs/{run.id}/checkpoints/{checkpoint.name}"
                assert skyrl.driver.read(f"{bare}/tinker_path").decode() == told
                link = skyrl.driver.readlink(f"{bare}/archive_url")
                assert f"/.content/{run.id}/{checkpoint.id}/" in link
                assert skyrl.driver.stat(f"{bare}/{link}").permissions == 0o400


def test_a_bare_checkpoint_can_be_deleted_under_either_name(skyrl):
    run = skyrl.new_run("weights/a", "weights/b", "sampler_weights/c")
    steps = [f"rmtree {run}/checkpoints/a", f"rmtree {run}/checkpoints/weights/b"]
    assert skyrl.driver.remove(*steps) == ["OK", "OK"]
    assert [c.id for c in skyrl.server.account.run(run.partition("/")[2]).checkpoints] == [
        "sampler_weights/c"
    ]
    assert skyrl.driver.listdir(f"{run}/checkpoints") == ["c"]


def test_what_the_server_lacks_is_eopnotsupp_and_the_thing_stays(skyrl):
    run = skyrl.new_run("weights/a")
    for control, value in (("published", b"1"), ("expires_at", b"30d")):
        path = f"{run}/checkpoints/a/{control}"
        before = skyrl.driver.read(path)
        assert outcome_of(lambda path=path, value=value: skyrl.driver.write(path, value)) == (
            "EOPNOTSUPP"
        )
        assert skyrl.driver.read(path) == before
    assert skyrl.driver.stat(f"{run}/checkpoints/a").is_folder


def test_only_sampler_checkpoints_have_an_archive_there(skyrl):
    run = skyrl.new_run("sampler_weights/s", "weights/w")
    url = skyrl.driver.read(f"{run}/checkpoints/s/archive_url").decode()
    assert url.startswith(skyrl.server.base_url)
    assert url.endswith("\n")


def test_a_server_that_lists_no_runs_shows_an_empty_folder_and_resolves_what_is_asked_for(hatchery):
    assert hatchery.driver.listdir("runs") == []
    assert "EOPNOTSUPP" in hatchery.errors()
    for run in hatchery.server.account.runs():
        assert hatchery.driver.stat(f"runs/{run.id}").is_folder
        assert json.loads(hatchery.driver.read(f"runs/{run.id}/info.json"))["training_run_id"] == (
            run.id
        )
        listed = hatchery.driver.listdir(f"runs/{run.id}/checkpoints")
        assert set(listed) == {c.name for c in run.checkpoints}
        for checkpoint in run.checkpoints:
            place = f"runs/{run.id}/checkpoints/{checkpoint.name}"
            told = hatchery.driver.read(f"{place}/tinker_path").decode()
            assert told == f"tinker://{run.id}/checkpoints/{checkpoint.name}\n"
            assert json.loads(hatchery.driver.read(f"{place}/info.json"))["base_model"]
    assert outcome_of(lambda: hatchery.driver.stat("runs/nobody")) == "ENOENT"


def test_an_archive_endpoint_that_is_gone_reads_otherwise_than_a_checkpoint_that_is(newer):
    run = newer.new_run("weights/here", "weights/gone")
    here = f"{run}/checkpoints/weights/here/archive_url"
    gone = f"{run}/checkpoints/weights/gone/archive_url"
    newer.driver.stat(gone)
    assert outcome_of(lambda: newer.driver.read(here)) == "EOPNOTSUPP"
    newer.server.account.delete_checkpoint(run.partition("/")[2], "weights/gone")
    newer.refresh()
    assert outcome_of(lambda: newer.driver.read(gone)) == "ENOENT"
    told = [line for line in newer.errors().splitlines() if f".content/{run[5:]}" in line]
    assert "this server has no such endpoint" in told[0]
    assert all("endpoint" not in line for line in told[1:])
