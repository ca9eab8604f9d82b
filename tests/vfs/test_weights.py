"""Weights as files, over every driver."""

import hashlib
import io
import json
import posixpath
import tarfile

import pytest

from tests.support.drivers import outcome_of
from tinkerfs import name_encoding


@pytest.fixture(scope="module")
def place(world):
    run = world.new_run("weights/1", "sampler_weights/1")
    return f"{run}/checkpoints/sampler_weights/1"


def truth_of(world, place):
    """The archive, as bytes and as members."""
    _runs, run_id, _checkpoints, kind, name = place.split("/")
    archive = world.server.archive(run_id, f"{kind}/{name}")
    data = archive.read(0, archive.size_bytes)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data, {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}


@pytest.mark.served("GET archive")
def test_the_members_are_files_with_exact_sizes(world, place):
    _data, members = truth_of(world, place)
    assert set(world.driver.listdir(f"{place}/files")) == set(members)
    for name, data in members.items():
        assert world.driver.stat(f"{place}/files/{name}").size == len(data)
        assert world.driver.read(f"{place}/files/{name}") == data
    assert outcome_of(lambda: world.driver.stat(f"{place}/files/none")) == "ENOENT"
    assert outcome_of(lambda: world.driver.create(f"{place}/files/new")) == "EPERM"
    member = f"{place}/files/adapter_config.json"
    assert outcome_of(lambda: world.driver.write(member, b"x")) == "EPERM"


@pytest.mark.served("GET archive")
def test_the_archive_is_the_store_s(world, place):
    data, _members = truth_of(world, place)
    assert world.driver.read(f"{place}/archive.tar") == data


