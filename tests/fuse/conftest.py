"""Real mounts: every test here needs FUSE, and runs under each binding that it asks for."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.mount import BINDINGS, force_unmount, memory_mount, run
from tests.support.server import demo_server, server

__all__ = ["demo_server", "server"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(params=BINDINGS)
def binding(request):
    """Each combination of binding and libfuse."""
    return request.param


@pytest.fixture
def mountpoint(tmp_path):
    """An empty folder; nothing stays mounted on it."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    force_unmount(str(folder))


@pytest.fixture
def memory(mountpoint, binding):
    """The file system in memory, mounted under each binding."""
    with memory_mount(mountpoint, binding):
        yield mountpoint


@pytest.fixture
def env(tmp_path, server, binding):
    """The environment of a user whose account is the demo server's."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {
        **kept,
        **server.environment,
        "HOME": str(home),
        "TINKERFS_FUSE_BINDING": binding,
        "PYTHONWARNINGS": "error",
    }


@pytest.fixture
def as_installed(env, tmp_path):
    """Runs a shell script where `tinkerfs` is this one.

    mount(8) looks for it on a PATH of its own, so a folder of that is replaced, in a mount
    namespace that nobody else sees; so the mount is made and looked at there.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "tinkerfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tinkerfs "$@"\n')
    program.chmod(0o755)

    def run_script(script):
        script = f"set -e; mount --bind {folder} /usr/local/sbin; {script}"
        return run("unshare", "-m", "sh", "-c", script, env=env)

    return run_script
