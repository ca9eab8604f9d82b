"""Tests of weights as files."""

import hashlib
import io
import json
import posixpath
import tarfile

import pytest

from tests.support.drivers import outcome_of
from tinkerfs import name_encoding

#: Files with the names of MLX are not converted for serving engines.
has_peft_names = pytest.mark.where(profile=lambda profile: not profile.member_names)


@pytest.fixture(scope="module")
def checkpoint_dir(world):
    run = world.new_run("weights/1", "sampler_weights/1")
    return f"{run}/checkpoints/sampler_weights/1"


def stored_archive(world, checkpoint_dir):
    """Return the stored archive as bytes, and its members."""
    _runs, run_id, _checkpoints, kind, name = checkpoint_dir.split("/")
    archive = world.server.archive(run_id, f"{kind}/{name}")
    data = archive.read(0, archive.size_bytes)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data, {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}


@pytest.mark.served("GET archive")
def test_members_are_files_with_exact_sizes(world, checkpoint_dir):
    _data, members = stored_archive(world, checkpoint_dir)
    assert set(world.driver.listdir(f"{checkpoint_dir}/files")) == set(members)
    for name, data in members.items():
        assert world.driver.stat(f"{checkpoint_dir}/files/{name}").size == len(data)
        assert world.driver.read(f"{checkpoint_dir}/files/{name}") == data
    assert outcome_of(lambda: world.driver.stat(f"{checkpoint_dir}/files/none")) == "ENOENT"
    assert outcome_of(lambda: world.driver.create(f"{checkpoint_dir}/files/new")) == "EPERM"
    member = f"{checkpoint_dir}/files/{world.member('adapter_config.json')}"
    assert outcome_of(lambda: world.driver.write(member, b"x")) == "EPERM"


@pytest.mark.served("GET archive")
def test_archive_equals_the_stored_one(world, checkpoint_dir):
    data, _members = stored_archive(world, checkpoint_dir)
    assert world.driver.read(f"{checkpoint_dir}/archive.tar") == data


