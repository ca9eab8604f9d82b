"""The commands `tinkerfs cache`, on a cache that `tinkerfs prefetch` filled."""

import json
import os
import re
import sys

import pytest

from tests.support.mount import run, tinkerfs
from tests.support.server import demo_server

__all__ = ["demo_server"]

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def server(demo_server):
    """2 runs with 2 checkpoints of 9 MiB, which is 3 blocks."""
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
def cached(env, server):
    """The tinker paths of the prefetched checkpoints, in order of their prefetch."""
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


def cache_info(env, *arguments):
    done = tinkerfs("cache", "info", "--json", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_info_shows_size_and_age_of_each_checkpoint(env, cached, server):
    report = cache_info(env)
    assert [row["checkpoint"] for row in report["checkpoints"]] == cached[::-1]
    for row in report["checkpoints"]:
        assert 9 * MIB <= row["disk_bytes"] < 10 * MIB
        assert row["cached_bytes"] == row["total_bytes"], "the whole checkpoint is cached"
        assert 0 <= row["accessed_s_ago"] <= row["downloaded_s_ago"] < 600
        assert not row["is_open"]
    assert report["disk_bytes"] == sum(row["disk_bytes"] for row in report["checkpoints"])
    assert report["max_bytes"] == 10 << 30
    assert report["metadata_bytes"] > 0
    text = tinkerfs("cache", "info", env=env).stdout
    assert "of at most 10.0 GiB" in text
    assert all(path in text for path in cached)
    assert not server.journal.entries(), "info sends no request"


def test_info_with_tinker_path_selects_checkpoint_or_run(env, cached):
    [row] = cache_info(env, cached[0])["checkpoints"]
    assert row["checkpoint"] == cached[0]
    run = "/".join(cached[0].split("/")[:3])
    of_run = [row["checkpoint"] for row in cache_info(env, run)["checkpoints"]]
    assert sorted(of_run) == sorted(path for path in cached if path.startswith(f"{run}/"))
    assert cache_info(env, cached[0][:-1])["checkpoints"] == [], "a prefix of a name does not match"


def test_verify_with_corrupt_block_removes_it(env, cached, tmp_path, server):
    done = tinkerfs("cache", "verify", env=env)
    assert done.returncode == 0
    assert re.fullmatch(r"[\d.]+ MiB intact\n", done.stdout)
    intact_bytes = sum(row["cached_bytes"] for row in cache_info(env)["checkpoints"])
    [data, *_] = sorted((tmp_path / ".cache/tinkerfs/blocks").glob("*/1"))
    with data.open("r+b") as file:
        file.seek(1 * MIB)
        byte = file.read(1)
        file.seek(1 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    done = tinkerfs("cache", "verify", env=env)
    assert done.returncode == 1
    line, summary = done.stdout.splitlines()
    part = f"bytes {1 * MIB} to {1 * MIB + 256 * KIB}"
    [path] = [path for path in cached if line == f"corrupt: {path} archive, {part}"]
    assert "; 256.0 KiB removed, to be downloaded again" in summary
    row = next(row for row in cache_info(env)["checkpoints"] if row["checkpoint"] == path)
    assert row["total_bytes"] - row["cached_bytes"] == 256 * KIB
    done = tinkerfs("cache", "verify", "--json", env=env)
    expected = {"intact_bytes": intact_bytes - 256 * KIB, "corrupt": []}
    assert json.loads(done.stdout) == expected
    for path in cached:
        assert tinkerfs("prefetch", path, env=env).returncode == 0
    assert len(server.journal.entries("store")) == 1, "only one block is downloaded again"


def test_clear_with_and_without_path_removes_one_and_all(env, cached):
    done = tinkerfs("cache", "clear", cached[0], env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("9.")
    assert [row["checkpoint"] for row in cache_info(env)["checkpoints"]] == cached[:0:-1]
    assert tinkerfs("cache", "clear", env=env).returncode == 0
    report = cache_info(env)
    assert (report["checkpoints"], report["disk_bytes"]) == ([], 0)


def test_clear_removes_the_index_of_the_archive(env, cached, server, tmp_path):
    def requests_of_prefetch(*arguments):
        server.journal.clear()
        assert tinkerfs("prefetch", *arguments, env=env).returncode == 0
        return len(server.journal.entries("store"))

    in_empty_cache = requests_of_prefetch(cached[0], "--cache-dir", str(tmp_path / "empty"))
    tinkerfs("cache", "clear", cached[0], env=env)
    assert requests_of_prefetch(cached[0]) == in_empty_cache, "the index is requested again"
    assert requests_of_prefetch(*cached) == 0, "of the other checkpoints nothing was removed"


def test_cache_commands_without_cache_succeed(env, tmp_path):
    missing = str(tmp_path / "missing")
    assert cache_info(env, "--cache-dir", missing)["checkpoints"] == []
    for command in ("verify", "clear"):
        done = tinkerfs("cache", command, "--cache-dir", missing, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "missing").exists(), "the commands create no directory"


def test_clear_with_invalid_path_prints_one_line(env, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (
        ("--cache-dir", str(tmp_path / "file")),
        (str(tmp_path),),
        ("tinker://a//b",),
    ):
        done = tinkerfs("cache", "clear", *arguments, env=env)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_cache_commands_with_corrupt_metadata_succeed(env, cached, tmp_path):
    for path in (tmp_path / ".cache/tinkerfs").glob("metadata.sqlite3*"):
        path.write_bytes(b"corrupt" * 1000)
    assert [row["checkpoint"] for row in cache_info(env)["checkpoints"]] == cached[::-1]
    done = tinkerfs("cache", "verify", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    done = tinkerfs("cache", "clear", env=env)
    assert done.returncode == 0
    assert "metadata.sqlite3 is not readable and is created again" in done.stderr


def test_cache_commands_with_file_as_directory_name_it(env, cached, tmp_path):
    blocks = tmp_path / ".cache/tinkerfs/blocks"
    blocks.rename(tmp_path / "elsewhere")
    blocks.write_text("")
    for command in ("info", "verify", "clear"):
        done = tinkerfs("cache", command, env=env)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line == f"tinkerfs: the cache {blocks}: Not a directory"


@pytest.mark.parametrize("command", ["info", "verify", "clear"])
def test_cache_help_explains_exit_codes_and_path(command):
    text = " ".join(tinkerfs("cache", command, "--help").stdout.split())
    for phrase in ("Exits 0", "PATH is a tinker path", "TINKERFS_CACHE_DIR"):
        assert phrase in text


def test_info_and_clear_include_traces_of_sessions(env, server):
    session_id = server.account.session_ids()[0]
    code = "import fsspec, sys; print(len(fsspec.filesystem('tinker').cat_file(sys.argv[1])))"
    path = f"tinker://sessions/{session_id}/trace.pftrace"
    done = run(sys.executable, "-c", code, path, env=env)
    assert done.returncode == 0, done
    [row] = cache_info(env)["checkpoints"]
    assert row["checkpoint"] == f"session {session_id}"
    size_bytes = server.trace(session_id).size_bytes
    assert (int(done.stdout), row["cached_bytes"], row["total_bytes"]) == (size_bytes,) * 3
    assert tinkerfs("cache", "clear", env=env).returncode == 0
    assert cache_info(env)["checkpoints"] == []
    again = run(sys.executable, "-c", code, path, env=env)
    assert again.stdout == done.stdout, again


def test_info_lists_external_weights_by_checkpoint(env, server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "external_weights/base", size_bytes=5 * MIB)
    path = f"tinker://{run_id}/external_weights/base"
    assert tinkerfs("prefetch", path, env=env).returncode == 0
    [row] = cache_info(env)["checkpoints"]
    assert row["checkpoint"] == path
    assert row["cached_bytes"] == row["total_bytes"] > 0
