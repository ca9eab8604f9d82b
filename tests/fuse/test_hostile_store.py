"""Programs on a real mount with a store that hangs, sends wrong data, or fails briefly."""

import pytest

from tests.support.account import mounted, new_run
from tests.support.hostile import HostileServer, drip, endless
from tests.support.mount import wait_until
from tests.support.readers import READERS, Reader, size_once_reachable

MIB = 1 << 20
NAME = "adapter_model.safetensors"
#: Longer than a busy machine pauses.
TIMEOUT_S = 1.5
#: Time limit of a reader. The kernel repeats failed reads of a mapping, page by page.
BOUND_S = 20 * TIMEOUT_S


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def server():
    with HostileServer(runs=1, checkpoints=1) as server:
        yield server


def new_file(server, root, name):
    """Add a checkpoint and list it; return its weights file and the expected bytes."""
    run_id = new_run(server)
    server.account.add_checkpoint(run_id, f"sampler_weights/{name}", size_bytes=9 * MIB)
    (root / ".tinkerfs/refresh").write_bytes(b"1")
    file = root / f"runs/{run_id}/checkpoints/sampler_weights/{name}/files/{NAME}"
    content = server.files(run_id, f"sampler_weights/{name}")[NAME]
    assert size_once_reachable(file) == content.size_bytes
    return file, content.read(0, content.size_bytes)


HOLDING = {
    "head": [drip(b"HTTP/1.1 206 Partial\r\n" * 999)],
    "endless 100": [endless(b"HTTP/1.1 100 Continue\r\n\r\n")],
    "chunk size": [b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n", drip(b"0" * 999)],
}


def test_readers_of_hanging_store_end_in_time(server, binding, tmp_path):
    with mounted(
        server, tmp_path / "m", binding, timeout_s=TIMEOUT_S, archive_build_limit=0
    ) as root:
        for number, (steps, how) in enumerate(zip(HOLDING.values(), READERS, strict=True)):
            file, expected = new_file(server, root, number)
            rule = server.on("store", *steps, times=None)
            assert not Reader(how, file).ends_with(expected, BOUND_S)
            rule.remove()
            assert Reader(how, file).ends_with(expected, BOUND_S), "no reader joins a dead download"


def test_readers_survive_short_store_outage(server, binding, tmp_path):
    with mounted(server, tmp_path / "m", binding, archive_build_limit=0) as root:
        files = [new_file(server, root, number) for number in range(len(READERS))]
        server.stop_listening("store")
        server.drop_connections()
        readers = [Reader(how, file) for how, (file, _) in zip(READERS, files, strict=True)]

        def refused():
            stats = (root / ".tinkerfs/stats.json").read_text()
            return stats.count('"failed"') and "GET store" in stats

        wait_until(refused)
        server.resume_listening()
        for reader, (_, expected) in zip(readers, files, strict=True):
            assert reader.ends_with(expected)
