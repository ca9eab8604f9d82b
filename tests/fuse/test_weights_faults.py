"""Readers of a real mount get correct bytes or an error in time, despite network faults."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.support.account import account, make_account
from tests.support.mount import tinkerfs
from tests.support.readers import READERS, Reader, size_once_reachable
from tests.support.store_faults import FAULTS

__all__ = ["account", "make_account"]

MIB = 1 << 20
NAME = "adapter_model.safetensors"
#: Longer than a busy machine pauses, because a fault that occurs once must not become an error.
TIMEOUT_S = 1.5
#: Time limit of a reader. The kernel repeats failed reads of a mapping, page by page.
BOUND_S = 20 * TIMEOUT_S


class Campaign:
    """A mounted account, with a new checkpoint for each reader."""

    def __init__(self, account):
        self.account = account
        self.run_id = account.new_run().removeprefix("runs/")
        self.count = 0

    def new_file(self, size_bytes=9 * MIB):
        """Add a checkpoint and open its files; return its weights file and the expected bytes."""
        self.count += 1
        name = f"sampler_weights/{self.count}"
        self.account.server.account.add_checkpoint(self.run_id, name, size_bytes=size_bytes)
        self.account.refresh()
        file = self.account.path(f"runs/{self.run_id}/checkpoints/{name}/files/{NAME}")
        content = self.account.server.files(self.run_id, name)[NAME]
        assert size_once_reachable(file) == content.size_bytes
        return file, content.read(0, content.size_bytes)

    def exposes_signature(self):
        """Return whether any visible output of the mount contains part of a signed URL."""
        root = self.account.root
        texts = [
            (root / ".tinkerfs/errors").read_bytes(),
            (root / ".tinkerfs/stats.json").read_bytes(),
            (root.parent / "log").read_bytes(),
            *command_lines(root),
        ]
        return any(b"X-Signature" in text for text in texts)


def command_lines(root):
    """Return the command lines of the processes of a mount, as `ps` shows them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if os.fsencode(root) in line:
                yield line


@pytest.fixture(scope="module")
def campaign(make_account):
    settings = {"timeout_s": TIMEOUT_S, "archive_build_limit": 0}
    campaign = Campaign(make_account(runs=1, checkpoints=1, settings=settings))
    yield campaign
    status = tinkerfs("status", "--json", campaign.account.root)
    assert status.returncode == 0, status.stderr
    assert "X-Signature" not in status.stdout + status.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_readers_get_right_bytes_or_an_error_despite_fault(campaign, fault):
    server = campaign.account.server
    spoil, outcome = FAULTS[fault]
    for how in READERS:
        file, expected = campaign.new_file()
        spoil(server, times=1)
        is_right = Reader(how, file).ends_with(expected, BOUND_S)
        server.faults.clear()
        assert is_right or outcome == "any"
        assert Reader(how, file).ends_with(expected), "the mount keeps working"
    files = [campaign.new_file() for _ in READERS]
    spoil(server, times=None)
    readers = [Reader(how, file) for how, (file, _) in zip(READERS, files, strict=True)]
    for reader, (_, expected) in zip(readers, files, strict=True):
        reader.ends_with(expected, BOUND_S)
    server.faults.clear()
    for how, (file, expected) in zip(READERS, files, strict=True):
        assert Reader(how, file).ends_with(expected), "the mount keeps working"
    assert not campaign.exposes_signature()
