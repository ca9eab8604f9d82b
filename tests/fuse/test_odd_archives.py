"""Unusual archives on real mounts: non-UTF-8 names, and a file of 9 GiB."""

import json
import os

from tests.support.account import account, every_binding, make_account
from tests.support.tar_variants import END, LARGE_BYTES, header, large, member
from tinkerfs.demo.content import Data

__all__ = ["account", "make_account"]

pytestmark = every_binding

NAME = b"caf\xe9 \xff"
SAFETENSORS = b"\x08\0\0\0\0\0\0\0{}      "


def new_files(account, content):
    """Return the path of `files/` of a new checkpoint with this archive, as bytes."""
    run = account.new_run("sampler_weights/odd")
    run_id = run.removeprefix("runs/")
    account.server.account.find(run_id, "sampler_weights/odd")[1].archive = content
    return os.fsencode(account.path(f"{run}/checkpoints/sampler_weights/odd/files"))


def test_archive_with_non_utf8_names_lists_them(account):
    packed = (
        member(NAME, b"data")
        + member(b"d\xff/x\xfe.safetensors", SAFETENSORS)
        + header(b"out\xff", 0, b"2", b"../\xff")
        + END
    )
    files = new_files(account, Data(packed))
    assert sorted(os.listdir(files + b"/")) == sorted([NAME, b"d\xff"])
    with open(files + b"/" + NAME, "rb") as file:
        assert file.read() == b"data"
    with open(files + b"/d\xff/x\xfe.safetensors", "rb") as file:
        assert file.read() == SAFETENSORS
    with open(os.path.dirname(files) + b"/tensors.json", "rb") as file:
        tensors = json.load(file)
    assert [os.fsencode(name) for name in tensors["files"]] == [b"d\xff/x\xfe.safetensors"]
    assert "left out: 'out\\udcff': a link" in account.errors()
    missing = files + b"/nothing\xff"
    assert not os.path.exists(missing)
    assert json.loads(account.path(".tinkerfs/stats.json").read_bytes())["uptime_s"] >= 0


def test_file_of_9_gib_is_readable_at_large_offsets(account):
    content = large("pax", has_end=False)
    path = new_files(account, content) + b"/large"
    names = os.listdir(os.path.dirname(path) + b"/")
    assert sorted(names) == [b"large", b"z"]
    assert os.stat(path).st_size == LARGE_BYTES
    start = 3 * 512
    with open(path, "rb", buffering=0) as file:
        for at in ((1 << 33) - 1000, LARGE_BYTES - 4096):
            expected = content.read(start + at, start + at + 4096)
            assert os.pread(file.fileno(), 4096, at) == expected
