"""Names from the server: listed, resolved and read, whatever they are made of."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.account import HOSTILE_NAMES, can_be_listed
from tests.support.drivers import outcome_of
from tinkerfs import name_encoding

# The server takes no weights info of a name with a slash, which is told.
pytestmark = pytest.mark.expect_warnings("weights info EINVAL")


def file_name_bytes(name):
    return name.encode("utf-8", "surrogateescape")


@pytest.fixture(scope="module")
def hostile_names(world):
    return [name for name in HOSTILE_NAMES if can_be_listed(world.profile, name)]


@pytest.fixture(scope="module")
def hostile(world, hostile_names):
    """A run whose checkpoints have every hostile name."""
    return world.new_run(*(f"weights/{name}" for name in hostile_names))


def test_hostile_checkpoints_are_listed_resolved_and_read(world, hostile, hostile_names):
    folder = world.group(hostile)
    listed = world.driver.listdir(folder)
    assert len(set(listed)) == len(hostile_names)
    run_id = hostile.partition("/")[2]
    read = set()
    for name in listed:
        assert "/" not in name
        assert name not in (".", "..")
        assert len(file_name_bytes(name)) <= 255
        place = f"{folder}/{name}"
        assert world.driver.stat(place).is_folder
        info = json.loads(world.driver.read(f"{place}/info.json"))
        server_name = info["checkpoint_id"].removeprefix("weights/")
        assert name_encoding.encode(server_name) == name
        read.add(server_name)
        told = world.driver.read(f"{place}/tinker_path")
        assert told.startswith(f"tinker://{run_id}/".encode())
        assert world.driver.read(f"{place}/published") == b"0\n"
        target = world.driver.readlink(f"{place}/archive_url")
        assert world.driver.stat(f"{place}/{target}").permissions == 0o400
    assert read == set(hostile_names)


def test_a_name_that_is_one_as_it_stands_is_shown_as_it_stands(world, hostile):
    listed = world.driver.listdir(world.group(hostile))
    for name in ("new\nline", " ", "-rf", "*", "$(touch x)", "100%", "x" * 255):
        assert name in listed
    assert {"%2E%2E", "%2E", "%252F", "%25~", "nul%00nul"} <= set(listed)
    assert ("a%2Fb" in listed) == can_be_listed(world.profile, "a/b")
    assert "\udcff\udcfe" in listed


def test_hostile_checkpoints_can_be_published_and_deleted_where_the_server_takes_the_name(world):
    good = ["-rf", "new\nline", " ", "*", "100%", "%2F", "\udcff\udcfe", "x" * 300]
    run = world.new_run(*(f"weights/{name}" for name in good))
    server_run = world.server.account.run(run.partition("/")[2])
    for name in good:
        place = f"{run}/checkpoints/weights/{name_encoding.encode(name)}"
        if name != "\udcff\udcfe":  # the demo server takes a URL's bytes for UTF-8
            if world.serves("POST publish"):
                world.driver.write(f"{place}/published", b"1\n")
                checkpoint = world.server.account.checkpoint(server_run.id, f"weights/{name}")
                assert checkpoint.is_public, name
                assert world.driver.read(f"{place}/published") == b"1\n"
            assert world.driver.remove(f"rmtree {place}") == ["OK"], name
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
def test_what_encodes_no_name_is_not_there(world, name):
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
def test_any_names_are_told_apart_and_found(world, given_names):
    if world.is_kernel:
        given_names = given_names[:3]
    given_names = [name for name in given_names if can_be_listed(world.profile, name)]
    run = world.new_run(*(f"weights/{name}" for name in given_names))
    try:
        folder = world.group(run)
        listed = world.driver.listdir(folder)
        assert sorted(listed) == sorted({name_encoding.encode(name) for name in given_names})
        assert len(listed) == len(given_names)
        for name in listed:
            record = json.loads(world.driver.read(f"{folder}/{name}/info.json"))
            assert name_encoding.encode(record["checkpoint_id"].removeprefix("weights/")) == name
    finally:
        world.server.account.remove_run(run.partition("/")[2])
