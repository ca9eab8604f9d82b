"""Tests of exports: the control file `export`, and where weights come from."""

import io
import json
import tarfile

import pytest

from tests.support.drivers import outcome_of

KINDS = ("weights", "sampler_weights", "external_weights")

exports = pytest.mark.served("POST create_session")
without_archives = pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)


def new_checkpoint(world, kind="weights"):
    return f"{world.new_run(f'{kind}/1')}/checkpoints/{kind}/1"


def true_files(world, checkpoint_dir):
    _runs, run_id, _checkpoints, kind, name = checkpoint_dir.split("/")
    return {
        name: content.read(0, content.size_bytes)
        for name, content in world.server.files(run_id, f"{kind}/{name}").items()
    }


def tar_members(world, checkpoint_dir):
    """Return the files in a checkpoint's `archive.tar` by name."""
    data = world.driver.read(f"{checkpoint_dir}/archive.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def last_error(world, checkpoint_dir):
    run_id = checkpoint_dir.split("/")[1]
    return [line for line in world.errors().splitlines() if run_id in line][-1]


def test_only_training_checkpoints_have_an_export(world):
    directory = new_checkpoint(world)
    assert world.driver.read(f"{directory}/export") == b"none\n"
    assert world.driver.stat(f"{directory}/export").size == len(b"none\n")
    run = world.new_run("sampler_weights/1")
    sampler_dir = f"{run}/checkpoints/sampler_weights/1"
    assert outcome_of(lambda: world.driver.stat(f"{sampler_dir}/export")) == "ENOENT"
    assert "export" not in world.driver.listdir(sampler_dir)


def test_description_of_an_export_costs_no_request(world):
    directory = new_checkpoint(world)
    world.driver.listdir(directory)
    world.server.journal.clear()
    for _ in range(3):
        world.driver.stat(f"{directory}/export")
        world.driver.read(f"{directory}/export")
    assert world.server.journal.count("api") == 0


@exports
@without_archives
def test_write_exports_and_files_are_readable(world):
    directory = new_checkpoint(world)
    expected = true_files(world, directory)
    assert outcome_of(lambda: world.driver.listdir(f"{directory}/files")) == "EOPNOTSUPP"
    world.driver.write(f"{directory}/export", b" 1h\n")
    text = world.driver.read(f"{directory}/export").decode()
    assert text.startswith("tinker://export-session-")
    assert text.endswith(" bytes\n")
    assert world.driver.stat(f"{directory}/export").size == len(text) or world.is_kernel
    world.server.journal.clear()
    assert set(world.driver.listdir(f"{directory}/files")) == set(expected)
    for name, data in expected.items():
        assert world.driver.stat(f"{directory}/files/{name}").size == len(data)
        assert world.driver.read(f"{directory}/files/{name}") == data
    assert json.loads(world.driver.read(f"{directory}/tensors.json"))["tensors"]
    assert world.server.journal.count("GET external_weights_urls") == 1
    assert world.server.journal.count("GET archive") <= 1
    assert f"/{directory}/export\texport for 3600 s\t" in world.changes()
    assert tar_members(world, directory) == expected
    assert outcome_of(lambda: world.driver.read(f"{directory}/archive_url")) == "EOPNOTSUPP"
    assert "have no URL of an archive (hint: read archive.tar" in last_error(world, directory)


@exports
def test_never_deletes_the_export(world):
    directory = new_checkpoint(world)
    before = world.server.account.run_count
    world.driver.write(f"{directory}/export", b"2h")
    world.driver.write(f"{directory}/export", b"never\n")
    assert world.driver.read(f"{directory}/export") == b"none\n"
    assert world.server.journal.count("DELETE checkpoint") == 1
    assert world.server.account.run_count == before + 1
    world.driver.write(f"{directory}/export", b"never\n")
    assert world.server.journal.count("DELETE checkpoint") == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [(b"59m", "ERANGE"), (b"11y", "EINVAL"), (b"315360001", "ERANGE"), (b"soon", "EINVAL")],
)
def test_export_rejects_invalid_durations(world, value, name):
    directory = new_checkpoint(world)
    assert outcome_of(lambda: world.driver.write(f"{directory}/export", value)) == name
    world.driver.write(f"{directory}/export", b" \n")
    assert world.driver.read(f"{directory}/export") == b"none\n"
    assert not world.server.journal.count("POST create_session")


@pytest.mark.where(profile=lambda profile: "POST create_session" in profile.missing)
def test_server_without_exports_refuses_with_eopnotsupp(world):
    directory = new_checkpoint(world)
    assert outcome_of(lambda: world.driver.write(f"{directory}/export", b"1h")) == "EOPNOTSUPP"
    assert "so it exports no checkpoints" in last_error(world, directory)


@exports
@pytest.mark.where(profile=lambda profile: profile.name.startswith("official"))
@pytest.mark.expect_warnings("write EBUSY")
def test_checkpoint_that_was_saved_again_is_not_exported(world):
    directory = new_checkpoint(world)
    world.driver.listdir(directory)
    _runs, run_id, *_rest = directory.split("/")
    world.server.account.delete_checkpoint(run_id, "weights/1")
    world.server.account.add_checkpoint(run_id, "weights/1", time_s=1_900_000_000.0)
    assert outcome_of(lambda: world.driver.write(f"{directory}/export", b"1h")) == "EBUSY"
    assert not world.server.journal.count("POST create_session")
    assert "saved again" in last_error(world, directory)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_without_weights_are_refused_with_advice(world, kind):
    if kind not in world.profile.kinds:
        return
    directory = new_checkpoint(world, kind)
    expected = true_files(world, directory)
    has_archive = world.serves("GET archive") and kind in world.profile.archive_kinds
    if kind == "external_weights" or has_archive:
        assert set(world.driver.listdir(f"{directory}/files")) == set(expected)
        return
    for action in (
        lambda: world.driver.listdir(f"{directory}/files"),
        lambda: world.driver.read(f"{directory}/tensors.json"),
    ):
        assert outcome_of(action) == "EOPNOTSUPP"
        words = {
            "weights": "`echo 1h > export`",
            "sampler_weights": "save a training checkpoint or external weights",
        }[kind]
        assert words in last_error(world, directory)


@without_archives
@exports
def test_archives_of_fifty_checkpoints_cost_three_requests(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run(*(f"weights/{number}" for number in range(50)))
    for number in range(50):
        path = f"{run}/checkpoints/weights/{number}/files"
        assert outcome_of(lambda path=path: world.driver.listdir(path)) == "EOPNOTSUPP"
    assert world.server.journal.count("GET archive") == 3
    assert not world.server.journal.count("POST create_session")
