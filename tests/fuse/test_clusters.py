"""Recipes of docs/clusters.md that need neither a cluster nor a container runtime."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.mount import ROOT, force_unmount, run, wait_until
from tests.support.passed_fd import UID, in_pod
from tinkerfs.fuse import mount_table

DEPLOY = ROOT / "docs/deploy"


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def directory(tmp_path):
    """Return a directory with a program `tinkerfs`, which every user can access."""
    path = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    path.chmod(0o755)
    (path / "bin").mkdir()
    program = path / "bin/tinkerfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tinkerfs "$@"\n')
    program.chmod(0o755)
    yield path
    force_unmount(str(path / "tinker/mnt"))
    shutil.rmtree(path)


@pytest.fixture
def node_env(server, directory):
    return {
        **server.environment,
        "PATH": f"{directory}/bin:{os.environ['PATH']}",
        "HOME": str(directory),
        "PYTHONPATH": f"{ROOT}:{DEPLOY}",
        "TINKERFS_CACHE_DIR": str(directory / "cache"),
    }


def start_workers(count, directory, env):
    """Start processes that run the hook of a Ray worker and then list the account."""
    code = f"""
import os, ray_mount
ray_mount.DIRECTORY, ray_mount.MOUNTPOINT = "{directory}/tinker", "{directory}/tinker/mnt"
ray_mount.mount()
print(len(os.listdir(ray_mount.MOUNTPOINT + "/runs")))
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return [subprocess.Popen(command, env=env, cwd="/", stdout=pipe) for _ in range(count)]


def test_ray_workers_share_one_mount_per_node(directory, node_env):
    mountpoint = directory / "tinker/mnt"
    outputs = [each.communicate(timeout=60)[0] for each in start_workers(4, directory, node_env)]
    assert outputs == [b"10\n"] * 4
    mount = mount_table.find_mount(str(mountpoint))
    [daemon] = mount_table.find_daemon_pids(mount)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(daemon), 20)
    [worker] = start_workers(1, directory, node_env)
    assert worker.communicate(timeout=60)[0] == b"10\n"
    assert mount_table.find_mount(str(mountpoint)) is not None


def test_recipe_without_fuse_needs_no_privileges(directory, node_env, server, needs_root):
    for name in ("cache", "copy"):
        (directory / name).mkdir()
        os.chown(directory / name, UID, UID)
    del node_env["HOME"]
    recipe = (sys.executable, DEPLOY / "without_fuse.py", directory / "copy/first")
    done = run(*in_pod(directory, *recipe), env=node_env, cwd="/")
    assert done.returncode == 0, done
    first = min(f"{each.id}/{c.id}" for each in server.account.runs() for c in each.checkpoints)
    assert f"the first is tinker://{first}\n" in done.stdout
    files = (directory / "copy/first").glob("[!.]*")
    copied = {path.name: path.stat().st_size for path in files}
    assert copied["adapter_model.safetensors"] > 1000
    for name, size in copied.items():
        assert f"{name} {min(16, size)}\n" in done.stdout


@pytest.mark.parametrize("script", sorted((DEPLOY / "slurm").iterdir()), ids=lambda path: path.name)
def test_slurm_scripts_are_valid_shell(script):
    assert os.access(script, os.X_OK)
    assert run("sh", "-n", script).stderr == ""