@pytest.mark.served("GET archive")
def test_content_files_have_blocks_before_and_after_open(world, checkpoint_dir):
    if world.kind == "fsspec":  # fsspec reports no blocks
        return
    names = ["archive_url", "archive.tar", "tensors.json"]
    links = [
        f"{checkpoint_dir}/{world.driver.readlink(f'{checkpoint_dir}/{name}')}" for name in names
    ]
    members = [
        f"{checkpoint_dir}/files/{name}" for name in world.driver.listdir(f"{checkpoint_dir}/files")
    ]
    for path in [*map(posixpath.normpath, links), *members] * 2:
        status = world.driver.stat(path)
        assert status.blocks == -(-status.size // 512), path
        world.driver.read(path)


@pytest.mark.served("GET archive")
def test_tensors_json_matches_the_header(world, checkpoint_dir):
    _data, members = stored_archive(world, checkpoint_dir)
    weights = members[world.member("adapter_model.safetensors")]
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    tensors = json.loads(world.driver.read(f"{checkpoint_dir}/tensors.json"))["tensors"]
    expected = {name: value for name, value in header.items() if name != "__metadata__"}
    assert list(tensors) == sorted(expected)
    for name, value in expected.items():
        first, last = value["data_offsets"]
        assert tensors[name] == {
            "bytes": last - first,
            "dtype": value["dtype"],
            "shape": value["shape"],
        }


@pytest.mark.served("GET archive")
@pytest.mark.where(profile=lambda profile: not profile.serves_archives_itself)
def test_archive_is_downloaded_on_demand(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1")
    checkpoint_dir = f"{run}/checkpoints/sampler_weights/1"
    world.driver.listdir(checkpoint_dir)
    for name in ("files", "archive.tar", "tensors.json"):
        target = world.driver.readlink(f"{checkpoint_dir}/{name}")
        if name != "files":
            assert world.driver.stat(f"{checkpoint_dir}/{target}").size > 0
    assert world.server.journal.count("GET archive") == 0
    world.driver.listdir(f"{checkpoint_dir}/files")
    assert world.server.journal.count("GET archive") == 1
    ranges = world.server.journal.count("GET store/archive")
    assert 1 <= ranges <= 2
    world.driver.listdir(f"{checkpoint_dir}/files")
    world.driver.stat(f"{checkpoint_dir}/files/{world.member('adapter_config.json')}")
    assert world.server.journal.count("GET store/archive") == ranges


@pytest.mark.served("GET archive")
@has_peft_names
def test_adapters_contain_the_files_of_every_checkpoint(world, checkpoint_dir):
    _runs, run_id, _checkpoints, kind, name = checkpoint_dir.split("/")
    adapter = name_encoding.encode_composite((run_id, kind, name))
    listed = world.driver.listdir("adapters")
    assert adapter in listed
    assert listed == world.driver.listdir("checkpoints")
    _data, members = stored_archive(world, checkpoint_dir)
    listed_files = world.driver.listdir(f"adapters/{adapter}")
    assert set(listed_files) == {*members, "tensors.json"}
    config = json.loads(world.driver.read(f"adapters/{adapter}/adapter_config.json"))
    stored = json.loads(members["adapter_config.json"])
    assert config["base_model_name_or_path"] == stored["base_model_name_or_path"]
    foreign = world.server.account.run(world.server.account.foreign_run_ids[0])
    unlisted = world.server.account.add_checkpoint(
        foreign.id, "sampler_weights/theirs", is_public=True
    )
    path = name_encoding.encode_composite((foreign.id, *unlisted.id.split("/", 1)))
    assert path not in listed
    assert world.member("adapter_config.json") in world.driver.listdir(f"adapters/{path}")
    assert outcome_of(lambda: world.driver.listdir("adapters/no@sampler_weights@1")) == "ENOENT"
    assert outcome_of(lambda: world.driver.listdir(f"adapters/{run_id}@weights@none")) == "ENOENT"


@pytest.mark.served("GET archive")
@has_peft_names
def test_adapter_links_lead_to_targets_within_adapters(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1", "weights/1")
    adapter = name_encoding.encode_composite((run[5:], "sampler_weights", "1"))
    assert ".content" not in world.driver.listdir("adapters")
    target = world.driver.readlink(f"adapters/{adapter}")
    version = target.removeprefix(f".content/{run[5:]}/sampler_weights/1/")
    assert version not in ("", target), target
    directory = f"adapters/{target}"
    for depth in range(2, 6):
        parent = "/".join(directory.split("/")[:depth])
        assert world.driver.stat(parent).is_directory
        assert world.driver.listdir(parent) == [], parent
    assert world.server.journal.count("GET archive") == 0, "metadata operations request no archive"
    _data, members = stored_archive(world, f"{run}/checkpoints/sampler_weights/1")
    assert set(world.driver.listdir(directory)) == {*members, "tensors.json"}
    assert world.driver.read(f"{directory}/adapter_config.json") == members["adapter_config.json"]
    assert world.server.journal.count("GET archive") == (
        2 if world.profile.archive_ids == "name" else 1
    )
    for absent in (f"{run[5:]}/weights/none/{version}", f"{run[5:]}/sampler_weights/1/0", "nobody"):
        path = f"adapters/.content/{absent}"
        assert outcome_of(lambda path=path: world.driver.stat(path)) == "ENOENT"
    steps = [f"rmdir {directory}", f"rmtree {run}/checkpoints/weights/1"]
    assert world.driver.remove(*steps) == ["EPERM", "EPERM"]


@pytest.mark.served("GET archive")
def test_second_read_sends_no_request(world, checkpoint_dir):
    world.driver.listdir(f"{checkpoint_dir}/files")
    weights = f"{checkpoint_dir}/files/{world.member('adapter_model.safetensors')}"
    digest = hashlib.sha256(world.driver.read(weights))
    world.refresh()
    world.server.journal.clear()
    again = world.driver.read(weights)
    assert hashlib.sha256(again).digest() == digest.digest()
    assert world.server.journal.count("GET archive") == 0
    assert world.server.journal.count("store") == 0


@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
@pytest.mark.expect_warnings("no such endpoint|ENOENT|EOPNOTSUPP")
def test_server_without_archives_is_eopnotsupp(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1")
    checkpoint_dir = f"{run}/checkpoints/sampler_weights/1"
    for read in (
        lambda: world.driver.listdir(f"{checkpoint_dir}/files"),
        lambda: world.driver.read(f"{checkpoint_dir}/archive.tar"),
        lambda: world.driver.read(f"{checkpoint_dir}/tensors.json"),
    ):
        assert outcome_of(read) == "EOPNOTSUPP"
    assert "EOPNOTSUPP" in world.errors()


@pytest.mark.served("GET external_weights_urls")
def test_external_weights_take_one_request(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("external_weights/1")
    checkpoint_dir = f"{run}/checkpoints/external_weights/1"
    listed = world.driver.listdir(f"{checkpoint_dir}/files")
    assert world.member("adapter_config.json") in listed
    for name in listed:
        path = f"{checkpoint_dir}/files/{name}"
        assert len(world.driver.read(path)) == world.driver.stat(path).size
    with tarfile.open(
        fileobj=io.BytesIO(world.driver.read(f"{checkpoint_dir}/archive.tar"))
    ) as tar:
        for name in listed:
            data = world.driver.read(f"{checkpoint_dir}/files/{name}")
            assert tar.extractfile(name).read() == data
    assert world.server.journal.count("GET archive") == 0
    assert world.server.journal.count("GET external_weights_urls") == 1
