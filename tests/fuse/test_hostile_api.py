"""A mount of a server with malformed responses: each operation ends, and the mount recovers."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.account import api_calls, mounted
from tests.support.hostile import HostileServer, endless, genuine, hold
from tests.support.mount import wait_until
from tests.unit.api.test_hostile_responses import HOSTILE_RESPONSES
from tinkerfs import errors

pytestmark = pytest.mark.kernel

OK = b"HTTP/1.1 200 OK\r\n"
#: The timeout of the tests in which a request exceeds it.
TIMEOUT_S = 2.0
FINAL = (errors.ProtocolError, errors.ClientError)
#: Responses that are retried until the timeout, as those of 500 are.
RETRIED = {"status 600", "status 999"}
FAILURES = ("Protocol error", "Input/output error")


@contextmanager
def mounted_hostile(directory, **settings):
    """Yield a hostile server and its mount, under one binding, which makes no difference."""
    with HostileServer(runs=12, checkpoints=1) as server:
        settings |= {"ttl_s": 0.0, "stale_if_error_s": 0.0}
        with mounted(server, directory, "mfusepy3", **settings) as root:
            yield server, root


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    """Return a hostile server and its mount with the default timeout."""
    with mounted_hostile(tmp_path_factory.mktemp("hostile")) as mount:
        yield mount


@pytest.fixture
def impatient_mount(tmp_path):
    with mounted_hostile(tmp_path, timeout_s=TIMEOUT_S) as mount:
        yield mount


def list_all(paths):
    """List directories concurrently; return the output of each `ls`."""
    started = [
        subprocess.Popen(
            ["ls", path], env={**os.environ, "LC_ALL": "C"}, text=True, stderr=subprocess.PIPE
        )
        for path in paths
    ]
    return [process.communicate(timeout=30)[1] for process in started]


@pytest.mark.parametrize(
    "steps",
    [
        (OK, endless(b"X-A: b\r\n", 0.05)),
        (endless(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05),),
        (hold,),
    ],
    ids=["headers", "interim responses", "nothing"],
)
def test_trickling_responses_do_not_block_later_requests(impatient_mount, steps):
    server, root = impatient_mount
    paths = [root / f"runs/{run}/checkpoints" for run in server.account.run_ids]
    server.journal.clear()
    rule = server.on("api", *steps, times=None)
    outputs = list_all(paths[:8])
    assert all("Connection timed out" in each for each in outputs), outputs
    rule.remove()
    wait_until(lambda: list_all(paths) == [""] * 12, 60)
    assert api_calls(server)


def test_hanging_archive_requests_are_waited_for(impatient_mount):
    server, root = impatient_mount
    server.on("GET archive", lambda handler: handler.pause(3 * TIMEOUT_S), genuine(), times=3)
    runs = list(server.account.runs())[:3]
    paths = [root / f"runs/{run.id}/checkpoints/{run.checkpoints[0].id}/files" for run in runs]
    outputs = list_all([f"{path}/" for path in paths])
    assert outputs == [""] * 3
    assert server.journal.count("GET archive") == 3


def archive_requests(root):
    """Return how many archive requests found no server, as the mount counts them."""
    calls = json.loads((root / ".tinkerfs/stats.json").read_text())["api_requests"]
    return sum(count.get("unreachable", 0) for name, count in calls.items() if "archive" in name)


def test_short_api_outage_does_not_fail_read_needing_new_url(mount):
    server, root = mount
    run = server.account.add_run()
    server.account.add_checkpoint(run.id, "weights/blip", size_bytes=12 << 20)
    expected = server.archive(run.id, "weights/blip")
    path = root / f"runs/{run.id}/checkpoints/weights/blip/archive.tar"
    with path.open("rb", buffering=0) as file:
        assert file.read(4096) == expected.read(0, 4096)
        server.signer.revoke_all()
        server.stop_listening("api")
        with ThreadPoolExecutor() as pool:
            reading = pool.submit(lambda: os.pread(file.fileno(), 4096, 9 << 20))
            wait_until(lambda: archive_requests(root) >= 2)
            # Meanwhile a listing that needs the API fails at once.
            assert "No route to host" in list_all([root / "runs/never-seen"])[0]
            server.resume_listening()
            assert reading.result(20) == expected.read(9 << 20, (9 << 20) + 4096)


def test_hostile_response_fails_one_listing_only(mount):
    """Send each response that causes no retry: one `ls` fails, and the next one succeeds."""
    server, root = mount
    complete = sorted(os.listdir(root / "runs"))
    final = {
        name: steps
        for name, (steps, kind) in HOSTILE_RESPONSES.items()
        if kind in FINAL and name not in RETRIED
    }
    assert len(final) > 90
    for name, steps in final.items():
        rule = server.on("GET training_runs", *steps, times=None)
        (root / ".tinkerfs/refresh").write_bytes(b"1")
        (outputs,) = list_all([root / "runs"])
        assert any(message in outputs for message in FAILURES), (name, outputs)
        rule.remove()
        (root / ".tinkerfs/refresh").write_bytes(b"1")
        assert sorted(os.listdir(root / "runs")) == complete, name
    assert "c0ffee" not in (root / ".tinkerfs/errors").read_text()
