"""Tests of checkpoints without a time: saving them again does not change the record."""

import io
import json
import tarfile
from email.utils import formatdate

import pytest

from tests.support.drivers import opened, outcome_of
from tests.support.faulty_server import FaultyServer
from tinkerfs import name_encoding
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Data

WEIGHTS = "adapter_model.safetensors"
INFO = "POST weights_info"
NO_VALIDATORS = {"ETag": None, "Last-Modified": None}
#: Validators that a store may send for its n-th version of a file.
VALIDATORS = {
    "etag and date": lambda _number: {},
    "date": lambda number: {"ETag": None, "Last-Modified": formatdate(1e9 + number, usegmt=True)},
    "etag": lambda number: {"ETag": f'"{number}"', "Last-Modified": None},
    "length": lambda _number: NO_VALIDATORS,
}
#: More bytes than the padding of a tar file.
LONGER = 20_000


#: One binding is enough, because the behaviour does not depend on the kernel.
VARIANTS = [
    ("process", "official"),
    ("fsspec", "official"),
    pytest.param(("mfusepy3", "official"), marks=pytest.mark.kernel),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant[0])
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def world(make_world):
    return make_world(runs=1, checkpoints=1, settings={"archive_build_limit": 0})


def tensors(name, value):
    """A safetensors file with one tensor of four bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value]) * 4


def save(server, run_id, number, *, kind="sampler_weights", extra=0, **fields):
    """Save version `number` of a checkpoint, `extra` bytes longer; return its files."""
    files = {
        "adapter_config.json": b"{%d}" % number + b" " * extra,
        WEIGHTS: tensors(f"layer-{number}", number),
        f"only-{number}": b"",
    }
    content = {name: Data(data) for name, data in files.items()}
    fields = {"time_s": None, "archive": tar_of(content, 0), "files": content} | fields
    server.account.add_checkpoint(run_id, f"{kind}/1", **fields)
    server.faults.clear()
    server.faults.add(INFO, times=None, edit=lambda info: info | {"number": number})
    return files


def read(driver, checkpoint_dir):
    """Return the content of a checkpoint's files."""
    members = driver.listdir(f"{checkpoint_dir}/files")
    for name in members:
        assert driver.stat(f"{checkpoint_dir}/files/{name}").size == len(
            driver.read(f"{checkpoint_dir}/files/{name}")
        )
    return {name: driver.read(f"{checkpoint_dir}/files/{name}") for name in members}


def check(driver, checkpoint_dir, number, files, *, has_archive=True):
    """Check that all files show the same version."""
    assert read(driver, checkpoint_dir) == files
    assert list(json.loads(driver.read(f"{checkpoint_dir}/tensors.json"))["tensors"]) == [
        f"layer-{number}"
    ]
    assert json.loads(driver.read(f"{checkpoint_dir}/info.json"))["number"] == number
    if has_archive:
        with tarfile.open(fileobj=io.BytesIO(driver.read(f"{checkpoint_dir}/archive.tar"))) as tar:
            assert tar.getnames() == list(files)


def checkpoint_dir_of(run, kind="sampler_weights"):
    return f"{run}/checkpoints/{kind}/1"


@pytest.mark.parametrize("kind", ["sampler_weights", "external_weights"])
def test_checkpoint_without_time_saved_again_shows_the_new_one(world, kind):
    run = world.new_run()
    checkpoint_dir = checkpoint_dir_of(run, kind)
    for number in range(3):
        files = save(world.server, run.partition("/")[2], number, kind=kind)
        world.refresh()
        check(world.driver, checkpoint_dir, number, files, has_archive=kind != "external_weights")


@pytest.mark.parametrize("validators", VALIDATORS)
def test_open_of_checkpoint_without_time_checks_its_version(world, validators):
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    for number in range(3):
        # Without validators only the length differs.
        extra = LONGER * number if validators == "length" else 0
        files = save(world.server, run_id, number, extra=extra)
        headers = VALIDATORS[validators](number)
        world.server.faults.add("store", times=None, headers=headers)
        assert read(world.driver, checkpoint_dir) == files
        header = json.loads(world.driver.read(f"{checkpoint_dir}/tensors.json"))
        assert list(header["tensors"]) == [f"layer-{number}"]


def test_new_member_of_checkpoint_without_time_is_found_by_name(world):
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    save(world.server, run_id, 0)
    assert world.driver.read(f"{checkpoint_dir}/files/only-0") == b""
    save(world.server, run_id, 1)
    assert world.driver.read(f"{checkpoint_dir}/files/only-1") == b""
    assert world.eventually(
        lambda: outcome_of(lambda: world.driver.stat(f"{checkpoint_dir}/files/only-0")) == "ENOENT"
    )


