"""`tinkerfs mount --audit`: changes through a mount, as a log daemon and a file receive them."""

import os
import socket

import pytest

from tests.support.mount import run, tinkerfs
from tests.unit.test_audit import parse


@pytest.fixture
def binding():
    return "auto"


@pytest.fixture
def log_daemon(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.settimeout(20)
        yield listener


def test_mount_reports_each_change_to_a_log_daemon(mountpoint, env, server, tmp_path, log_daemon):
    done = tinkerfs("mount", mountpoint, "--audit", tmp_path / "log", env=env)
    assert done.returncode == 0, done.stderr
    run_id = server.account.runs()[0].id
    checkpoint = next(c for c in server.account.runs()[0].checkpoints if c.id.startswith("weights"))
    path = f"/runs/{run_id}/checkpoints/{checkpoint.id}"
    script = "echo 1 > $0/published; rm -r $0; mkdir $0/none; exit 0"
    process = run("sh", "-c", script, f"{mountpoint}{path}")
    assert process.returncode == 0
    lines = [parse(log_daemon.recv(65536).decode()) for _ in range(4)]
    assert [line["outcome"] for line in lines] == ["in flight", "done"] * 2
    _, published, _, removed = lines
    expected = {"uid": os.getuid(), "tinker_path": f"tinker://{run_id}/{checkpoint.id}"}
    assert expected.items() <= published.items()
    assert expected.items() <= removed.items()
    assert (published["command"], published["outcome"]) == ("sh", "done")
    assert published["path"] == f"{path}/published"
    assert (removed["command"], removed["path"]) == ("rm", path)
    assert removed["pid"] > 1

    log_daemon.close()  # a lost log daemon fails no change
    [other] = [c for c in server.account.runs()[0].checkpoints if c.id.startswith("weights")][:1]
    control = mountpoint / "runs" / run_id / "checkpoints" / other.id / "published"
    for value in "101":
        control.write_text(value)
    errors = (mountpoint / ".tinkerfs/errors").read_text()
    assert errors.count("\taudit\tECONNREFUSED\t") == 1
    assert (mountpoint / ".tinkerfs/changes").read_text().count("\tdone\n") == 5


def test_mount_with_unusable_audit_log_prints_one_line(mountpoint, env, tmp_path):
    done = tinkerfs("mount", mountpoint, "-o", f"audit={tmp_path}/missing/audit", env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "missing/audit cannot be written: No such file or directory (hint: " in line
    assert not os.path.ismount(mountpoint)


def test_mount_writes_audit_file_named_in_configuration(mountpoint, env, server, tmp_path):
    (tmp_path / "config.toml").write_text('audit = "audit.log"\n')
    done = tinkerfs("mount", mountpoint, "--config", tmp_path / "config.toml", env=env)
    assert done.returncode == 0, done.stderr
    run_id, checkpoint = server.account.runs()[0].id, server.account.runs()[0].checkpoints[0]
    server.faults.add("POST publish", status=403, times=None)
    control = mountpoint / "runs" / run_id / "checkpoints" / checkpoint.id / "published"
    assert run("sh", "-c", f"echo 1 > '{control}'").returncode != 0
    requested, line = (tmp_path / "audit.log").read_text().splitlines()
    assert parse(requested)["outcome"] == "in flight"
    assert parse(line)["outcome"].startswith("failed: ")
