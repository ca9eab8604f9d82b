"""Weights on real mounts: sizes, page cache, mappings and loaders."""

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

from tests.support.account import account, api_calls, every_binding, make_account, needs
from tests.support.mount import run
from tests.support.readers import Reader
from tinkerfs.demo.content import Data

__all__ = ["account", "make_account"]

BIG_BYTES = 40 << 20


@pytest.fixture(scope="module")
def weights(make_account):
    """Return an account; its newest run has a sampler checkpoint of 40 MB."""
    account = make_account(runs=1, checkpoints=1, settings={"archive_build_limit": 0})
    account.run = account.new_run("sampler_weights/small")
    run_id = account.run.removeprefix("runs/")
    account.server.account.add_checkpoint(run_id, "sampler_weights/big", size_bytes=BIG_BYTES)
    account.refresh()
    return account


def checkpoint_of(weights, name):
    return weights.path(f"{weights.run}/checkpoints/sampler_weights/{name}")


def archive_of(weights, name):
    run_id = weights.run.removeprefix("runs/")
    archive = weights.server.archive(run_id, f"sampler_weights/{name}")
    return archive.read(0, archive.size_bytes)


#: Scripts that copy $1 to $2 with each tool.
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
def test_copy_right_after_stat_has_exact_size(weights, tool, tmp_path):
    """Copy several checkpoints that have not been opened before, concurrently."""
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
        contents = {"archive.tar": archive_of(weights, name)}
        contents["tensors.json"] = (checkpoint_of(weights, name) / "tensors.json").read_bytes()
        assert json.loads(contents["tensors.json"])["tensors"]
        for file, data in contents.items():
            expected = f"{hashlib.sha256(data).hexdigest()}  -\n".encode()
            copied = (tmp_path / f"{name}-{file}").read_bytes()
            assert copied == (expected if tool == "sha256sum" else data)
            assert (checkpoint_of(weights, name) / file).stat().st_size == len(data)
    # The next tool lists the run again.
    for name in fresh:
        weights.server.account.delete_checkpoint(run_id, f"sampler_weights/{name}")


