"""`tinkerfs prefetch` as a real command, against a real server."""

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
#: An archive's start and end are asked for to tell what is in it.
INDEX_BYTES = MIB
BLOCK_BYTES = 4 * MIB
STORE = "GET store/archive"


@pytest.fixture
def server(demo_server):
    """2 runs of 2 checkpoints of 30 MiB."""
    return demo_server(runs=2, checkpoints=2, size_bytes=SIZE_BYTES)


@pytest.fixture
def env(tmp_path, server):
    kept = {name: os.environ[name] for name in ("PATH",)}
    return {**kept, **server.environment, "HOME": str(tmp_path), "LANG": "C.UTF-8"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / ".cache" / "tinkerfs"


def tinker_paths(server, run=0):
    found = server.account.runs()[run]
    return [f"tinker://{found.id}/{checkpoint.id}" for checkpoint in found.checkpoints]


def sent_bytes(server):
    """What the store handed out."""
    server.journal.wait_until_idle()
    return sum(entry.sent_bytes for entry in server.journal.entries("store"))


def first_byte(entry):
    return int(entry.range.removeprefix("bytes=").partition("-")[0])


def one_line(done):
    """The one line of a failure, without a traceback."""
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tinkerfs: ")]
    assert "Traceback" not in done.stderr
    return line


def test_each_byte_is_fetched_once_and_then_all_is_there(env, server):
    first = tinker_paths(server)[0]
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
    assert "adapter_model.safetensors: 30.0 MiB, there already" in again.stderr
    assert server.journal.count("store") == server.journal.count("GET archive") == 0


def test_check_asks_no_store_and_for_no_archive(env, server):
    first, second = tinker_paths(server)
    for path in (first, f"tinker://{server.account.runs()[0].id}"):
        done = tinkerfs("prefetch", "--check", path, env=env)
        assert done.returncode == 1
        assert f"{first} files/: nothing is kept of it" in done.stdout
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    server.journal.clear()
    assert tinkerfs("prefetch", "--check", first, env=env).returncode == 0
    done = tinkerfs("prefetch", "--check", "--json", first, second, env=env)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert not told["is_complete"]
    assert told["total_bytes"] is None
    whole, unknown = told["files"][:-1], told["files"][-1]
    assert [row["file"] for row in whole] == [
        "files/adapter_config.json",
        "files/adapter_model.safetensors",
        "files/checkpoint_complete",
    ]
    assert all(row["kept_bytes"] == row["total_bytes"] for row in whole)
    assert sum(row["total_bytes"] for row in whole) == SIZE_BYTES
    assert (unknown["checkpoint"], unknown["kept_bytes"], unknown["total_bytes"]) == (
        second,
        0,
        None,
    )
    assert server.journal.count("store") == server.journal.count("GET archive") == 0


def test_check_finds_a_block_that_is_gone(env, server, cache):
    first = tinker_paths(server)[0]
    tinkerfs("prefetch", first, env=env)
    [block] = cache.glob("blocks/*/3")
    block.unlink()
    done = tinkerfs("prefetch", "--check", first, env=env)
    assert done.returncode == 1
    assert done.stdout == f"{first} files/adapter_model.safetensors: 26.0 MiB of 30.0 MiB\n"
    server.journal.clear()
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert [entry.range for entry in server.journal.entries(STORE)] == [
        f"bytes={3 * BLOCK_BYTES}-{4 * BLOCK_BYTES - 1}"
    ]


def test_one_file_and_the_archive_and_all_of_a_run(env, server):
    run_id = server.account.runs()[0].id
    first, second = tinker_paths(server)
    [other, _] = tinker_paths(server, run=1)
    done = tinkerfs("prefetch", "--json", f"tinker://{run_id}", other, env=env)
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert {row["checkpoint"] for row in told["files"]} == {first, second, other}
    assert told["kept_bytes"] == told["total_bytes"] == 3 * SIZE_BYTES
    assert told["is_complete"]
    assert told["errors"] == []


def test_an_archive_being_built_is_shown_as_that(env, demo_server):
    server = demo_server(runs=1, checkpoints=1, building_polls=2, retry_after="1")
    env |= server.environment
    [first] = tinker_paths(server)
    done = tinkerfs("prefetch", first, env=env)
    assert done.returncode == 0
    assert "its archive is being built" in done.stderr
    assert "waited 2s for its archive" in done.stderr
    assert server.journal.count("GET archive") == 3


def test_a_terminal_has_a_bar_with_rate_and_time_left(env, tmp_path, demo_server):
    server = demo_server(
        runs=1, checkpoints=1, size_bytes=SIZE_BYTES, building_polls=2, retry_after="1"
    )
    server.faults.add(STORE, times=None, bytes_per_s=2 * MIB)
    env |= server.environment
    [first] = tinker_paths(server)
    command = [sys.executable, "-m", "tinkerfs", "prefetch", first]
    with terminal(command, os.getcwd(), env) as shown:
        shown.wait_for("an archive is being built, 1s")
        shown.wait_for("waited 2s for its archive")
        shown.wait_for("[#")
        shown.wait_for(" of 30.0 MiB")
        shown.wait_for("MiB/s")
        shown.wait_for("s left")
        shown.wait_for("file 2 of 3: ")
        shown.wait_for("adapter_model.safetensors: 30.0 MiB in ")
        assert shown.end() == 0


def test_what_breaks_off_is_taken_up_and_a_later_run_goes_on(env, server):
    first = tinker_paths(server)[0]
    server.faults.add(STORE, times=3, after=2, cut_after_bytes=MIB)
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert sent_bytes(server) <= SIZE_BYTES + 2 * INDEX_BYTES
    second = tinker_paths(server)[1]
    server.journal.clear()
    # One request beyond is for the index, whose end is there.
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    done = tinkerfs("prefetch", "--timeout", "2", second, env=env)
    assert done.returncode == 1
    assert f"{second}/adapter_model.safetensors: " in one_line(done)
    assert "500" in one_line(done)
    came = sent_bytes(server)
    server.faults.clear()
    assert tinkerfs("prefetch", second, env=env).returncode == 0
    assert SIZE_BYTES <= sent_bytes(server) <= SIZE_BYTES + INDEX_BYTES
    assert came < SIZE_BYTES


def test_an_archive_that_was_built_anew_is_fetched_anew(env, server):
    first = tinker_paths(server)[0]
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    assert tinkerfs("prefetch", "--timeout", "1", first, env=env).returncode == 1
    server.faults.clear()
    server.account.runs()[0].checkpoints[0].generation += 1
    done = tinkerfs("prefetch", first, env=env)
    assert (done.returncode, "tinkerfs: " in done.stderr) == (0, False)
    assert tinkerfs("prefetch", "--check", first, env=env).returncode == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_it_at_once_and_says_how_to_go_on(env, server, cache, number, status):
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
    wait_until(lambda: len(list(cache.glob("blocks/*/[0-9]*"))) == 3)
    process.send_signal(number)
    _, told = process.communicate(timeout=5)
    assert process.returncode == status
    assert told.splitlines()[-1].startswith("tinkerfs: interrupted: what came is kept")
    assert "Traceback" not in told
    server.faults.clear()
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_a_cache_too_small_says_so_and_evicts_nothing(env, server, cache):
    first, second = tinker_paths(server)
    assert tinkerfs("prefetch", first, env=env).returncode == 0
    kept = sorted(cache.glob("blocks/*/[0-9]*"))
    server.journal.clear()
    done = tinkerfs("prefetch", "--cache-size", "40M", first, second, env=env)
    assert done.returncode == 1
    assert "these are 60.1 MiB, and the cache takes 40.0 MiB" in one_line(done)
    assert sorted(cache.glob("blocks/*/[0-9]*")) == kept
    assert sent_bytes(server) <= INDEX_BYTES


def test_a_disk_too_full_for_the_cache_is_said_once(env, server, tmp_path, needs_root):
    small = tmp_path / "small"
    small.mkdir()
    assert run("mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", small).returncode == 0
    try:
        path = tinker_paths(server)[0]
        done = tinkerfs("prefetch", "--cache-dir", small, path, env=env)
    finally:
        assert run("umount", small).returncode == 0
    assert done.returncode == 1
    assert "the block cache does not take it: its disk is full" in one_line(done)


def test_names_do_no_harm_to_a_terminal(env, server):
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


def test_what_cannot_be_had_is_one_line_and_no_secret(env, server, tmp_path):
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
    assert "answered 403" in one_line(done)
    assert "answered 403" in json.loads(done.stdout)["errors"][0]["error"]
    assert "signature" not in (done.stderr + done.stdout).lower()
    server.stop_listening()
    done = tinkerfs("prefetch", "--timeout", "1", first, env=env)
    assert done.returncode == 1
    assert "onnect" in one_line(done)


def test_one_that_fails_does_not_keep_the_others_out(env, server):
    first, second = tinker_paths(server)
    done = tinkerfs("prefetch", f"{first}x", second, env=env)
    assert done.returncode == 1
    assert f"{first}x: " in one_line(done)
    assert tinkerfs("prefetch", "--check", second, env=env).returncode == 0
