"""A mount of a server that sends what no HTTP library would: each operation ends, and recovers."""

import os
import subprocess

import pytest

from tests.support.account import api_calls, mounted
from tests.support.hostile import HostileServer, endless, genuine, hold
from tests.support.mount import wait_until

pytestmark = pytest.mark.kernel

OK = b"HTTP/1.1 200 OK\r\n"
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    """A hostile server and its mount; one binding, because the kernel's side cannot differ."""
    with HostileServer(runs=12, checkpoints=1) as server:
        folder = tmp_path_factory.mktemp("hostile")
        settings = {"timeout_s": TIMEOUT_S, "ttl_s": 0.0, "stale_s": 0.0}
        with mounted(server, folder, "mfusepy3", **settings) as root:
            yield server, root


def list_all(paths):
    """List directories at the same time; return what `ls` says of each."""
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
def test_requests_that_trickle_hold_up_nothing_afterwards(mount, steps):
    server, root = mount
    paths = [root / f"runs/{run}/checkpoints" for run in server.account.run_ids]
    server.journal.clear()
    rule = server.on("api", *steps, times=None)
    said = list_all(paths[:8])
    assert all("Connection timed out" in each for each in said), said
    rule.remove()
    wait_until(lambda: list_all(paths) == [""] * 12)
    assert api_calls(server)


def test_archives_that_are_held_are_waited_for(mount):
    server, root = mount
    server.journal.clear()
    server.on("GET archive", lambda handler: handler.pause(3 * TIMEOUT_S), genuine(), times=3)
    runs = list(server.account.runs())[:3]
    paths = [root / f"runs/{run.id}/checkpoints/{run.checkpoints[0].id}/files" for run in runs]
    said = list_all([f"{path}/" for path in paths])
    assert said == [""] * 3
    assert server.journal.count("GET archive") == 3
