"""Cache directories that are shared, read-only or without locks, under one binding."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mount import ROOT, force_unmount, run, tinkerfs
from tinkerfs.cache import block_cache as blocks_module
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.telemetry import Telemetry

BLOCK = bytes(64 << 10)
LIMIT_BYTES = 10 * (len(BLOCK) + 4096)


@pytest.fixture
def binding():
    return "mfusepy3"


def first_member(mountpoint):
    return next(mountpoint.glob("runs/*/checkpoints/weights/*/files")) / "adapter_model.safetensors"


@pytest.mark.parametrize("mode", [0o777, 0o2775])
def test_cache_in_shared_volume_is_a_private_subdirectory(mode, mountpoint, env, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(mode)
    done = tinkerfs("mount", f"--cache-dir={volume}", mountpoint, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert first_member(mountpoint).read_bytes()
    directory = volume / f"tinkerfs-{os.getuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) & 0o777 == 0o700
    assert list(directory.glob("blocks/*/0"))
    assert os.listdir(volume) == [directory.name]
    info = tinkerfs("cache", "info", "--json", f"--cache-dir={volume}", env=env)
    assert json.loads(info.stdout)["cache_dir"] == str(directory)
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0


def test_mount_without_cache_directory_starts(mountpoint, env, needs_root):
    home = env["HOME"]
    member = "$(echo */checkpoints/weights/*/files | cut -d' ' -f1)/adapter_model.safetensors"
    script = f"""
        set -e
        mount --bind {home} {home}; mount -o remount,bind,ro {home}
        mount -t tmpfs -o ro none /var/tmp
        tinkerfs() {{ {sys.executable} -m tinkerfs "$@"; }}
        tinkerfs mount {mountpoint}
        (cd {mountpoint}/runs; sha256sum < {member})
        cat {mountpoint}/.tinkerfs/errors >&2
        tinkerfs status --json {mountpoint} | grep cache_dir
        tinkerfs prefetch {mountpoint}/runs && exit 9
        tinkerfs get $(echo {mountpoint}/runs/*/checkpoints/weights/0001 | cut -d' ' -f1) /mnt/copy
        tinkerfs umount {mountpoint}
    """
    script = script.replace("/mnt/copy", f"{mountpoint}-copy")
    done = run("unshare", "-m", "bash", "-c", script, env=env)
    assert done.returncode == 0, done
    lines = [line for line in done.stderr.splitlines() if "caching only in memory" in line]
    assert len(lines) == 1, done.stderr
    assert "Read-only file system" in lines[0]
    assert "ENOTDIR" not in done.stderr
    assert '"cache_dir": null' in done.stdout
    assert (Path(f"{mountpoint}-copy") / "adapter_model.safetensors").exists()


@pytest.fixture
def loopback(tmp_path, request):
    """Return a directory on a file system with missing or leaking locks."""
    (tmp_path / "below").mkdir()
    mountpoint = tmp_path / "loop"
    mountpoint.mkdir()
    places = (tmp_path / "below", mountpoint)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.loopback", *places, request.param],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        os.listdir(mountpoint)
        yield mountpoint
        force_unmount(str(mountpoint))
        process.kill()  # a failed test may keep a file open, and so the mount busy


@pytest.mark.parametrize(
    ("loopback", "seems_lockable"), [("none", False), ("none", True), ("leak", False)],
    indirect=["loopback"],
)  # fmt: skip
def test_cache_without_locks_stays_within_max_size(loopback, seems_lockable, monkeypatch):
    if seems_lockable:  # like NFS without a lock daemon
        monkeypatch.setattr(blocks_module, "can_lock_files", lambda _: True)
    telemetry = Telemetry()
    bounds = {"max_bytes": LIMIT_BYTES, "min_free_bytes": 0}
    cache = BlockCache(loopback / "blocks", telemetry, **bounds)
    opened = [cache.open(name, name) for name in ("first", "second", "third")]
    for file in opened:  # all files stay open
        file.ensure_directory()
        for index in range(8):
            with file.lock_units(range(index, index + 1), timeout_s=5) as is_free:
                assert is_free
            assert file.put(index, BLOCK)
        assert file.read(7, 0, len(BLOCK), len(BLOCK)) == BLOCK
        assert cache.usage_bytes() <= LIMIT_BYTES
    for file in opened:
        file.close()
    messages = telemetry.errors.text().decode()
    assert "disk is full" not in messages
    assert messages.count("\n") == (1 if seems_lockable else 0), messages
    assert ("files cannot be locked there (No locks available)" in messages) == seems_lockable