@pytest.mark.served("GET archive")
def test_content_files_have_blocks_before_and_after_open(world, place):
    if world.kind == "fsspec":  # whose infos have no blocks
        return
    names = ["archive_url", "archive.tar", "tensors.json"]
    links = [f"{place}/{world.driver.readlink(f'{place}/{name}')}" for name in names]
    members = [f"{place}/files/{name}" for name in world.driver.listdir(f"{place}/files")]
    for path in [*map(posixpath.normpath, links), *members] * 2:
        status = world.driver.stat(path)
        assert status.blocks == -(-status.size // 512), path
        world.driver.read(path)


@pytest.mark.served("GET archive")
def test_tensors_come_from_the_header(world, place):
    _data, members = truth_of(world, place)
    weights = members["adapter_model.safetensors"]
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    told = json.loads(world.driver.read(f"{place}/tensors.json"))["tensors"]
    expected = {name: value for name, value in header.items() if name != "__metadata__"}
    assert list(told) == sorted(expected)
    for name, value in expected.items():
        first, last = value["data_offsets"]
        assert told[name] == {
            "bytes": last - first,
            "dtype": value["dtype"],
            "shape": value["shape"],
        }


@pytest.mark.served("GET archive")
@pytest.mark.where(profile=lambda profile: not profile.serves_archives_itself)
def test_what_is_not_asked_for_is_not_fetched(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1")
    place = f"{run}/checkpoints/sampler_weights/1"
    world.driver.listdir(place)
    for name in ("files", "archive.tar", "tensors.json"):
        target = world.driver.readlink(f"{place}/{name}")
        if name != "files":
            assert world.driver.stat(f"{place}/{target}").size > 0
    assert world.server.journal.count("GET archive") == 0
    world.driver.listdir(f"{place}/files")
    assert world.server.journal.count("GET archive") == 1
    ranges = world.server.journal.count("GET store/archive")
    assert 1 <= ranges <= 2
    world.driver.listdir(f"{place}/files")
    world.driver.stat(f"{place}/files/adapter_config.json")
    assert world.server.journal.count("GET store/archive") == ranges


@pytest.mark.served("GET archive")
def test_adapters_are_the_folders_that_serving_engines_take(world, place):
    _runs, run_id, _checkpoints, kind, name = place.split("/")
    served = name_encoding.encode_composite((run_id, kind, name))
    listed = world.driver.listdir("adapters")
    assert served in listed
    assert all(
        name_encoding.decode_composite(each)[1] in ("sampler_weights", "external_weights")
        for each in listed
    )
    _data, members = truth_of(world, place)
    assert set(world.driver.listdir(f"adapters/{served}")) == set(members)
    config = world.driver.read(f"adapters/{served}/adapter_config.json")
    assert config == members["adapter_config.json"]
    foreign = world.server.account.run(world.server.account.foreign_run_ids[0])
    unlisted = world.server.account.add_checkpoint(
        foreign.id, "sampler_weights/theirs", is_public=True
    )
    path = name_encoding.encode_composite((foreign.id, *unlisted.id.split("/", 1)))
    assert path not in listed
    assert "adapter_config.json" in world.driver.listdir(f"adapters/{path}")
    assert outcome_of(lambda: world.driver.listdir("adapters/no@sampler_weights@1")) == "ENOENT"
    assert outcome_of(lambda: world.driver.listdir(f"adapters/{run_id}@weights@1")) == "ENOENT"


@pytest.mark.served("GET archive")
def test_adapters_lead_to_directories_within_adapters(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1", "weights/1")
    served = name_encoding.encode_composite((run[5:], "sampler_weights", "1"))
    assert ".content" not in world.driver.listdir("adapters")
    target = world.driver.readlink(f"adapters/{served}")
    version = target.removeprefix(f".content/{run[5:]}/sampler_weights/1/")
    assert version not in ("", target), target
    folder = f"adapters/{target}"
    for depth in range(2, 6):
        above = "/".join(folder.split("/")[:depth])
        assert world.driver.stat(above).is_folder
        assert world.driver.listdir(above) == [], above
    assert world.server.journal.count("GET archive") == 0, "looking costs nothing"
    _data, members = truth_of(world, f"{run}/checkpoints/sampler_weights/1")
    assert set(world.driver.listdir(folder)) == set(members)
    assert world.driver.read(f"{folder}/adapter_config.json") == members["adapter_config.json"]
    assert world.server.journal.count("GET archive") == (
        2 if world.profile.archive_ids == "name" else 1
    )
    for absent in (f"{run[5:]}/weights/1/{version}", f"{run[5:]}/sampler_weights/1/0", "nobody"):
        path = f"adapters/.content/{absent}"
        assert outcome_of(lambda path=path: world.driver.stat(path)) == "ENOENT"
    steps = [f"rmdir {folder}", f"rmtree {run}/checkpoints/weights/1"]
    assert world.driver.remove(*steps) == ["EPERM", "EPERM"]


@pytest.mark.served("GET archive")
def test_a_later_look_costs_nothing(world, place):
    world.driver.listdir(f"{place}/files")
    digest = hashlib.sha256(world.driver.read(f"{place}/files/adapter_model.safetensors"))
    world.refresh()
    world.server.journal.clear()
    again = world.driver.read(f"{place}/files/adapter_model.safetensors")
    assert hashlib.sha256(again).digest() == digest.digest()
    assert world.server.journal.count("GET archive") == 0
    assert world.server.journal.count("store") == 0


@pytest.mark.where(profile=lambda profile: "GET archive" in profile.missing)
@pytest.mark.expect_warnings("no such endpoint|ENOENT|EOPNOTSUPP")
def test_a_server_without_archives_says_so(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("sampler_weights/1")
    place = f"{run}/checkpoints/sampler_weights/1"
    for look in (
        lambda: world.driver.listdir(f"{place}/files"),
        lambda: world.driver.read(f"{place}/archive.tar"),
        lambda: world.driver.read(f"{place}/tensors.json"),
    ):
        assert outcome_of(look) == "EOPNOTSUPP"
    assert "EOPNOTSUPP" in world.errors()


@pytest.mark.served("GET external_weights_urls")
def test_external_weights_are_a_file_each(make_world):
    world = make_world(runs=1, checkpoints=1)
    run = world.new_run("external_weights/1")
    place = f"{run}/checkpoints/external_weights/1"
    listed = world.driver.listdir(f"{place}/files")
    assert "adapter_config.json" in listed
    for name in listed:
        path = f"{place}/files/{name}"
        assert len(world.driver.read(path)) == world.driver.stat(path).size
    assert world.server.journal.count("GET external_weights_urls") == 1
