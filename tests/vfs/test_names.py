"""Tests of unusual names: they are listed, resolved and read."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.account import HOSTILE_NAMES, can_be_listed
from tests.support.drivers import outcome_of
from tinkerfs import name_encoding

# The server refuses weights infos of names with a slash, which is reported.
pytestmark = [pytest.mark.every_binding, pytest.mark.expect_warnings("weights info EINVAL")]


def file_name_bytes(name):
    return name.encode("utf-8", "surrogateescape")


@pytest.fixture(scope="module")
def hostile_names(world):
    return [name for name in HOSTILE_NAMES if can_be_listed(world.profile, name)]


@pytest.fixture(scope="module")
def hostile(world, hostile_names):
    """A run with a checkpoint for every hostile name."""
    return world.new_run(*(f"weights/{name}" for name in hostile_names))


def test_hostile_checkpoints_are_listed_resolved_and_read(world, hostile, hostile_names):
    directory = world.kind_directory(hostile)
    listed = world.driver.listdir(directory)
    assert len(set(listed)) == len(hostile_names)
    run_id = hostile.partition("/")[2]
    read = set()
    for name in listed:
        assert "/" not in name
        assert name not in (".", "..")
        assert len(file_name_bytes(name)) <= 255
        checkpoint_dir = f"{directory}/{name}"
        assert world.driver.stat(checkpoint_dir).is_directory
        info = json.loads(world.driver.read(f"{checkpoint_dir}/info.json"))
        server_name = info["checkpoint_id"].removeprefix("weights/")
        assert name_encoding.encode(server_name) == name
        read.add(server_name)
        text = world.driver.read(f"{checkpoint_dir}/tinker_path")
        assert text.startswith(f"tinker://{run_id}/".encode())
        assert world.driver.read(f"{checkpoint_dir}/published") == b"0\n"
        target = world.driver.readlink(f"{checkpoint_dir}/archive_url")
        assert world.driver.stat(f"{checkpoint_dir}/{target}").permissions == 0o400
    assert read == set(hostile_names)


def test_valid_file_names_are_not_encoded(world, hostile):
    listed = world.driver.listdir(world.kind_directory(hostile))
    for name in ("new\nline", " ", "-rf", "*", "$(touch x)", "100%", "x" * 255):
        assert name in listed
    assert {"%2E%2E", "%2E", "%252F", "%25~", "nul%00nul"} <= set(listed)
    assert ("a%2Fb" in listed) == can_be_listed(world.profile, "a/b")
    assert "\udcff\udcfe" in listed


def test_hostile_checkpoints_can_be_published_and_deleted(world):
    good = ["-rf", "new\nline", " ", "*", "100%", "%2F", "\udcff\udcfe", "x" * 300]
    run = world.new_run(*(f"weights/{name}" for name in good))
    server_run = world.server.account.run(run.partition("/")[2])
    for name in good:
        checkpoint_dir = f"{run}/checkpoints/weights/{name_encoding.encode(name)}"
        if name != "\udcff\udcfe":  # the demo server decodes URLs as UTF-8
            if world.serves("DELETE publish"):
                world.driver.write(f"{checkpoint_dir}/published", b"1\n")
                checkpoint = world.server.account.checkpoint(server_run.id, f"weights/{name}")
                assert checkpoint.is_public, name
                assert world.driver.read(f"{checkpoint_dir}/published") == b"1\n"
            assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"], name
    assert len(server_run.checkpoints) == 1


@pytest.mark.served("GET training_runs")
def test_hostile_runs_are_listed_and_resolve(world):
    for name in HOSTILE_NAMES:
        world.server.account.add_run(name or None)
    world.refresh()
    try:
        listed = world.driver.listdir("runs")
        for name in HOSTILE_NAMES:
            shown = name_encoding.encode(name)
            assert shown in listed
            info = json.loads(world.driver.read(f"runs/{shown}/info.json"))
            assert info["training_run_id"] == name
        assert len(set(listed)) == len(listed)
    finally:
        for name in HOSTILE_NAMES:
            world.server.account.remove_run(name)
        world.refresh()


@pytest.mark.parametrize("name", ["%41", "a%2fb", "%2e%2e", "%7E", "%25", "x" * 250 + "%~"])
def test_name_that_encodes_nothing_is_enoent(world, name):
    run = world.new_run("weights/A", "weights/a/b", "weights/~")
    assert outcome_of(lambda: world.driver.stat(f"{run}/checkpoints/weights/{name}")) == "ENOENT"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(codec=None) | st.sampled_from("%~/.\0AF2\udcff"), min_size=1),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_any_names_are_distinct_and_resolve(world, given_names):
    if world.is_kernel:
        given_names = given_names[:3]
    given_names = [name for name in given_names if can_be_listed(world.profile, name)]
    run = world.new_run(*(f"weights/{name}" for name in given_names))
    try:
        directory = world.kind_directory(run)
        listed = world.driver.listdir(directory)
        assert sorted(listed) == sorted({name_encoding.encode(name) for name in given_names})
        assert len(listed) == len(given_names)
        for name in listed:
            record = json.loads(world.driver.read(f"{directory}/{name}/info.json"))
            assert name_encoding.encode(record["checkpoint_id"].removeprefix("weights/")) == name
    finally:
        world.server.account.remove_run(run.partition("/")[2])
