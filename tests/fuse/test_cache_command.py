"""`tinkerfs cache` beside a mount that uses what it looks at."""

import json
import os

import pytest

from tests.support.account import make_account
from tests.support.mount import tinkerfs

__all__ = ["make_account"]

#: The command does not go through the mount, so how libfuse is driven makes no difference.
pytestmark = pytest.mark.parametrize("make_account", ["mfusepy3"], indirect=True, scope="module")

SIZE_BYTES = 9 << 20


def test_what_is_cleared_or_spoilt_under_a_mount_is_read_right_again(make_account, tmp_path):
    account = make_account(runs=1, checkpoints=3, size_bytes=SIZE_BYTES, settings={"xattr": True})
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **account.server.environment}
    run_id = account.server.account.run_ids[0]
    names = sorted(os.listdir(account.path(f"runs/{run_id}/checkpoints/sampler_weights")))
    one = account.path(f"runs/{run_id}/checkpoints/sampler_weights/{names[0]}")
    member = one / "files/adapter_model.safetensors"
    true = member.read_bytes()

    def told(command, *words):
        done = tinkerfs("cache", command, str(one), "--json", *words, env=env)
        return done.returncode, json.loads(done.stdout)

    code, report = told("info")
    assert code == 0
    [row] = report["checkpoints"]
    assert row["checkpoint"] == f"tinker://{run_id}/sampler_weights/{names[0]}"
    # Members and what is between them; and on disk a checksum and a rest of a page a block.
    kept = int(os.getxattr(member, "user.tinkerfs.cached_bytes"))
    assert kept == len(true)
    assert kept < row["data_bytes"] == row["length_bytes"] < kept + (1 << 16)
    assert kept < row["kept_bytes"] < kept + (1 << 20)

    with member.open("rb", buffering=0) as reader:
        reader.read(1)
        assert told("info")[1]["checkpoints"][0]["is_open"]
        account.server.journal.clear()
        done = tinkerfs("cache", "clear", str(one), env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert told("info")[1]["checkpoints"] == []
        # Not by the page cache of the kernel, which has all of it.
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(reader.fileno(), len(true), 0) == true
    account.server.journal.wait_until_idle()
    assert account.server.journal.entries("store"), "what is gone was fetched again"

    [block, *_] = (account.root.parent / "cache/blocks").glob("*/0")
    with block.open("r+b") as file:
        file.write(b"spoilt")
    code, report = told("verify")
    assert (code, report["bad_blocks"]) == (1, 1)
    bad = {"checkpoint": row["checkpoint"], "file": "archive", "block": 0}
    assert report["bad"] == [bad]
    assert told("verify")[1]["bad_blocks"] == 0
    assert member.read_bytes() == true


def test_a_mount_says_what_its_names_stand_for_without_a_key_and_without_an_archive(
    make_account, tmp_path
):
    account = make_account(runs=2, checkpoints=2, size_bytes=5000)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    runs = [account.path(f"runs/{run_id}") for run_id in account.server.account.run_ids]
    one, other = (f"tinker://{run.name}/sampler_weights/final" for run in runs)
    for run in runs:
        (run / "latest_sampler/files/adapter_config.json").read_bytes()
    place = runs[0] / "checkpoints/sampler_weights/final"
    adapter = account.path(f"adapters/{runs[0].name}@sampler_weights@final")
    unread = runs[0] / "latest/files/adapter_model.safetensors"
    (tmp_path / "link").symlink_to(place)
    list(account.path("adapters").iterdir())

    def told(path):
        done = tinkerfs("cache", "info", "--json", path, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return {row["checkpoint"] for row in json.loads(done.stdout)["checkpoints"]}

    account.server.journal.wait_until_idle()
    account.server.journal.clear()
    for path in (
        *(place, place / "files", place / "files/adapter_config.json", place / "archive.tar"),
        *(runs[0], runs[0] / "checkpoints", place.parent, runs[0] / "latest_sampler", adapter),
        *(tmp_path / "link", place / "../../../latest_sampler/info.json"),
    ):
        assert told(path) == {one}, path
    assert told(unread) == told(place.parent.with_name("weights")) == set()
    assert told(account.root) == {one, other}
    assert not account.server.journal.count("GET archive")
    assert not account.server.journal.entries("store")

    done = tinkerfs("cache", "clear", place.with_name("nonsense"), env=env)
    assert done.returncode == 1
    assert done.stderr == f"tinkerfs: {place.with_name('nonsense')}: there is no such file\n"
    assert told(account.root) == {one, other}
