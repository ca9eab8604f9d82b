"""`tinkerfs cache` as a real command, beside what fills the cache."""

import json
import os

import pytest

from tests.support.mount import tinkerfs
from tests.support.server import demo_server

__all__ = ["demo_server"]

MIB = 1 << 20


@pytest.fixture
def server(demo_server):
    """2 runs of 2 checkpoints of 9 MiB: 3 blocks each."""
    return demo_server(runs=2, checkpoints=2, size_bytes=9 * MIB)


@pytest.fixture
def env(tmp_path, server):
    return {
        "PATH": os.environ["PATH"],
        **server.environment,
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
    }


@pytest.fixture
def kept(env, server):
    """The tinker paths of what was fetched, in that order."""
    paths = [
        f"tinker://{run.id}/{checkpoint.id}"
        for run in server.account.runs()
        for checkpoint in run.checkpoints
        if not checkpoint.id.startswith("external")
    ]
    for path in paths:
        assert tinkerfs("prefetch", path, env=env).returncode == 0
    server.journal.clear()
    return paths


def told(env, *words):
    done = tinkerfs("cache", "info", "--json", *words, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_checkpoint_is_told_with_its_size_and_age(env, kept, server):
    report = told(env)
    assert [row["checkpoint"] for row in report["checkpoints"]] == kept[::-1]
    for row in report["checkpoints"]:
        assert 9 * MIB <= row["kept_bytes"] < 10 * MIB
        assert row["data_bytes"] == row["length_bytes"], "all of it was fetched"
        assert 0 <= row["used_s_ago"] <= row["fetched_s_ago"] < 600
        assert not row["is_open"]
    assert report["kept_bytes"] == sum(row["kept_bytes"] for row in report["checkpoints"])
    assert report["limit_bytes"] == 10 << 30
    assert report["metadata_bytes"] > 0
    text = tinkerfs("cache", "info", env=env).stdout
    assert "of at most 10.0 GiB" in text
    assert all(path in text for path in kept)
    assert not server.journal.entries(), "it asks nobody"


def test_a_tinker_path_names_a_checkpoint_or_a_run(env, kept):
    [row] = told(env, kept[0])["checkpoints"]
    assert row["checkpoint"] == kept[0]
    run = "/".join(kept[0].split("/")[:3])
    of_run = [row["checkpoint"] for row in told(env, run)["checkpoints"]]
    assert sorted(of_run) == sorted(path for path in kept if path.startswith(f"{run}/"))
    assert told(env, kept[0][:-1])["checkpoints"] == [], "a part of a name is another name"


def test_bad_blocks_are_found_and_removed(env, kept, tmp_path, server):
    done = tinkerfs("cache", "verify", env=env)
    assert (done.returncode, done.stdout) == (0, f"{3 * len(kept)} blocks are sound\n")
    blocks = sorted((tmp_path / ".cache/tinkerfs/blocks").glob("*/[0-9]*"))
    with blocks[0].open("r+b") as block:
        block.seek(1000)
        was = block.read(1)
        block.seek(1000)
        block.write(bytes([was[0] ^ 1]))
    done = tinkerfs("cache", "verify", env=env)
    assert done.returncode == 1
    line, counted = done.stdout.splitlines()
    [path] = [path for path in kept if line == f"bad: {path} archive, block 0"]
    assert counted.startswith(f"{3 * len(kept) - 1} blocks are sound, 1 bad and removed")
    assert not blocks[0].exists()
    row = next(row for row in told(env)["checkpoints"] if row["checkpoint"] == path)
    assert row["length_bytes"] - row["data_bytes"] == 4 * MIB
    done = tinkerfs("cache", "verify", "--json", env=env)
    sound = {"sound_blocks": 3 * len(kept) - 1, "bad_blocks": 0, "bad": []}
    assert json.loads(done.stdout) == sound
    for path in kept:
        assert tinkerfs("prefetch", path, env=env).returncode == 0
    assert len(server.journal.entries("store")) == 1, "what was removed is fetched again"


def test_one_checkpoint_is_cleared_or_all(env, kept):
    done = tinkerfs("cache", "clear", kept[0], env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("9.")
    assert [row["checkpoint"] for row in told(env)["checkpoints"]] == kept[:0:-1]
    assert tinkerfs("cache", "clear", env=env).returncode == 0
    report = told(env)
    assert (report["checkpoints"], report["kept_bytes"]) == ([], 0)


def test_there_may_be_nothing(env, tmp_path):
    none = str(tmp_path / "none")
    assert told(env, "--cache-dir", none)["checkpoints"] == []
    for command in ("verify", "clear"):
        done = tinkerfs("cache", command, "--cache-dir", none, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "none").exists(), "to look makes nothing"


def test_what_cannot_be_done_is_said_in_a_line(env, tmp_path):
    (tmp_path / "file").write_text("")
    for words in (("--cache-dir", str(tmp_path / "file")), (str(tmp_path),), ("tinker://a//b",)):
        done = tinkerfs("cache", "clear", *words, env=env)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_metadata_that_is_spoilt_is_in_nobodys_way(env, kept, tmp_path):
    for path in (tmp_path / ".cache/tinkerfs").glob("metadata.sqlite3*"):
        path.write_bytes(b"spoilt" * 1000)
    assert [row["checkpoint"] for row in told(env)["checkpoints"]] == kept[::-1]
    for command in ("verify", "clear"):
        done = tinkerfs("cache", command, env=env)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_is_in_the_way_is_named(env, kept, tmp_path):
    blocks = tmp_path / ".cache/tinkerfs/blocks"
    blocks.rename(tmp_path / "elsewhere")
    blocks.write_text("")
    for command in ("info", "verify", "clear"):
        done = tinkerfs("cache", command, env=env)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line == f"tinkerfs: the cache {blocks}: Not a directory"


@pytest.mark.parametrize("command", ["info", "verify", "clear"])
def test_help_tells_the_exit_codes_and_what_path_is(command):
    text = " ".join(tinkerfs("cache", command, "--help").stdout.split())
    for words in ("Exits 0", "PATH is a tinker path", "TINKERFS_CACHE_DIR"):
        assert words in text


def test_external_weights_are_told_by_checkpoint_too(env, server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "external_weights/base", size_bytes=5 * MIB)
    path = f"tinker://{run_id}/external_weights/base"
    assert tinkerfs("prefetch", path, env=env).returncode == 0
    [row] = told(env)["checkpoints"]
    assert row["checkpoint"] == path
    assert row["data_bytes"] == row["length_bytes"] > 0
