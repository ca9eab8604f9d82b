"""What a mount inherits from its caller: modules, paths and signals.

Nothing here depends on the binding, so each test runs under one.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mount import run, tinkerfs, wait_until
from tinkerfs.fuse import mount_table

#: The program as pip installs it; unlike `python -m`, it imports nothing from its directory.
PROGRAM = Path(sys.executable).with_name("tinkerfs")


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def trapped(tmp_path):
    """Return a directory with failing modules, named like modules that a mount imports."""
    directory = tmp_path / "trapped"
    directory.mkdir()
    code = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__)\nraise SystemExit(7)\n"
    for name in ("random", "tinkerfs", "httpx", "mfusepy", "platform"):
        (directory / f"{name}.py").write_text(code)
    return directory


@pytest.mark.parametrize("command", [("mount",), ("demo", "--detach", "--runs=2")])
def test_mount_imports_no_module_from_cwd(command, mountpoint, env, trapped, tmp_path):
    done = run(PROGRAM, *command, mountpoint, env=env, cwd=trapped)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "mark").exists()
    (daemon,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    assert os.listdir(mountpoint / "runs")
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0


def test_mount_resolves_relative_paths_against_cwd(mountpoint, env, tmp_path):
    directory = tmp_path / "a, b"
    directory.mkdir()
    (directory / "config.toml").write_text("log-level = 'info'\n")
    env |= {"TINKERFS_LOG_FILE": "log", "TINKERFS_CONFIG": "config.toml"}
    arguments = ("-o", "ttl=5,cache_dir=cache", "--", os.path.relpath(mountpoint, directory))
    done = run(PROGRAM, "mount", *arguments, env=env, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    assert (directory / "cache/metadata.sqlite3").exists()
    assert "mounted by" in (directory / "log").read_text()
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0


def test_mount_from_pythonpath_finds_itself(mountpoint, env, tmp_path):
    source = Path(__file__).parents[2]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/tinkerfs").symlink_to(source / "tinkerfs")
    script = "import tinkerfs.cli.main as m; m.main()"
    done = run(
        sys.executable,
        "-c",
        script,
        "mount",
        mountpoint,
        env={**env, "PYTHONPATH": "lib"},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (daemon,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    assert f"PYTHONPATH={tmp_path}/lib" in Path(f"/proc/{daemon}/environ").read_text()


@pytest.mark.parametrize("ignored", ["HUP", "INT"])
def test_signal_ignored_at_start_does_not_unmount(ignored, mountpoint, env, tmp_path):
    log = tmp_path / "log"
    serve = f"exec {PROGRAM} mount --foreground --log-level=info --log-file={log} {mountpoint}"
    process = subprocess.Popen(["sh", "-c", f"trap '' {ignored}; {serve}"], env=env)
    with process:
        wait_until(lambda: os.path.ismount(mountpoint))
        # Both signals are pending before either is accepted; the lower number is accepted first.
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.Signals[f"SIG{ignored}"])
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(10) == 0
    assert "received SIGTERM" in log.read_text()


def test_mount_with_nohup_survives_sighup(mountpoint, env, tmp_path):
    log = tmp_path / "log"
    options = ("--foreground", "--log-level=info", f"--log-file={log}")
    process = subprocess.Popen(
        ["nohup", PROGRAM, "mount", *options, mountpoint],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with process:
        wait_until(lambda: os.path.ismount(mountpoint))
        process.send_signal(signal.SIGHUP)
        assert os.listdir(mountpoint / "runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert "received SIGTERM" in log.read_text()
