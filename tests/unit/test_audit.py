"""The audit log, in a file and on a datagram socket as of a log daemon."""

import json
import os
import re
import resource
import socket
import stat

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.audit import AuditLog
from tinkerfs.context import Caller
from tinkerfs.errors import StartupError
from tinkerfs.telemetry import Telemetry

HOSTILE = '/runs/a\nb\x1b[31m\u202e\udcff" uid=0/tml-c0ffee0123456789abcdef'


@pytest.fixture
def telemetry():
    return Telemetry(FakeTime().clock)


@pytest.fixture
def log_daemon(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.settimeout(10)
        yield listener


def audit_to(telemetry, destination):
    audit_log = AuditLog(str(destination), FakeTime().clock, telemetry.record_error)
    telemetry.on_change = audit_log.record


def change(telemetry, path="/runs/r/checkpoints/weights/1", outcome="done"):
    caller = Caller(os.getpid(), 1000, os.getpgrp())
    tinker_path = "tinker://r/weights/1"
    telemetry.end_mutation(telemetry.begin_mutation(path, "delete", caller, tinker_path), outcome)


def parse(line):
    """Return the values of a line by their names."""
    values = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\d+)', line))
    return {name: json.loads(text) for name, text in values.items()}


def test_file_gets_lines_of_each_change_and_is_private(telemetry, tmp_path):
    audit_to(telemetry, tmp_path / "audit")
    change(telemetry)
    change(telemetry, outcome="failed: 500 https://s/x?sig=c0ffee")
    requested, first, _, second = (tmp_path / "audit").read_text().splitlines()
    assert requested == first.replace('outcome="done"', 'outcome="in flight"')
    assert first.startswith(f"2027-01-15T08:00:00Z tinkerfs[{os.getpid()}]: action=")
    with open("/proc/self/comm") as comm:
        command = comm.read().strip()
    assert parse(first) == {
        "action": "delete",
        "requested": "2027-01-15T08:00:00Z",
        "uid": 1000,
        "pid": os.getpid(),
        "command": command,
        "outcome": "done",
        "tinker_path": "tinker://r/weights/1",
        "path": "/runs/r/checkpoints/weights/1",
    }
    assert parse(second)["outcome"] == "failed: 500 https://s/x?[redacted]"
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o600


def test_socket_gets_two_datagrams_per_change(telemetry, tmp_path, log_daemon):
    audit_to(telemetry, tmp_path / "log")
    change(telemetry)
    requested, line = (log_daemon.recv(65536).decode("ascii") for _ in range(2))
    assert parse(requested)["outcome"] == "in flight"
    assert re.match(
        rf"<86>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d tinkerfs\[{os.getpid()}\]: ", line
    )
    assert parse(line)["tinker_path"] == "tinker://r/weights/1"


def test_hostile_name_is_one_ascii_line_without_secret(telemetry, tmp_path, log_daemon):
    audit_to(telemetry, tmp_path / "log")
    change(telemetry, path=HOSTILE)
    change(telemetry, path="/" + "\u202e\n" * 100_000)
    line, _, long_line, _ = (log_daemon.recv(65536) for _ in range(4))
    assert re.fullmatch(rb"[ -~]+", line)
    assert b"c0ffee" not in line
    name = HOSTILE.partition("/tml-")[0]
    assert parse(line.decode())["path"] == f"{name}/[redacted key]"
    assert parse(line.decode())["uid"] == 1000
    assert len(long_line) < 8000


def test_lost_socket_is_reported_once_and_found_again(telemetry, tmp_path, log_daemon):
    audit_to(telemetry, tmp_path / "log")
    log_daemon.close()
    for _ in range(3):
        change(telemetry)
    (error,) = telemetry.errors.text().decode().splitlines()
    assert "\taudit\tECONNREFUSED\tchanges are not written to the audit log: " in error
    (tmp_path / "log").unlink()
    change(telemetry)
    assert not (tmp_path / "log").exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        listener.settimeout(10)
        change(telemetry, "/again")
        assert parse(listener.recv(65536).decode())["path"] == "/again"
    change(telemetry)
    (error,) = telemetry.errors.entries()
    assert error.count == 2


def test_line_that_does_not_fit_is_reported(telemetry, tmp_path):
    path = tmp_path / "audit"
    audit_to(telemetry, path)
    path.write_bytes(bytes(950))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        telemetry.begin_mutation("/x", "delete", Caller(1, 0, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (error,) = telemetry.errors.entries()
    assert "\taudit\tENOSPC\t" in error.text


def test_daemon_that_does_not_read_delays_no_change(telemetry, tmp_path, log_daemon):
    audit_to(telemetry, tmp_path / "log")
    for _ in range(2000):  # more than any queue of a socket
        change(telemetry)
    (error,) = telemetry.errors.entries()
    assert "EAGAIN" in error.text
    assert len(telemetry.changes.entries()) == 100


def test_destination_that_cannot_be_written_is_a_startup_error(telemetry, tmp_path):
    for destination in (tmp_path, tmp_path / "missing" / "audit"):
        with pytest.raises(StartupError, match=r"the audit log .* cannot be written: .*--audit"):
            audit_to(telemetry, destination)
