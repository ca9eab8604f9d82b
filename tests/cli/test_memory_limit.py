"""A mount in a cgroup with a limit reads files that are larger than the limit."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT, force_unmount, run, tinkerfs, wait_until

LIMIT_BYTES = 192 << 20
SIZE_BYTES = 256 << 20


@pytest.fixture
def server():
    """A server with one checkpoint, which is larger than the limit."""
    with FaultyServer(runs=1, checkpoints=1, size_bytes=SIZE_BYTES) as running:
        yield running


@pytest.fixture
def cgroup():
    """Return a new cgroup of version 1 or 2 with the limit, and remove it after the test."""
    directory = make_cgroup()
    if directory is None:
        # Not everywhere may root make one, as in many containers; but CI must run the test.
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no cgroup with a memory limit can be made")
    yield directory
    wait_until(lambda: not (directory / "cgroup.procs").read_text(), 20)
    directory.rmdir()


def make_cgroup():
    for parent, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        directory = Path(parent) / f"tinkerfs-test-{os.getpid()}"
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            (directory / name).write_text(str(LIMIT_BYTES))
        except OSError:
            directory.rmdir()
        else:
            return directory
    return None


def kills(cgroup):
    """Return the number of processes that the kernel killed in a cgroup."""
    files = [cgroup / "memory.events", cgroup / "memory.oom_control"]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@pytest.mark.parametrize("cache_size", ["10G", "0"], ids=["disk-cache", "memory-only"])
def test_read_beyond_memory_limit_is_not_killed(cache_size, cgroup, server, tmp_path):
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    env = {**server.environment, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = (sys.executable, "-m", "tinkerfs", "mount", "--cache-size", cache_size, mountpoint)
    join = f'echo $$ >{cgroup}/cgroup.procs; exec "$@"'
    try:
        done = run("sh", "-c", join, "sh", *command, env=env, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        [report] = json.loads(tinkerfs("status", mountpoint, "--json", env=env).stdout)
        assert report["weights_memory_bytes"] == LIMIT_BYTES // 4
        assert str(report["pid"]) in (cgroup / "cgroup.procs").read_text().split()
        [weights] = mountpoint.glob("runs/*/checkpoints/*/*/files/*.safetensors")
        read_bytes = 0
        with open(weights, "rb", buffering=0) as file:
            while data := file.read(1 << 20):
                read_bytes += len(data)
        assert read_bytes == weights.stat().st_size > LIMIT_BYTES
        shown = tinkerfs("status", mountpoint, env=env).stdout
        assert "memory   at most 48.0 MiB for weights" in shown
        assert kills(cgroup) == 0
    finally:
        force_unmount(str(mountpoint))
