"""Commands that need no mount, as a user runs them."""

import json
import os

import pytest

from tests.support.mount import tinkerfs
from tests.support.server import demo_server, server

__all__ = ["demo_server", "server"]


@pytest.fixture
def env(tmp_path):
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}


def found(done):
    return {each["check"]: each for each in json.loads(done.stdout)}


def test_doctor_finds_what_is_there(env, server):
    done = tinkerfs("doctor", "--json", env={**env, **server.environment})
    checks = found(done)
    assert checks["cache"]["is_ok"]
    assert checks["key"] == {"check": "key", "is_ok": True, "found": "found: TINKER_API_KEY"}
    assert checks["API"]["is_ok"]
    assert server.api_key not in done.stdout


def test_doctor_names_the_cure_of_what_is_not(env, server):
    server.stop_listening()
    env |= {**server.environment, "TINKERFS_TIMEOUT": "1"}
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "FAIL  API" in done.stdout
    assert "--base-url" in done.stdout
    assert "\x1b" not in done.stdout


def test_doctor_without_a_key(env):
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "FAIL  key" in done.stdout
    assert "TINKER_API_KEY" in done.stdout


def test_doctor_with_a_wrong_key(env, server):
    env |= {**server.environment, "TINKER_API_KEY": "tml-wrong-0123456789"}
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "does not take the key" in done.stdout
    assert "0123456789" not in done.stdout


def test_doctor_without_libfuse(env, server):
    env |= {**server.environment, "FUSE_LIBRARY_PATH": "/nonexistent/libfuse3.so"}
    checks = found(tinkerfs("doctor", "--json", env=env))
    assert not checks["libfuse"]["is_ok"]
    assert "FUSE_LIBRARY_PATH" in checks["libfuse"]["found"]


def test_doctor_tells_a_bad_option_file(env, tmp_path):
    (tmp_path / "bad.toml").write_text("tll = 3\n")
    done = tinkerfs("doctor", "--config", tmp_path / "bad.toml", env=env)
    assert done.returncode == 1
    assert "there is no option 'tll'" in done.stdout


def test_umount_and_status_of_what_is_no_mount(env, tmp_path):
    for command in ("umount", "status"):
        done = tinkerfs(command, tmp_path, env=env)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert str(tmp_path) in line
    assert "is a mount of proc" in tinkerfs("umount", "/proc", env=env).stderr


def test_umount_follows_links_to_a_folder_that_is_no_mount(env, tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert "is a mount of proc" in tinkerfs("umount", tmp_path / "link", env=env).stderr