def test_longer_member_of_checkpoint_without_time_is_read_whole(world):
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    save(world.server, run_id, 0)
    config = f"{checkpoint_dir}/files/adapter_config.json"
    assert world.driver.read(config) == b"{0}"
    files = save(world.server, run_id, 1, extra=5000)
    assert world.driver.read(config) == files["adapter_config.json"]
    files = save(world.server, run_id, 2)
    assert world.driver.read(config) == files["adapter_config.json"]


def test_open_of_checkpoint_without_time_takes_one_request(world):
    run = world.new_run()
    checkpoint_dir = checkpoint_dir_of(run)
    save(world.server, run.partition("/")[2], 0)
    read(world.driver, checkpoint_dir)
    for _ in range(2):
        world.server.journal.clear()
        world.driver.read(f"{checkpoint_dir}/files/{WEIGHTS}")
        opens = 2 if world.kind == "fsspec" else 1
        assert world.server.journal.count("store") == opens


@pytest.mark.expect_warnings("EIO|EHOSTUNREACH|ETIMEDOUT")
def test_checkpoint_without_time_is_shown_stale_in_an_outage(world):
    run = world.new_run()
    checkpoint_dir = checkpoint_dir_of(run)
    files = save(world.server, run.partition("/")[2], 0)
    assert read(world.driver, checkpoint_dir) == files
    world.server.faults.add("store", times=None, status=403)
    world.server.faults.add(
        "GET archive", times=None, status=500, headers={"x-should-retry": "false"}
    )
    assert read(world.driver, checkpoint_dir) == files


@pytest.mark.parametrize("has_time", [False, True], ids=["without time", "with time"])
def test_deletion_invalidates_the_cache(world, has_time):
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    for number in range(3):
        # Only the deletion distinguishes the versions.
        files = save(world.server, run_id, number, time_s=1e9 if has_time else None)
        world.server.faults.add("store", times=None, headers=NO_VALIDATORS)
        world.refresh()
        check(world.driver, checkpoint_dir, number, files)
        assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]


@pytest.mark.served("PUT ttl")
def test_removal_to_the_trash_invalidates_the_cache(make_world):
    world = make_world(runs=0, settings={"trash_s": 86_400.0})
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    for number in range(2):
        files = save(world.server, run_id, number)
        world.server.faults.add("store", times=None, headers=NO_VALIDATORS)
        world.refresh()
        check(world.driver, checkpoint_dir, number, files)
        assert world.driver.remove(f"rmtree {checkpoint_dir}") == ["OK"]


def test_checkpoint_of_another_size_is_another_version(world):
    run = world.new_run()
    checkpoint_dir, run_id = checkpoint_dir_of(run), run.partition("/")[2]
    for number in range(2):
        files = save(world.server, run_id, number, time_s=1e9, size_bytes=1000 + number)
        world.refresh()
        check(world.driver, checkpoint_dir, number, files)


def test_checkpoint_without_time_is_reloaded_by_the_next_mount(variant, tmp_path):
    with FaultyServer(runs=0) as server:
        run = server.account.add_run()
        checkpoint_dir = checkpoint_dir_of(f"runs/{run.id}")
        for number in range(2):
            files = save(server, run.id, number)
            with opened(variant[0], server, tmp_path) as driver:
                check(driver, checkpoint_dir, number, files)


def test_another_server_at_the_same_url_shows_its_own(variant, tmp_path):
    port = 0
    for number in range(2):
        with FaultyServer(runs=0, port=port) as server:
            port = int(server.base_url.rpartition(":")[2].partition("/")[0])
            run = server.account.add_run("run")
            files = save(server, run.id, number)
            server.faults.add("store", times=None, headers={"ETag": f'"{number}"'})
            with opened(variant[0], server, tmp_path) as driver:
                check(driver, checkpoint_dir_of(f"runs/{run.id}"), number, files)


def test_ids_with_equal_joins_do_not_share_blocks(world):
    # Joined by line breaks, run, kind and name of both would be equal.
    ids = [("a\nsampler_weights\nb", "c"), ("a", "b\nsampler_weights\nc")]
    checkpoint_dirs = []
    for number, (run_id, name) in enumerate(ids):
        world.server.account.add_run(run_id)
        files = {"adapter_config.json": Data(b"{%d}" % number)}
        world.server.account.add_checkpoint(
            run_id, f"sampler_weights/{name}", time_s=1e9, archive=tar_of(files, 0)
        )
        run, name = name_encoding.encode(run_id), name_encoding.encode(name)
        checkpoint_dirs.append(f"runs/{run}/checkpoints/sampler_weights/{name}")
    world.server.faults.clear()
    world.server.faults.add("store", times=None, headers=NO_VALIDATORS)
    world.refresh()
    for number, checkpoint_dir in enumerate(checkpoint_dirs):
        assert world.driver.read(f"{checkpoint_dir}/files/adapter_config.json") == b"{%d}" % number
