"""`tinkerfs stats` and `tinkerfs profile` of a mount that another process serves."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.account import account, make_account
from tests.support.mount import force_unmount, tinkerfs, wait_until
from tests.support.terminal import terminal
from tinkerfs.fuse import mount_table

__all__ = ["account", "make_account"]

TINKERFS = (sys.executable, "-m", "tinkerfs")


@pytest.fixture
def binding():
    return "auto"


def start(*arguments):
    return subprocess.Popen(
        [*TINKERFS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for a process; return its exit status, output and error lines."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors.splitlines()


def test_stats_shows_reads_as_they_happen(account):
    run = account.new_run("weights/1")
    seen = {}
    with start("stats", account.root, "--interval", "0.2", "--json") as process:
        first = json.loads(process.stdout.readline())
        assert first["store_mb_per_s"] == 0
        account.sh(f"cat {run}/checkpoints/weights/1/files/*; cat nothing")
        wanted = {"operations_per_s", "errors_per_s", "store_mb_per_s", "kernel_mb_per_s"}
        while not wanted <= seen.keys():
            sample = json.loads(process.stdout.readline())
            seen |= {key: value for key, value in sample.items() if value}
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().strip() == ""
    assert seen["operation_ms"] > 0


def test_stats_repeats_its_header(account):
    done = tinkerfs("stats", account.root, "--interval", "10ms", "--count", "41")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 41 + 3 * 2
    assert [at for at, line in enumerate(lines) if "ops/s" in line] == [1, 23, 45]
    assert len(set(map(len, lines[1:]))) == 1, "the columns are aligned"


def test_stats_plots_on_a_terminal_until_ctrl_c(account, tmp_path):
    command = [*TINKERFS, "stats", str(account.root), "--interval", "50ms", "--plot"]
    with terminal(command, tmp_path, {"PYTHONPATH": os.getcwd()}) as shown:
        for _ in range(3):
            os.listdir(account.root)
            shown.wait_for("fuse ops/s")
            shown.wait_for("█")
        shown.wait_for("MB/s store")
        shown.process.send_signal(signal.SIGINT)
        assert shown.end() == 130
        assert "Traceback" not in shown.shown
    done = tinkerfs("stats", account.root, "--plot")
    assert done.returncode == 2
    assert "--plot needs a terminal" in done.stderr


def wait_until_attached(process, command, mountpoint):
    """Wait until a command reads a mount: a process of it has the access log open."""
    if command == "stats":
        process.stdout.readline()
    else:
        wait_until(
            lambda: any(
                "access_log" in user.usage for user in mount_table.find_mount_users(str(mountpoint))
            )
        )


@pytest.mark.parametrize("command", ["stats", "profile"])
def test_lost_mount_ends_the_command_with_one_line(mountpoint, env, command):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    arguments = ["--interval", "0.1"] if command == "stats" else ["--duration", "50"]
    process = start(command, mountpoint, *arguments)
    wait_until_attached(process, command, mountpoint)
    force_unmount(str(mountpoint))
    status, _output, errors = finish(process)
    assert status == 1
    assert errors == [f"tinkerfs: {mountpoint} was unmounted"]

    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    process = start(command, mountpoint, *arguments)
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    wait_until_attached(process, command, mountpoint)
    os.kill(pid, signal.SIGKILL)
    status, _output, errors = finish(process)
    assert status == 1
    assert "the daemon has exited (hint: " in errors[0]
    assert len(errors) == 1


def test_hanging_mount_ends_the_commands_with_one_line(mountpoint, env):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    os.kill(pid, signal.SIGSTOP)
    try:
        for command in (["stats"], ["profile", "--duration", "1"]):
            done = tinkerfs(*command, mountpoint, env=env)
            assert done.returncode == 1
            hint = "(hint: tinkerfs debug bundle shows why)"
            assert done.stderr == f"tinkerfs: {mountpoint} does not reply {hint}\n"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_profile_of_mount_names_operations_paths_and_processes(account):
    done = threading.Event()

    def look():
        while not done.is_set():
            account.path("profiled-path").exists()
            account.sh("cat README.md")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        result = tinkerfs("profile", account.root, "--duration", "2")
    finally:
        done.set()
        thread.join()
    assert (result.returncode, result.stderr) == (0, "")
    summary, operations, paths, processes = result.stdout.split("\n\n")
    assert " operations, " in summary
    assert "  getattr\n" in operations
    assert "  /profiled-path\n" in paths
    assert "  cat[" in processes


def test_profile_of_saved_log_reports_its_lines(account, tmp_path):
    saved = tmp_path / "saved.log"
    with saved.open("wb") as file:
        cat = subprocess.Popen(["cat", account.path(".tinkerfs/access_log")], stdout=file)
        assert account.eventually(
            lambda: not account.path("saved-path").exists() and saved.stat().st_size > 100, 20
        )
        cat.kill()
        cat.wait(20)
    done = tinkerfs("profile", saved)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  /saved-path\n" in done.stdout
    for path, reason in ((tmp_path / "none", "No such file"), (sys.executable, "has no line")):
        done = tinkerfs("profile", path)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert reason in line


def test_profile_on_terminal_is_redrawn_until_ctrl_c(account, tmp_path):
    command = [*TINKERFS, "profile", str(account.root)]
    with terminal(command, tmp_path, {"PYTHONPATH": os.getcwd()}) as shown:
        shown.wait_for("0 operations")
        account.path("live-path").exists()
        shown.wait_for("/live-path")
        shown.process.send_signal(signal.SIGINT)
        assert shown.end() == 0
        assert "Traceback" not in shown.shown
