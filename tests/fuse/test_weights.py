"""Weights on real mounts: what the kernel makes of sizes, pages and mappings; loaders."""

import contextlib
import gzip
import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tests.support.mount import run
from tests.support.readers import Reader
from tinkerfs.demo.content import Data

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


#: A copy of $1 to $2 by each tool.
COPIES = {
    "cp": 'cp "$1" "$2"',
    "cat": 'cat "$1" > "$2"',
    "dd": 'dd if="$1" of="$2" bs=64k status=none',
    "rsync": 'rsync -L "$1" "$2"',
    "tar": 'tar chf - -C "${1%/*}" "${1##*/}" | tar xOf - > "$2"',
    "busybox": 'busybox cp -L "$1" "$2"',
    "gio": 'gio copy "$1" "$2"',
    "tail": 'tail -c +1 "$1" > "$2"',
    "python": 'python3 -c \'import shutil, sys; shutil.copyfile(*sys.argv[1:])\' "$1" "$2"',
    "sha256sum": 'sha256sum < "$1" > "$2"',
}
TIMES = 20


@pytest.mark.parametrize("tool", COPIES)
def test_every_byte_and_no_more_right_after_a_stat(weights, tool, tmp_path):
    """Checkpoints that nobody opened before, all at once: what must be right is the first open."""
    needs([tool] if tool in ("rsync", "busybox", "gio") else [])
    run_id = weights.run.removeprefix("runs/")
    fresh = [f"{tool}-{number}" for number in range(TIMES)]
    for name in fresh:
        weights.server.account.add_checkpoint(run_id, f"sampler_weights/{name}")
    weights.refresh()
    script = f"""
copy() {{ stat -L "$1" > /dev/null && {COPIES[tool]}; }}
for name in {" ".join(fresh)}; do
    for file in archive.tar tensors.json; do
        (copy {weights.run}/checkpoints/sampler_weights/$name/$file {tmp_path}/$name-$file ||
            echo $name/$file failed >&2) &
    done
done
wait"""
    done = weights.sh(script)
    assert (done.returncode, done.stderr) == (0, "")
    for name in fresh:
        true = {"archive.tar": archive_of(weights, name)}
        true["tensors.json"] = (place_of(weights, name) / "tensors.json").read_bytes()
        assert json.loads(true["tensors.json"])["tensors"]
        for file, data in true.items():
            expected = f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
            copied = (tmp_path / f"{name}-{file}").read_bytes()
            assert copied == (expected if tool == "sha256sum" else data)
            assert (place_of(weights, name) / file).stat().st_size == len(data)
    # Each of the next tools lists the run again.
    for name in fresh:
        weights.server.account.delete_checkpoint(run_id, f"sampler_weights/{name}")


