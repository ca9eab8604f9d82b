"""The block cache of real mounts during reads: full, deleted, corrupt, shared, and killed."""

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest

from tests.support.account import account, make_account, mounted, new_run
from tests.support.mount import force_unmount, tinkerfs
from tests.support.readers import READERS, Reader, read_all
from tinkerfs.demo.profiles import PROFILES
from tinkerfs.fuse import mount_table

__all__ = ["account", "make_account"]

MIB = 1 << 20
NAME = "adapter_model.safetensors"
SIZE_BYTES = 25 * MIB
SLOW_BYTES_PER_S = 20 * MIB


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def weights(demo_server):
    """Return a server, the path of its largest file below a mount, and the file's bytes."""
    server = demo_server(runs=1, checkpoints=1)
    run_id = new_run(server)
    server.account.add_checkpoint(run_id, "sampler_weights/1", size_bytes=SIZE_BYTES)
    content = server.files(run_id, "sampler_weights/1")[NAME]
    path = f"runs/{run_id}/checkpoints/sampler_weights/1/files/{NAME}"
    return server, path, content.read(0, content.size_bytes)


def forget_pages(file):
    """Drop a file from the page cache, so that the kernel reads it from the mount again."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def blocks_in(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > MIB]


@contextmanager
def reading(file, expected):
    """Run concurrent readers of each kind during the block, and check that they get every byte."""
    readers = [Reader(how, file) for how in READERS]
    yield
    are_right = [reader.ends_with(expected) for reader in readers]
    assert all(are_right)


def test_full_disk_does_not_fail_reads(weights, binding, tmp_path, needs_root):
    server, path, expected = weights
    cache = tmp_path / "small"
    cache.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", cache], check=True)
    try:
        with mounted(server, tmp_path / "m", binding, cache_dir=str(cache)) as root:
            subprocess.run(["fallocate", "-l", "2m", cache / "filler"], check=False)
            subprocess.run(["cp", "/dev/zero", cache / "rest"], check=False)
            assert os.statvfs(cache).f_bavail == 0
            assert read_all(root / path, expected)
            assert "no room for a block" in (root / ".tinkerfs/errors").read_text()
    finally:
        subprocess.run(["umount", cache], check=True)


def test_cache_deleted_during_reads_is_recreated(weights, binding, tmp_path):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        cache = tmp_path / "m/cache"
        slow = server.faults.add("store", times=None, bytes_per_s=SLOW_BYTES_PER_S)
        with reading(root / path, expected):
            while not blocks_in(cache):
                time.sleep(0.01)
            shutil.rmtree(cache)
        slow.remove()
        assert os.listdir(root / "runs")
        forget_pages(root / path)
        assert read_all(root / path, expected)


def test_corrupt_blocks_are_downloaded_again(weights, binding, tmp_path):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
        for how in READERS:
            altered = blocks_in(tmp_path / "m/cache")
            assert altered
            for block in altered:
                with block.open("r+b") as opened:
                    for offset in range(MIB // 8, block.stat().st_size, MIB // 4):
                        opened.seek(offset)
                        byte = opened.read(1)
                        opened.seek(offset)
                        opened.write(bytes([byte[0] ^ 1]))
            server.journal.clear()
            forget_pages(root / path)
            assert Reader(how, root / path).ends_with(expected)
            assert server.journal.count("GET store/archive") > 0
        assert "was altered" in (root / ".tinkerfs/errors").read_text()


def test_blocks_replaced_by_fifos_are_downloaded_again(weights, binding, tmp_path):
    server, path, expected = weights
    with mounted(server, tmp_path / "m", binding) as root:
        assert (root / path).read_bytes() == expected
    for block in blocks_in(tmp_path / "m/cache"):
        block.unlink()
        os.mkfifo(block)
    with mounted(server, tmp_path / "m", binding) as root:
        assert read_all(root / path, expected)
        assert os.listdir(root / "runs")


def test_two_mounts_of_one_cache_download_each_byte_once(weights, binding, tmp_path):
    server, path, expected = weights
    shared = {"cache_dir": str(tmp_path / "one/cache")}
    with (
        mounted(server, tmp_path / "one", binding) as one,
        mounted(server, tmp_path / "two", binding, **shared) as two,
    ):
        server.faults.add("store", times=4, after=2, cut_after_bytes=MIB)
        with reading(one / path, expected), reading(two / path, expected):
            pass
        sent = sum(entry.sent_bytes for entry in server.journal.entries("GET store/archive"))
        # Interrupted downloads are resumed; index and padding are one more block.
        assert sent < 1.3 * SIZE_BYTES


@pytest.mark.parametrize("delay_s", [0.05, 0.2, 0.5, 0.9])
def test_killed_mount_leaves_no_wrong_byte(weights, env, mountpoint, delay_s):
    server, path, expected = weights
    server.faults.add("store", times=None, bytes_per_s=SLOW_BYTES_PER_S)
    done = tinkerfs("mount", mountpoint, env=env | server.environment)
    assert done.returncode == 0, done.stderr
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    readers = [Reader(how, mountpoint / path) for how in READERS]
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    for reader in readers:
        reader.ends_with(expected)
    server.faults.clear()
    force_unmount(str(mountpoint))
    done = tinkerfs("mount", mountpoint, env=env | server.environment)
    assert done.returncode == 0, done.stderr
    assert read_all(mountpoint / path, expected)
    assert tinkerfs("cache", "verify", env=env).returncode == 0
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0


def is_of_all(entry):
    """Return whether a request is for more than the first probe reads."""
    first, _, last = (entry.range or "bytes=0-0").removeprefix("bytes=").partition("-")
    return int(last) - int(first) > MIB


def test_bytes_corrupted_in_transit_fail_the_checksum(demo_server, binding, tmp_path):
    packed = dataclasses.replace(PROFILES["official"], archive_form="gzip")
    server = demo_server(runs=1, profile=packed)
    run_id = new_run(server)
    server.account.add_checkpoint(run_id, "sampler_weights/1", size_bytes=9 * MIB)
    content = server.files(run_id, "sampler_weights/1")[NAME]
    expected = content.read(0, content.size_bytes)
    with mounted(server, tmp_path / "m", binding) as root:
        altered = server.faults.add("store", flip_byte=5 * MIB, when=is_of_all)
        file = root / f"runs/{run_id}/checkpoints/sampler_weights/1/files/{NAME}"
        assert read_all(file, expected)
        assert altered.applied == 1
