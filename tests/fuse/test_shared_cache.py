"""Mounts of many hosts over one cache directory, which is on a network file system.

Each host has a client of its own: a FUSE mount with the type of a network file system. The kernel
caches its names and attributes, root's files belong to another user, and it may hang.
"""

import hashlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.account import mounted
from tests.support.limited_fs import limited_client
from tests.support.mount import tinkerfs

SIZE_BYTES = 12 << 20
CLIENT = {"subtype": "juicefs", "uid": 12345, "is_stale": True}


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def exported(tmp_path):
    """Return the directory that the clients mount."""
    directory = tmp_path / "exported"
    directory.mkdir()
    return directory


def member(root):
    [path] = root.glob("runs/*/checkpoints/weights/*/files/adapter_model.safetensors")
    return path


def digest(root):
    return hashlib.sha256(member(root).read_bytes()).hexdigest()


def truth(server):
    [run] = server.account.runs()
    content = server.files(run.id, run.checkpoints[0].id)["adapter_model.safetensors"]
    return hashlib.sha256(content.read(0, content.size_bytes)).hexdigest()


def stats(root):
    return json.loads((root / ".tinkerfs/stats.json").read_text())


def test_mounts_share_a_network_file_system(demo_server, exported, tmp_path, binding):
    server = demo_server(runs=1, checkpoints=1, size_bytes=SIZE_BYTES)
    with ExitStack() as stack:
        roots = []
        for number in range(3):
            home = tmp_path / f"host{number}"
            home.mkdir()
            client, _process = stack.enter_context(limited_client(home, CLIENT, exported))
            cache = {"cache_dir": str(client / "cache")}
            roots.append(stack.enter_context(mounted(server, home / "tinker", binding, **cache)))
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(digest, roots)) == [truth(server)] * 3
        server.journal.clear()
        assert [digest(root) for root in roots] == [truth(server)] * 3
        assert not server.journal.entries("GET store"), "all of it is in the common directory"
        [own] = [path for path in exported.glob("cache/*") if path.is_dir()]
        assert own.name == f"tinkerfs-{os.getuid()}"
        assert list(own.glob("shared/*/16-32"))
        for number, root in enumerate(roots):
            values = stats(root)
            assert values["is_cache_shared"]
            assert values["metadata_dir"].startswith(f"{tmp_path}/host{number}/")
            assert (root / ".tinkerfs/errors").read_bytes() == b""
        assert not list(exported.rglob("*sqlite*"))


def test_mount_reads_from_the_store_while_its_client_hangs(
    demo_server, exported, tmp_path, binding, env
):
    server = demo_server(runs=1, checkpoints=1, size_bytes=SIZE_BYTES)
    with ExitStack() as stack:
        client, process = stack.enter_context(limited_client(tmp_path, CLIENT, exported))
        cache = {"cache_dir": str(client / "cache"), "timeout_s": 2.0}
        root = stack.enter_context(mounted(server, tmp_path / "tinker", binding, **cache))
        with member(root).open("rb") as file:
            file.read(1)
        process.send_signal(signal.SIGSTOP)
        try:
            assert digest(root) == truth(server)
            assert os.statvfs(root).f_bavail == 0
            last = (root / ".tinkerfs/errors").read_text().splitlines()[-1]
            assert "no response within 2 s; weights are read from the store" in last
            assert stats(root)["gauges"]["shared_cache_hangs"] == 1
            done = tinkerfs("status", root, env=env)
            assert (
                f"cached in {client}/cache/tinkerfs-{os.getuid()} (does not respond)" in done.stdout
            )
            done = tinkerfs("doctor", f"--cache-dir={client}/cache", "--timeout=2", env=env)
            assert f"the cache directory {client}/cache does not respond" in done.stdout
            assert tinkerfs("umount", root, env=env).returncode == 0
        finally:
            process.send_signal(signal.SIGCONT)