def test_a_size_told_to_others_during_an_open_is_no_bound_after_it(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/shared")
    weights.refresh()
    weights.server.faults.add("GET archive", latency_s=2.5)
    file = place_of(weights, "shared") / "archive.tar"
    opened = threading.Event()

    def look():
        while not opened.wait(0.2):
            file.stat()

    looker = threading.Thread(target=look)
    looker.start()
    try:
        with file.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
    finally:
        opened.set()
        looker.join()
    assert size_bytes == len(archive_of(weights, "shared"))


def test_archive_right_after_a_stat_is_mapped_soon(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/mapped")
    weights.refresh()
    file = place_of(weights, "mapped") / "archive.tar"
    expected = archive_of(weights, "mapped")
    file.stat()
    began = time.monotonic()
    # In a process of its own: the server, which this one is, has to send the pages.
    while not Reader("mmap", file).ends_with(expected):  # ENODEV
        assert time.monotonic() - began < 8, "the kernel knew the size after 3 s"


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


def test_what_people_do_with_files_and_the_archive(weights, tmp_path):
    """cp -r, rsync, sha256sum, tar t and x give what the server has."""
    run_id = weights.run.removeprefix("runs/")
    place = place_of(weights, "big")
    true = {
        name: content.read(0, content.size_bytes)
        for name, content in weights.server.files(run_id, "sampler_weights/big").items()
    }
    for command in (
        f"cp -r {place}/files/ {tmp_path}/cp",
        f"rsync -a {place}/files/ {tmp_path}/rsync/",
        f"mkdir {tmp_path}/tar && tar xf {place}/archive.tar -C {tmp_path}/tar",
    ):
        assert weights.sh(command).stderr == ""
    for copy in ("cp", "rsync", "tar"):
        found = {path.name: path.read_bytes() for path in (tmp_path / copy).iterdir()}
        assert found == true
    told = weights.sh(f"cd {place}/files/ && sha256sum *").stdout
    assert dict(line.split()[::-1] for line in told.splitlines()) == {
        name: hashlib.sha256(data).hexdigest() for name, data in true.items()
    }
    listed = [
        line.split() for line in weights.sh(f"tar tvf {place}/archive.tar").stdout.splitlines()
    ]
    assert {words[-1]: int(words[2]) for words in listed} == {
        name: len(data) for name, data in true.items()
    }


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


def test_an_archive_that_changed_is_stale_where_it_is_open_and_new_elsewhere(weights):
    run_id = weights.run.removeprefix("runs/")
    checkpoint = weights.server.account.add_checkpoint(
        run_id, "sampler_weights/changing", size_bytes=BIG_BYTES
    )
    weights.refresh()
    file = place_of(weights, "changing") / "files/adapter_model.safetensors"

    def truth():
        content = weights.server.files(run_id, "sampler_weights/changing")[file.name]
        return content.read(0, content.size_bytes)

    old = truth()
    with open(file, "rb", buffering=0) as opened:
        assert opened.read(8) == old[:8]
        checkpoint.generation += 1
        weights.server.signer.revoke_all()
        new = truth()
        assert new[:-4096] != old[:-4096]
        with pytest.raises(OSError, match="Stale file handle"):
            os.pread(opened.fileno(), 4096, len(old) - 4096)
        for _ in range(2):
            assert file.read_bytes() == new
            with pytest.raises(OSError, match="Stale file handle"):
                os.pread(opened.fileno(), 4096, len(old) // 2)
    assert file.read_bytes() == new
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == new


@pytest.mark.parametrize("kind", ["cut", "no tar", "a bomb of headers"])
def test_a_damaged_archive_is_an_error_that_is_told_and_harms_nobody(weights, kind):
    run_id = weights.run.removeprefix("runs/")
    name = kind.replace(" ", "-")
    checkpoint = weights.server.account.add_checkpoint(run_id, f"sampler_weights/{name}")
    true = archive_of(weights, name)
    chain = tarfile.TarInfo("x")
    chain.type = tarfile.XHDTYPE
    damaged = {
        "cut": true[: len(true) // 2],
        "no tar": b"<html>no</html>" * 1000,
        "a bomb of headers": gzip.compress(chain.tobuf(tarfile.GNU_FORMAT) * 1_000_000),
    }
    checkpoint.archive = Data(damaged[kind])
    weights.refresh()
    files = place_of(weights, name) / "files"
    before = resident_kib(weights)
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(f"{files}/")
    with pytest.raises(OSError, match=r"Input/output error|No such file"):
        (files / "adapter_model.safetensors").read_bytes()
    assert any("EIO" in line and name in line for line in weights.errors().splitlines())
    assert resident_kib(weights) - before < 256 << 10
    assert os.listdir(place_of(weights, "small") / "files")


def resident_kib(weights):
    """What the mount's process takes."""
    wanted = {b"tests.support.account", os.fsencode(weights.root)}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((folder / "cmdline").read_bytes().split(b"\0")):
                lines = (folder / "status").read_text().splitlines()
                return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
    raise LookupError(weights.root)
