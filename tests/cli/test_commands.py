"""`doctor`, and `umount` and `status` without a mount, as subprocesses."""

import json
import os

import pytest

from tests.support.mount import tinkerfs
from tests.support.server import demo_server, server

__all__ = ["demo_server", "server"]


@pytest.fixture
def env(tmp_path):
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}


def checks_of(done):
    return {each["check"]: each for each in json.loads(done.stdout)}


def test_doctor_with_everything_present_reports_it(env, server):
    done = tinkerfs("doctor", "--json", env={**env, **server.environment})
    checks = checks_of(done)
    assert checks["cache"]["is_ok"]
    assert checks["key"] == {"check": "key", "is_ok": True, "found": "found: TINKER_API_KEY"}
    assert checks["API"]["is_ok"]
    assert server.api_key not in done.stdout


def test_doctor_with_unreachable_api_prints_hint(env, server):
    server.stop_listening()
    env |= {**server.environment, "TINKERFS_TIMEOUT": "1"}
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "FAIL  API" in done.stdout
    assert "--base-url" in done.stdout
    assert "\x1b" not in done.stdout


def test_doctor_without_key_fails(env):
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "FAIL  key" in done.stdout
    assert "TINKER_API_KEY" in done.stdout


def test_doctor_with_wrong_key_fails_without_printing_it(env, server):
    env |= {**server.environment, "TINKER_API_KEY": "tml-wrong-0123456789"}
    done = tinkerfs("doctor", env=env)
    assert done.returncode == 1
    assert "rejects the key" in done.stdout
    assert "0123456789" not in done.stdout


def test_doctor_without_libfuse_fails(env, server):
    env |= {**server.environment, "FUSE_LIBRARY_PATH": "/nonexistent/libfuse3.so"}
    checks = checks_of(tinkerfs("doctor", "--json", env=env))
    assert not checks["libfuse"]["is_ok"]
    assert "FUSE_LIBRARY_PATH" in checks["libfuse"]["found"]


def test_doctor_with_unknown_option_in_file_names_it(env, tmp_path):
    (tmp_path / "bad.toml").write_text("tll = 3\n")
    done = tinkerfs("doctor", "--config", tmp_path / "bad.toml", env=env)
    assert done.returncode == 2
    assert "bad.toml: tll: unknown option" in done.stderr


def test_umount_and_status_without_mount_print_one_line(env, tmp_path):
    for command in ("umount", "status"):
        done = tinkerfs(command, tmp_path, env=env)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert str(tmp_path) in line
    assert "is a mount of proc" in tinkerfs("umount", "/proc", env=env).stderr


def test_umount_with_symlink_to_other_mount_names_its_type(env, tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert "is a mount of proc" in tinkerfs("umount", tmp_path / "link", env=env).stderr
