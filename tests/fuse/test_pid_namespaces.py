"""Callers from another PID namespace, of which the kernel reports only the user."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.account import Account, deletes, needs
from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT, force_unmount

OWNER_UID = 65534
OWNER = f"setpriv --reuid={OWNER_UID} --regid={OWNER_UID} --clear-groups"


@pytest.fixture
def account(tmp_path, needs_root):
    """Return an account with a mount in a separate PID namespace, as in a container."""
    needs(["unshare", "setpriv"])
    mountpoint, cache_dir = tmp_path / "mnt", tmp_path / "cache"
    mountpoint.mkdir()
    cache_dir.mkdir(mode=0o700)
    with FaultyServer(runs=1, checkpoints=2) as server, (tmp_path / "log").open("w") as log:
        values = {"base_url": server.base_url, "cache_dir": str(cache_dir)}
        values |= {"allow_other": True, "uid": OWNER_UID}
        served = ("-m", "tests.support.account", str(mountpoint), json.dumps(values))
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, *served],
            cwd=ROOT,
            env=os.environ | {"HOME": str(tmp_path), **server.environment},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout.readline() == "ready\n", (tmp_path / "log").read_text()
            yield Account(server, mountpoint)
        finally:
            force_unmount(str(mountpoint))
            process.wait(20)
            process.stdout.close()


def test_refusals_of_other_pid_namespace_are_per_user(account, tmp_path):
    run = account.new_run(*(f"weights/{number}" for number in range(1, 5)))
    weights = f"{run}/checkpoints/weights"
    assert account.sh(f"rm -r {weights}/1").returncode == 0
    assert "[0] uid 0\t" in account.changes(), "the kernel reports no process"
    # A move is rejected, and so is every removal by its user, but not by the owner.
    assert account.sh(f"mv {weights}/2 {tmp_path}/").returncode == 1
    assert "tinkerfs get PATH DEST" in account.errors()
    assert "Operation not permitted" in account.sh(f"rm -r {weights}/3").stderr
    assert account.sh(f"{OWNER} rm -r {weights}/4").stderr == ""
    assert account.checkpoint_ids(run) == {"weights/2", "weights/3"}
    assert deletes(account.server) == 2
