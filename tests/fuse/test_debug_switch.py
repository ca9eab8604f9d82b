"""SIGUSR2 and the JSON log of a mount, in the background and in the foreground."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.mount import tinkerfs, wait_until


@pytest.fixture
def binding():
    return "auto"


@pytest.mark.parametrize("options", [["--log-format=json"], ["--log-format=json", "--foreground"]])
def test_sigusr2_switches_debug_logging(mountpoint, env, tmp_path, options):
    path = tmp_path / "log"
    command = [sys.executable, "-m", "tinkerfs", "mount", str(mountpoint), f"--log-file={path}"]
    process = subprocess.Popen([*command, *options], env=env)
    wait_until(lambda: (mountpoint / ".tinkerfs/stats.json").exists(), timeout_s=30)
    pid = json.loads((mountpoint / ".tinkerfs/stats.json").read_text())["pid"]

    def switched(level):
        os.kill(pid, signal.SIGUSR2)
        wait_until(lambda: f"the log level is {level}" in path.read_text(), timeout_s=30)

    def records(operation):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [each for each in found if each.get("operation") == operation]

    os.listdir(mountpoint / "runs")
    switched("debug")
    os.listdir(mountpoint / "sessions")
    with pytest.raises(FileNotFoundError):
        (mountpoint / "runs" / "none").stat()
    switched("warning")
    os.listdir(mountpoint / "runs")
    [record] = records("opendir")
    assert (record["path"], record["errno"], len(record["request_ids"])) == ("/sessions", None, 1)
    assert record["duration_s"] > 0
    missing = [each for each in records("getattr") if each["path"] == "/runs/none"]
    assert {each["errno"] for each in missing} == {"ENOENT"}
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    assert process.wait(20) == 0
