"""Hosts that share a directory as cache: processes with own metadata and common blocks."""

import os
import signal

from tests.unit.weights.conftest import range_of, subject_of, truth, weights_in
from tests.unit.weights.test_processes import MIB, NAME, reader
from tinkerfs.context import BACKGROUND_CONTEXT


def hosts(server, tmp_path, subject, count):
    """Start readers that have opened the file, and wait to read it."""
    started = [
        reader(server, tmp_path / f"host{number}", subject, tmp_path / "shared")
        for number in range(count)
    ]
    for each in started:
        assert each.stdout.readline() == b"open\n"
    return started


def begin(host):
    host.stdin.write(b"\n")
    host.stdin.flush()


def test_hosts_fetch_each_byte_once_between_them(demo_server, tmp_path):
    server = demo_server(runs=1, size_bytes=20 * MIB, latency_s=0.02)
    subject = subject_of(server)
    started = hosts(server, tmp_path, subject, 3)
    server.journal.clear()
    for each in started:
        begin(each)
    expected = truth(server, subject, NAME)
    assert [each.communicate(timeout=60)[0] == expected for each in started] == [True] * 3
    fetched = sorted(map(range_of, server.journal.entries("GET store/archive")))
    assert sum(stop - start for start, stop in fetched) < 21 * MIB, fetched
    server.journal.clear()
    account = (server.base_url, server.api_key)
    with weights_in(tmp_path / "later", *account, shared=tmp_path / "shared") as mount:
        with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
            assert file.read(len(expected), 0, BACKGROUND_CONTEXT) == expected
        assert not list(server.journal), "another host has found the members and the bytes"
        mount.weights.invalidate(subject)
        with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT):
            assert server.journal.entries("GET store/archive"), "the common members were dropped"


def test_killed_hosts_leave_no_wrong_byte_and_no_claim(demo_server, tmp_path):
    server = demo_server(runs=1, size_bytes=24 * MIB, latency_s=0.01)
    subject = subject_of(server)
    expected = truth(server, subject, NAME)
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        killed, other = hosts(server, directory, subject, 2)
        server.journal.clear()
        begin(killed)
        begin(other)
        server.journal.wait_for(1 + 2 * number, "GET store/archive", 60)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert other.communicate(timeout=60)[0] == expected
        account = (server.base_url, server.api_key)
        with (
            weights_in(tmp_path / "last", *account, shared=directory / "shared") as mount,
            mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file,
        ):
            assert mount.weights.cached_bytes(subject, NAME) > 0
            assert file.read(len(expected), 0, BACKGROUND_CONTEXT) == expected
            assert not mount.telemetry.errors.text()
