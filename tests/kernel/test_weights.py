"""Weights on real mounts: what the kernel makes of sizes, pages and mappings; loaders."""

import hashlib
import json
import mmap
import os
import shutil
import struct
import sys

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tests.support.mount import run

__all__ = ["account", "make_account"]

BIG_BYTES = 40 << 20


@pytest.fixture(scope="module")
def weights(make_account):
    """An account whose newest run has a sampler checkpoint of 40 MB."""
    account = make_account(runs=1, checkpoints=1, settings={"archive_burst": 0})
    account.run = account.new_run("sampler_weights/small")
    run_id = account.run.removeprefix("runs/")
    account.server.account.add_checkpoint(run_id, "sampler_weights/big", size_bytes=BIG_BYTES)
    account.refresh()
    return account


def place_of(weights, name):
    return weights.path(f"{weights.run}/checkpoints/sampler_weights/{name}")


def archive_of(weights, name):
    run_id = weights.run.removeprefix("runs/")
    archive = weights.server.archive(run_id, f"sampler_weights/{name}")
    return archive.read(0, archive.size_bytes)


COPIES = {
    "cp": "cp {0} {1}",
    "cat": "cat {0} > {1}",
    "dd": "dd if={0} of={1} bs=64k status=none",
    "rsync": "rsync -L {0} {1}",
    "tar": "tar chf - -C $(dirname {0}) $(basename {0}) | tar xOf - > {1}",
    "busybox": "busybox cp -L {0} {1}",
    "tail": "tail -c +1 {0} > {1}",
    "python": "python3 -c 'import shutil, sys; shutil.copyfile(*sys.argv[1:])' {0} {1}",
}


@pytest.mark.parametrize("tool", COPIES)
def test_every_byte_and_no_more_right_after_a_stat(weights, tool, tmp_path):
    needs([tool] if tool in ("rsync", "busybox") else [])
    run_id = weights.run.removeprefix("runs/")
    for name in ("archive.tar", "tensors.json"):
        fresh = f"{tool}-{name}"
        weights.server.account.add_checkpoint(run_id, f"sampler_weights/{fresh}")
        weights.refresh()
        place = place_of(weights, fresh)
        copy = tmp_path / name
        command = COPIES[tool].format(
            f"{weights.run}/checkpoints/sampler_weights/{fresh}/{name}", copy
        )
        done = weights.sh(f"stat -L {place}/{name} > /dev/null && {command}")
        assert (done.returncode, done.stderr) == (0, "")
        if name == "archive.tar":
            assert copy.read_bytes() == archive_of(weights, fresh)
        else:
            assert json.loads(copy.read_text())["tensors"]
        assert (place / name).stat().st_size == copy.stat().st_size
        assert (place / name).read_bytes() == copy.read_bytes()


def test_one_tensor_fetches_what_it_touches(make_account):
    account = make_account(runs=1, checkpoints=1)
    run = account.new_run()
    run_id = run.removeprefix("runs/")
    account.server.account.add_checkpoint(run_id, "sampler_weights/big", size_bytes=20 * BIG_BYTES)
    account.refresh()
    file = account.path(f"{run}/checkpoints/sampler_weights/big/files/adapter_model.safetensors")
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        first, last = sorted(value["data_offsets"] for value in header.values())[len(header) // 2]
        opened.seek(8 + length + first)
        tensor = opened.read(last - first)
    assert len(tensor) == last - first
    sent = sum(entry.sent_bytes for entry in account.server.journal.entries("GET store/archive"))
    # Blocks of 4 MiB: one with the header, one that the tensor begins in and one that it ends in;
    # the kernel reads ahead into another.
    assert sent <= len(tensor) + (17 << 20) < 1.6 * len(tensor)
    account.server.journal.clear()
    with open(file, "rb") as opened:
        opened.seek(8 + length + first)
        assert opened.read(last - first) == tensor
    assert account.server.journal.count("GET store/archive") == 0
    assert api_calls(account.server) == {}


LOAD = """
import sys, safetensors
with safetensors.safe_open(sys.argv[1], framework="np") as opened:
    for name in opened.keys():
        print(name, opened.get_tensor(name).nbytes)
"""


def test_safetensors_loads_from_the_mount(weights):
    place = place_of(weights, "small")
    # A process of its own: it holds Python's lock while it opens, and the server is in this one.
    done = run(sys.executable, "-c", LOAD, place / "files/adapter_model.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    loaded = dict(line.split() for line in done.stdout.splitlines())
    told = json.loads((place / "tensors.json").read_text())["tensors"]
    assert loaded
    assert loaded == {name: str(value["bytes"]) for name, value in told.items()}


def test_the_kernel_asks_for_1_mib_at_a_time(weights, needs_root):
    device = os.stat(weights.root).st_dev
    bdi = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with open(bdi) as file:
        assert file.read() == "1024\n"


def test_a_mapping_reads_the_same(weights):
    file = place_of(weights, "big") / "files/adapter_model.safetensors"
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(mapped) == file.stat().st_size
        assert hashlib.sha256(mapped).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_what_vllm_s_resolver_does(weights):
    """Its steps: a folder by name, adapter_config.json in it, the base model, then the files."""
    run_id = weights.run.removeprefix("runs/")
    folder = weights.path(f"adapters/{run_id}@sampler_weights@small")
    assert os.path.exists(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"]
    assert (folder / "adapter_model.safetensors").stat().st_size > 0


def test_a_copy_of_files_and_the_archive_hold_the_same(weights, tmp_path):
    place = place_of(weights, "big")
    shutil.copytree(place / "files", tmp_path / "files")
    done = weights.sh(
        f"tar tf {place}/archive.tar && mkdir {tmp_path}/x"
        f" && tar xf {place}/archive.tar -C {tmp_path}/x && diff -r {tmp_path}/files {tmp_path}/x"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(os.listdir(tmp_path / "files"))


def test_df_shows_the_block_cache_and_an_attribute_what_is_kept_of_a_file(make_account):
    settings = {"xattr": True, "cache_size_bytes": 1 << 30}
    account = make_account(runs=1, checkpoints=1, settings=settings)
    run = account.new_run("sampler_weights/1")
    file = account.path(f"{run}/checkpoints/sampler_weights/1/files/adapter_model.safetensors")
    before = os.statvfs(account.root)
    assert before.f_blocks * before.f_frsize == 1 << 30
    kept = "user.tinkerfs.cached_bytes"
    size = len(file.read_bytes())
    assert account.eventually(lambda: os.getxattr(file, kept) == str(size).encode())

    def has_grown():
        after = os.statvfs(account.root)
        return (before.f_bfree - after.f_bfree) * after.f_frsize >= size

    assert account.eventually(has_grown, 20), "the sum is at most 5 s old"


def test_a_checkpoint_that_was_deleted_reads_no_other_bytes(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/gone", size_bytes=BIG_BYTES)
    weights.refresh()
    file = place_of(weights, "gone") / "files/adapter_model.safetensors"
    with open(file, "rb", buffering=0) as opened:
        assert len(opened.read(8)) == 8
        weights.server.account.delete_checkpoint(run_id, "sampler_weights/gone")
        with pytest.raises(OSError, match="Stale file handle"):
            opened.readall()
