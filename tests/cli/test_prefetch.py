"""`tinkerfs prefetch` as a subprocess, against a demo server."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.mount import run, tinkerfs, wait_until
from tests.support.server import demo_server
from tests.support.terminal import terminal

__all__ = ["demo_server"]

MIB = 1 << 20
SIZE_BYTES = 30 * MIB
#: Upper bound of the bytes read from the start and end of an archive to index it.
INDEX_BYTES = MIB
BLOCK_BYTES = 4 * MIB
STORE = "GET store/archive"


@pytest.fixture
def server(demo_server):
    """2 runs with 2 checkpoints of 30 MiB."""
    return demo_server(runs=2, checkpoints=2, size_bytes=SIZE_BYTES)


@pytest.fixture
def env(tmp_path, server):
    path = {"PATH": os.environ["PATH"]}
    return {**path, **server.environment, "HOME": str(tmp_path), "LANG": "C.UTF-8"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / ".cache" / "tinkerfs"


def tinker_paths(server, run=0):
    record = server.account.runs()[run]
    return [f"tinker://{record.id}/{checkpoint.id}" for checkpoint in record.checkpoints]


def sent_bytes(server):
    """Return the number of bytes that the store has sent."""
    server.journal.wait_until_idle()
    return sum(entry.sent_bytes for entry in server.journal.entries("store"))


def first_byte(entry):
    return int(entry.range.removeprefix("bytes=").partition("-")[0])


def one_line(done):
    """Return the only error line of a failed command; check for no traceback."""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tinkerfs: ")]
    assert "Traceback" not in done.stderr
    return line


def test_prefetch_downloads_each_byte_once(env, server):
    first = tinker_paths(server)[0]
    server.faults.add(STORE, times=None, latency_s=0.3)  # so that requests overlap
    done = tinkerfs("prefetch", first, env=env)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{first}/adapter_model.safetensors: 30.0 MiB in" in done.stderr
    ranges = [entry.range for entry in server.journal.entries(STORE)]
    assert len(ranges) == len(set(ranges))
    assert SIZE_BYTES <= sent_bytes(server) <= SIZE_BYTES + INDEX_BYTES
    assert 2 <= server.journal.max_in_flight(STORE) <= 8
    server.journal.clear()
    again = tinkerfs("prefetch", first, env=env)
    assert again.returncode == 0
    assert "adapter_model.safetensors: 30.0 MiB, already present" in again.stderr
    assert server.journal.count("store") == server.journal.count("GET archive") == 0


def test_check_sends_no_request_to_store_or_for_archive(env, server):
    first, second = tinker_paths(server)
    for path in (first, f"tinker://{server.account.runs()[0].id}"):
        done = tinkerfs("prefetch", "--check", path, env=env)
        assert done.returncode == 1
        assert f"{first} files/: not cached" in done.stdout
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    server.journal.clear()
    assert tinkerfs("prefetch", "--check", first, env=env).returncode == 0
    done = tinkerfs("prefetch", "--check", "--json", first, second, env=env)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert not report["is_complete"]
    assert report["total_bytes"] is None
    cached, unknown = report["files"][:-1], report["files"][-1]
    assert [row["file"] for row in cached] == [
        "files/adapter_config.json",
        "files/adapter_model.safetensors",
        "files/checkpoint_complete",
    ]
    assert all(row["cached_bytes"] == row["total_bytes"] for row in cached)
    assert sum(row["total_bytes"] for row in cached) == SIZE_BYTES
    assert (unknown["checkpoint"], unknown["cached_bytes"], unknown["total_bytes"]) == (
        second,
        0,
        None,
    )
    assert server.journal.count("store") == server.journal.count("GET archive") == 0


def test_check_with_missing_block_reports_cached_part(env, server, cache):
    first = tinker_paths(server)[0]
    tinkerfs("prefetch", first, env=env)
    [index] = cache.glob("blocks/*/index")
    with index.open("r+b") as file:  # 16 bytes for each of the 16 units of a block
        file.seek(3 * 16 * 16)
        file.write(bytes(16 * 16))
    done = tinkerfs("prefetch", "--check", first, env=env)
    assert done.returncode == 1
    assert done.stdout == f"{first} files/adapter_model.safetensors: 26.0 MiB of 30.0 MiB cached\n"
    server.journal.clear()
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert [entry.range for entry in server.journal.entries(STORE)] == [
        f"bytes={3 * BLOCK_BYTES}-{4 * BLOCK_BYTES - 1}"
    ]


def test_prefetch_of_run_and_checkpoint_downloads_all(env, server):
    run_id = server.account.runs()[0].id
    first, second = tinker_paths(server)
    [other, _] = tinker_paths(server, run=1)
    done = tinkerfs("prefetch", "--json", f"tinker://{run_id}", other, env=env)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert {row["checkpoint"] for row in report["files"]} == {first, second, other}
    assert report["cached_bytes"] == report["total_bytes"] == 3 * SIZE_BYTES
    assert report["is_complete"]
    assert report["errors"] == []


def test_prefetch_of_archive_being_built_reports_the_wait(env, demo_server):
    server = demo_server(runs=1, checkpoints=1, building_polls=2, retry_after="1")
    env |= server.environment
    [first] = tinker_paths(server)
    done = tinkerfs("prefetch", first, env=env)
    assert done.returncode == 0
    assert "waiting for the server to build the archive" in done.stderr
    assert "waited 2s for the archive" in done.stderr
    assert server.journal.count("GET archive") == 3


def test_prefetch_on_terminal_shows_bar_rate_and_time_left(env, tmp_path, demo_server):
    server = demo_server(
        runs=1, checkpoints=1, size_bytes=SIZE_BYTES, building_polls=2, retry_after="1"
    )
    server.faults.add(STORE, times=None, bytes_per_s=2 * MIB)
    env |= server.environment
    [first] = tinker_paths(server)
    command = [sys.executable, "-m", "tinkerfs", "prefetch", first]
    with terminal(command, os.getcwd(), env) as shown:
        shown.wait_for("building an archive, 1s")
        shown.wait_for("waited 2s for the archive")
        shown.wait_for("[#")
        shown.wait_for(" of 30.0 MiB")
        shown.wait_for("MiB/s")
        shown.wait_for("s left")
        shown.wait_for("file 2 of 3: ")
        shown.wait_for("adapter_model.safetensors: 30.0 MiB in ")
        assert shown.end() == 0


def test_prefetch_with_broken_connections_resumes(env, server):
    first = tinker_paths(server)[0]
    server.faults.add(STORE, times=3, after=2, cut_after_bytes=MIB)
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert sent_bytes(server) <= SIZE_BYTES + 2 * INDEX_BYTES
    second = tinker_paths(server)[1]
    server.journal.clear()
    # The first matching request reads the end of the archive for the index.
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    done = tinkerfs("prefetch", "--timeout", "2", second, env=env)
    assert done.returncode == 1
    assert f"{second}/adapter_model.safetensors: " in one_line(done)
    assert "500" in one_line(done)
    first_bytes = sent_bytes(server)
    server.faults.clear()
    assert tinkerfs("prefetch", second, env=env).returncode == 0
    assert SIZE_BYTES <= sent_bytes(server) <= SIZE_BYTES + INDEX_BYTES
    assert first_bytes < SIZE_BYTES


def test_prefetch_of_rebuilt_archive_downloads_new_version(env, server):
    first = tinker_paths(server)[0]
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    assert tinkerfs("prefetch", "--timeout", "1", first, env=env).returncode == 1
    server.faults.clear()
    server.account.runs()[0].checkpoints[0].generation += 1
    done = tinkerfs("prefetch", first, env=env)
    assert (done.returncode, "tinkerfs: " in done.stderr) == (0, False)
    assert tinkerfs("prefetch", "--check", first, env=env).returncode == 0


def cached_bytes(env, path):
    """Return how many bytes of a checkpoint are cached."""
    report = json.loads(tinkerfs("cache", "info", "--json", path, env=env).stdout)
    return sum(row["cached_bytes"] for row in report["checkpoints"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_prefetch_with_signal_exits_and_prints_hint(env, server, cache, number, status):
    first = tinker_paths(server)[0]
    rule = server.faults.add(STORE, times=None, after=5, stall_after_bytes=MIB // 16)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinkerfs", "prefetch", first],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rule.wait_for(5)
    wait_until(lambda: cached_bytes(env, first) == 3 * BLOCK_BYTES)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == status
    assert stderr.splitlines()[-1].startswith("tinkerfs: interrupted (hint: downloaded blocks")
    assert "Traceback" not in stderr
    server.faults.clear()
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_prefetch_with_small_cache_fails_without_eviction(env, server, cache):
    first, second = tinker_paths(server)
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    before = cached_bytes(env, first)
    server.journal.clear()
    done = tinkerfs("prefetch", "--cache-size", "40M", first, second, env=env)
    assert done.returncode == 1
    assert "the weights need 60.3 MiB, but the cache holds at most 40.0 MiB" in one_line(done)
    assert cached_bytes(env, first) == before > 0
    assert sent_bytes(server) <= INDEX_BYTES


def test_prefetch_on_full_disk_prints_one_line(env, server, tmp_path, needs_root):
    small = tmp_path / "small"
    small.mkdir()
    assert run("mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", small).returncode == 0
    try:
        path = tinker_paths(server)[0]
        done = tinkerfs("prefetch", "--cache-dir", small, path, env=env)
    finally:
        assert run("umount", small).returncode == 0
    assert done.returncode == 1
    assert "the block cache cannot take it: its disk is full" in one_line(done)


def test_prefetch_escapes_control_characters_in_names(env, server):
    run_id = server.account.runs()[0].id
    server.account.add_checkpoint(run_id, "weights/\x1b[31mred", size_bytes=MIB)
    path = f"tinker://{run_id}/weights/\x1b[31mblue"
    for options in ((), ("--check",)):
        done = tinkerfs("prefetch", *options, f"tinker://{run_id}", env=env)
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stderr + done.stdout
    assert done.returncode == 0
    done = tinkerfs("prefetch", path, env=env)
    assert done.returncode == 1
    assert "\x1b" not in one_line(done)


def test_prefetch_with_failing_requests_prints_no_secret(env, server, tmp_path):
    first = tinker_paths(server)[0]
    done = tinkerfs("prefetch", f"{first}x", env=env)
    assert done.returncode == 1
    assert f"{first}x: " in one_line(done)
    assert "not found" in one_line(done)
    for path in (tmp_path, "tinker://", "tinker:///x"):
        done = tinkerfs("prefetch", path, env=env)
        assert done.returncode == 1
        assert str(path) in one_line(done)
    done = tinkerfs("prefetch", first, env={**env, "TINKER_API_KEY": "tml-wrong-0123456789"})
    assert done.returncode == 1
    assert "401" in one_line(done)
    assert "0123456789" not in done.stderr
    server.faults.add("GET archive", times=None, status=500, body={"detail": "no such luck"})
    done = tinkerfs("prefetch", "--timeout", "1", first, env=env)
    assert done.returncode == 1
    assert "no such luck" in one_line(done)
    server.faults.clear()
    server.faults.add(STORE, times=None, status=403)
    done = tinkerfs("prefetch", "--json", first, env=env)
    assert done.returncode == 1
    assert "status 403" in one_line(done)
    assert "status 403" in json.loads(done.stdout)["errors"][0]["error"]
    assert "signature" not in (done.stderr + done.stdout).lower()
    server.stop_listening()
    done = tinkerfs("prefetch", "--timeout", "1", first, env=env)
    assert done.returncode == 1
    assert "onnect" in one_line(done)


def test_prefetch_with_one_bad_path_downloads_the_others(env, server):
    first, second = tinker_paths(server)
    done = tinkerfs("prefetch", f"{first}x", second, env=env)
    assert done.returncode == 1
    assert f"{first}x: " in one_line(done)
    assert tinkerfs("prefetch", "--check", second, env=env).returncode == 0