@every_binding
def test_concurrent_stats_during_open_leave_no_size_bound(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/shared")
    weights.refresh()
    weights.server.faults.add("GET archive", latency_s=2.5)
    file = checkpoint_of(weights, "shared") / "archive.tar"
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


@every_binding
def test_archive_is_mappable_soon_after_stat(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/mapped")
    weights.refresh()
    file = checkpoint_of(weights, "mapped") / "archive.tar"
    expected = archive_of(weights, "mapped")
    file.stat()
    began = time.monotonic()
    # In a separate process, because the server runs in this one and has to send the pages.
    while not Reader("mmap", file).ends_with(expected):  # ENODEV
        assert time.monotonic() - began < 8, (
            "mmap fails until the kernel knows the size, which takes 3 s"
        )


def test_reading_one_tensor_downloads_only_its_blocks(make_account):
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
    # Blocks of 4 MiB: the header, the start and the end of the tensor, and the readahead of the
    # kernel.
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
    checkpoint = checkpoint_of(weights, "small")
    # In a separate process, because it holds the GIL while it opens, and the server runs here.
    done = run(sys.executable, "-c", LOAD, checkpoint / "files/adapter_model.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    loaded = dict(line.split() for line in done.stdout.splitlines())
    output = json.loads((checkpoint / "tensors.json").read_text())["tensors"]
    assert loaded
    assert loaded == {name: str(value["bytes"]) for name, value in output.items()}


@every_binding
def test_kernel_readahead_is_1_mib(weights, needs_root):
    device = os.stat(weights.root).st_dev
    bdi = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with open(bdi) as file:
        assert file.read() == "1024\n"


@every_binding
def test_mapping_returns_the_same_bytes(weights):
    file = checkpoint_of(weights, "big") / "files/adapter_model.safetensors"
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(mapped) == file.stat().st_size
        assert hashlib.sha256(mapped).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_steps_of_vllm_resolver_succeed(weights):
    """Find the directory by name, then read adapter_config.json, the base model and the files."""
    run_id = weights.run.removeprefix("runs/")
    directory = weights.path(f"adapters/{run_id}@sampler_weights@small")
    assert os.path.exists(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"]
    assert (directory / "adapter_model.safetensors").stat().st_size > 0


def test_copies_of_files_and_of_archive_are_equal(weights, tmp_path):
    checkpoint = checkpoint_of(weights, "big")
    shutil.copytree(checkpoint / "files", tmp_path / "files")
    done = weights.sh(
        f"tar tf {checkpoint}/archive.tar && mkdir {tmp_path}/x"
        f" && tar xf {checkpoint}/archive.tar -C {tmp_path}/x"
        f" && diff -r {tmp_path}/files {tmp_path}/x"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(os.listdir(tmp_path / "files"))


def test_copy_and_tar_tools_return_what_the_server_has(weights, tmp_path):
    """Compare cp -r, rsync, sha256sum and tar with the files of the server."""
    run_id = weights.run.removeprefix("runs/")
    checkpoint = checkpoint_of(weights, "big")
    contents = {
        name: content.read(0, content.size_bytes)
        for name, content in weights.server.files(run_id, "sampler_weights/big").items()
    }
    for command in (
        f"cp -r {checkpoint}/files/ {tmp_path}/cp",
        f"rsync -a {checkpoint}/files/ {tmp_path}/rsync/",
        f"mkdir {tmp_path}/tar && tar xf {checkpoint}/archive.tar -C {tmp_path}/tar",
    ):
        assert weights.sh(command).stderr == ""
    for copy in ("cp", "rsync", "tar"):
        found = {path.name: path.read_bytes() for path in (tmp_path / copy).iterdir()}
        assert found == contents
    output = weights.sh(f"cd {checkpoint}/files/ && sha256sum *").stdout
    assert dict(line.split()[::-1] for line in output.splitlines()) == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents.items()
    }
    listed = [
        line.split() for line in weights.sh(f"tar tvf {checkpoint}/archive.tar").stdout.splitlines()
    ]
    assert {words[-1]: int(words[2]) for words in listed} == {
        name: len(data) for name, data in contents.items()
    }


def test_df_and_xattr_show_cached_bytes(make_account):
    settings = {"xattr": True, "cache_size_bytes": 1 << 30}
    account = make_account(runs=1, checkpoints=1, settings=settings)
    run = account.new_run("sampler_weights/1")
    file = account.path(f"{run}/checkpoints/sampler_weights/1/files/adapter_model.safetensors")
    before = os.statvfs(account.root)
    assert before.f_blocks * before.f_frsize == 1 << 30
    attribute = "user.tinkerfs.cached_bytes"
    size = len(file.read_bytes())
    assert account.eventually(lambda: os.getxattr(file, attribute) == str(size).encode())

    def has_grown():
        after = os.statvfs(account.root)
        return (before.f_bfree - after.f_bfree) * after.f_frsize >= size

    assert account.eventually(has_grown, 20), "the sum is updated every 5 s"


def test_deleted_checkpoint_returns_no_other_bytes(weights):
    run_id = weights.run.removeprefix("runs/")
    weights.server.account.add_checkpoint(run_id, "sampler_weights/gone", size_bytes=BIG_BYTES)
    weights.refresh()
    file = checkpoint_of(weights, "gone") / "files/adapter_model.safetensors"
    with open(file, "rb", buffering=0) as opened:
        assert len(opened.read(8)) == 8
        weights.server.account.delete_checkpoint(run_id, "sampler_weights/gone")
        with pytest.raises(OSError, match="Stale file handle"):
            opened.readall()


@every_binding
def test_changed_archive_is_stale_for_open_files_only(weights):
    run_id = weights.run.removeprefix("runs/")
    checkpoint = weights.server.account.add_checkpoint(
        run_id, "sampler_weights/changing", size_bytes=BIG_BYTES
    )
    weights.refresh()
    file = checkpoint_of(weights, "changing") / "files/adapter_model.safetensors"

    def read_expected():
        content = weights.server.files(run_id, "sampler_weights/changing")[file.name]
        return content.read(0, content.size_bytes)

    old = read_expected()
    with open(file, "rb", buffering=0) as opened:
        assert opened.read(8) == old[:8]
        checkpoint.generation += 1
        weights.server.signer.revoke_all()
        new = read_expected()
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
def test_damaged_archive_raises_error_and_affects_no_other(weights, kind):
    run_id = weights.run.removeprefix("runs/")
    name = kind.replace(" ", "-")
    checkpoint = weights.server.account.add_checkpoint(run_id, f"sampler_weights/{name}")
    contents = archive_of(weights, name)
    chain = tarfile.TarInfo("x")
    chain.type = tarfile.XHDTYPE
    damaged = {
        "cut": contents[: len(contents) // 2],
        "no tar": b"<html>no</html>" * 1000,
        "a bomb of headers": gzip.compress(chain.tobuf(tarfile.GNU_FORMAT) * 1_000_000),
    }
    checkpoint.archive = Data(damaged[kind])
    weights.refresh()
    files = checkpoint_of(weights, name) / "files"
    before = resident_kib(weights)
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(f"{files}/")
    with pytest.raises(OSError, match=r"Input/output error|No such file"):
        (files / "adapter_model.safetensors").read_bytes()
    assert any("EIO" in line and name in line for line in weights.errors().splitlines())
    assert resident_kib(weights) - before < 256 << 10
    assert os.listdir(checkpoint_of(weights, "small") / "files")


def resident_kib(weights):
    """Return the resident memory of the mount's process, KiB."""
    wanted = {b"tests.support.account", os.fsencode(weights.root)}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((directory / "cmdline").read_bytes().split(b"\0")):
                lines = (directory / "status").read_text().splitlines()
                return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
    raise LookupError(weights.root)
