"""Tests of real mounts, which need FUSE; tests with the fixture `binding` run under each one."""

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
    """Return each combination of binding and libfuse."""
    return request.param


@pytest.fixture
def mountpoint(tmp_path):
    """Return an empty directory, and unmount it after the test."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    force_unmount(str(directory))


@pytest.fixture
def memory(mountpoint, binding):
    """Mount the in-memory file system under each binding."""
    with memory_mount(mountpoint, binding):
        yield mountpoint


@pytest.fixture
def env(tmp_path, server, binding):
    """Return the environment of a user with an account at the demo server."""
    home = tmp_path / "home"
    home.mkdir()
    inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {
        **inherited,
        **server.environment,
        "HOME": str(home),
        "TINKERFS_FUSE_BINDING": binding,
        "PYTHONWARNINGS": "error",
    }


@pytest.fixture
def as_installed(env, tmp_path):
    """Return a function that runs a shell script in which `tinkerfs` is this checkout.

    mount(8) searches `tinkerfs` in a PATH of its own. So the script runs in a new mount namespace,
    in which one directory of that PATH is replaced. The mount is visible only there.
    """
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "tinkerfs"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tinkerfs "$@"\n')
    program.chmod(0o755)

    def run_script(script):
        script = f"set -e; mount --bind {directory} /usr/local/sbin; {script}"
        return run("unshare", "-m", "sh", "-c", script, env=env)

    return run_script
