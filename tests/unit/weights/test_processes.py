"""Mounts that share a cache: one download per block, and no damage by killed processes."""

import os
import random
import signal
import subprocess
import sys
import time

from tests.unit.weights.conftest import assert_disjoint, subject_of, truth
from tinkerfs.context import BACKGROUND_CONTEXT

MIB = 1 << 20
NAME = "adapter_model.safetensors"

READER = """
import sys
from pathlib import Path
from tests.unit.weights.conftest import weights_in
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.weights.checkpoint_version import CheckpointVersion
directory, shared, base_url, api_key, run, checkpoint, time_s = sys.argv[1:]
ref = CheckpointRef(run, checkpoint, checkpoint, exists=True)
subject = CheckpointVersion(base_url, (run, checkpoint, float(time_s)), ref, "/x", 0)
shared = Path(shared) if shared else None
with weights_in(Path(directory), base_url, api_key, shared=shared) as mount:
    with mount.weights.open(subject, "adapter_model.safetensors", BACKGROUND_CONTEXT) as file:
        print("open", flush=True)
        sys.stdin.readline()
        data, at = bytearray(), 0
        while chunk := file.read(131072, len(data), BACKGROUND_CONTEXT):
            data += chunk
        sys.stdout.buffer.write(data)
"""


def reader(server, directory, subject, shared=""):
    account = (server.base_url, server.api_key, *subject.key)
    arguments = [str(each) for each in (directory, shared, *account)]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_processes_fetch_each_block_once_between_them(demo_server, tmp_path):
    server = demo_server(runs=1, size_bytes=20 * MIB, latency_s=0.02)
    subject = subject_of(server)
    readers = [reader(server, tmp_path, subject) for _ in range(3)]
    for each in readers:
        assert each.stdout.readline() == b"open\n"
    server.journal.clear()
    for each in readers:
        each.stdin.write(b"\n")
        each.stdin.flush()
    expected = truth(server, subject, NAME)
    assert [each.communicate(timeout=30)[0] == expected for each in readers] == [True] * 3
    assert_disjoint(server.journal.entries("GET store/archive"), 20 * MIB)


def test_killed_readers_leave_only_valid_blocks(demo_server, tmp_path, weights_of):
    server = demo_server(runs=1, size_bytes=40 * MIB)
    subject, rng = subject_of(server), random.Random(0)
    expected = truth(server, subject, NAME)
    for _ in range(8):
        killed = reader(server, tmp_path / "cache", subject)
        assert killed.stdout.readline() == b"open\n"
        killed.stdin.write(b"\n")
        killed.stdin.flush()
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
    mount = weights_of(server)
    cached_bytes = mount.weights.cached_bytes(subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.read(len(expected), 0, BACKGROUND_CONTEXT) == expected
    assert cached_bytes > 0
    assert "altered" not in mount.telemetry.errors.text().decode()
