"""`tinkerfs get` as a subprocess, against a demo server."""

import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
from contextlib import contextmanager

import pytest

from tests.support.mount import run, tinkerfs, wait_until
from tests.support.server import demo_server

__all__ = ["demo_server"]

MIB = 1 << 20
SIZE_BYTES = 30 * MIB
INDEX_BYTES = MIB
BLOCK_BYTES = 4 * MIB
STORE = "GET store/archive"
NAME = "adapter_model.safetensors"


@pytest.fixture
def server(demo_server):
    """2 runs with 2 checkpoints of 30 MiB."""
    return demo_server(runs=2, checkpoints=2, size_bytes=SIZE_BYTES)


@pytest.fixture
def env(tmp_path, server):
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": os.environ["PATH"], **server.environment, "HOME": str(home), "LANG": "C.UTF-8"}


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out"


def ids(server, run=0):
    """Return the id of a run and the ids of its checkpoints."""
    run = server.account.runs()[run]
    return run.id, [checkpoint.id for checkpoint in run.checkpoints]


def expected_files(server, run_id, checkpoint_id):
    files = server.files(run_id, checkpoint_id).items()
    return {name: content.read(0, content.size_bytes) for name, content in files}


def visible_files(directory):
    """Return relative path -> content of the visible files below a directory."""
    paths = [p for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def partials(directory):
    return list(directory.glob(".*.partial"))


def sent_bytes(server):
    server.journal.wait_until_idle()
    return sum(entry.sent_bytes for entry in server.journal.entries("store"))


def first_byte(entry):
    return int(entry.range.removeprefix("bytes=").partition("-")[0])


@contextmanager
def started(*arguments, env):
    """Start the command; kill it at the end of the block if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tinkerfs", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def one_line(done):
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tinkerfs: ")]
    assert "Traceback" not in done.stderr
    return line


def test_get_writes_files_with_their_times_and_modes(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    done = run("sh", "-c", f"umask 027; {sys.executable} -m tinkerfs get '{path}' {dest}", env=env)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{dest}/{NAME}: 30.0 MiB in " in done.stderr
    expected = expected_files(server, run_id, checkpoint)
    assert visible_files(dest) == expected
    assert partials(dest) == []
    archive = server.archive(run_id, checkpoint)
    header = tarfile.TarInfo.frombuf(archive.read(0, 512), "utf-8", "strict")
    for name in expected:
        status = (dest / name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_mtime == header.mtime
    assert sent_bytes(server) <= SIZE_BYTES + INDEX_BYTES


def test_get_with_existing_files_replaces_only_with_force(env, server, dest):
    run_id, [first, second] = ids(server)
    assert tinkerfs("get", f"tinker://{run_id}/{first}", dest, env=env).returncode == 0
    server.journal.clear()
    before = (dest / NAME).stat()
    done = tinkerfs("get", "--json", f"tinker://{run_id}/{first}", dest, env=env)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["is_complete"]
    assert {row["outcome"] for row in report["files"]} == {"already present"}
    assert (dest / NAME).stat() == before
    assert server.journal.count("GET archive") == server.journal.count("store") == 0
    # Another checkpoint, with files of the same names and lengths.
    done = tinkerfs("get", f"tinker://{run_id}/{second}", dest, env=env)
    assert done.returncode == 1
    assert f"{dest}/{NAME}: already exists, and may have other content" in done.stderr
    assert visible_files(dest) == expected_files(server, run_id, first)
    assert tinkerfs("get", "--force", f"tinker://{run_id}/{second}", dest, env=env).returncode == 0
    assert visible_files(dest) == expected_files(server, run_id, second)
    # A file that was modified after the copy is not replaced.
    (dest / "adapter_config.json").write_bytes(b"mine")
    done = tinkerfs("get", f"tinker://{run_id}/{second}", dest, env=env)
    assert done.returncode == 1
    assert "adapter_config.json" in one_line(done)
    assert (dest / "adapter_config.json").read_bytes() == b"mine"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_get_after_interruption_resumes_partial_file(env, server, dest, number, status):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    # The first matching request reads the end of the archive for the index. The requests after
    # it are for blocks, which stall.
    rule = server.faults.add(
        STORE,
        times=None,
        after=1,
        when=lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES,
        stall_after_bytes=MIB // 16,
    )
    with started("get", path, dest, env=env) as process:
        rule.wait_for(1)
        wait_until(lambda: any(each.stat().st_size > 8 * MIB for each in partials(dest)))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=5)
    assert process.returncode == status
    assert stderr.splitlines()[-1].startswith("tinkerfs: interrupted (hint: partial files are")
    assert "Traceback" not in stderr
    assert not (dest / NAME).exists()
    [partial] = partials(dest)
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    partial_stat = partial.stat()
    server.faults.clear()
    done = tinkerfs("get", "--json", path, dest, env=env)
    assert done.returncode == 0
    outcomes = {os.path.basename(r["path"]): r["outcome"] for r in json.loads(done.stdout)["files"]}
    assert outcomes == {
        "adapter_config.json": "already present",
        NAME: "resumed",
        "checkpoint_complete": "copied",
    }
    assert (dest / NAME).stat().st_ino == partial_stat.st_ino, "it resumed in the same file"
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)
    assert partials(dest) == []
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_get_after_interruption_keeps_blocks_in_flight(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    server.faults.add(STORE, times=None, after=2, bytes_per_s=MIB)
    with started("get", path, dest, env=env) as process:
        server.journal.wait_for(8, STORE)
        wait_until(lambda: sum(e.sent_bytes for e in server.journal.entries(STORE)) > 12 * MIB)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
    assert process.returncode == 130
    first_bytes = sent_bytes(server)
    server.faults.clear()
    assert tinkerfs("get", path, dest, env=env).returncode == 0
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)
    assert first_bytes > 12 * MIB
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_get_with_partial_file_of_old_version_restarts(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    done = tinkerfs("get", "--timeout", "1", path, dest, env=env)
    assert done.returncode == 1
    assert f"{dest}/{NAME}: " in one_line(done)
    assert "run the same command again to resume" in one_line(done)
    [partial] = partials(dest)
    assert partial.stat().st_size >= BLOCK_BYTES
    server.faults.clear()
    [record] = [c for c in server.account.runs()[0].checkpoints if c.id == checkpoint]
    record.generation += 1
    # The store's response shows that the partial file is of another version; `get` restarts.
    done = tinkerfs("get", "--force", path, dest, env=env)
    assert (done.returncode, one_line_or_none(done)) == (0, None)
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)
    assert partials(dest) == []


def one_line_or_none(done):
    return next((x for x in done.stderr.splitlines() if x.startswith("tinkerfs: ")), None)


def test_get_of_checkpoint_without_time_copies_the_new_one(env, server, tmp_path):
    run_id, [name, _] = ids(server)
    for number in range(2):
        server.account.add_checkpoint(run_id, name, time_s=None, size_bytes=MIB)
        dest = tmp_path / str(number)
        assert tinkerfs("get", f"tinker://{run_id}/{name}", dest, env=env).returncode == 0
        assert visible_files(dest) == expected_files(server, run_id, name)


def test_get_with_broken_connections_resumes_transfers(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    server.faults.add(STORE, times=4, after=2, cut_after_bytes=MIB)
    assert tinkerfs("get", f"tinker://{run_id}/{checkpoint}", dest, env=env).returncode == 0
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)
    assert sent_bytes(server) <= SIZE_BYTES + 2 * INDEX_BYTES


def test_get_archive_copies_tar_files(env, server, tmp_path):
    run_id, [first, second] = ids(server)
    tar = tmp_path / "made" / "checkpoint.tar"
    path = f"tinker://{run_id}/{first}"
    assert tinkerfs("get", "--archive", path, tar, env=env).returncode == 0
    content = server.archive(run_id, first)
    assert tar.read_bytes() == content.read(0, content.size_bytes)
    assert tinkerfs("get", "--archive", path, tar, env=env).returncode == 0
    done = tinkerfs("get", "--archive", f"tinker://{run_id}/{second}", tar, env=env)
    assert done.returncode == 1
    assert str(tar) in one_line(done)
    directory = tmp_path / "directory"
    directory.mkdir()
    assert tinkerfs("get", "--archive", f"tinker://{run_id}", directory, env=env).returncode == 0
    assert sorted(os.listdir(directory)) == sorted(
        [".tinkerfs-get", *(f"{run_id}@{c.replace('/', '@')}.tar" for c in (first, second))]
    )


def test_get_of_run_makes_one_directory_per_checkpoint(env, server, dest):
    run_id, checkpoints = ids(server)
    assert tinkerfs("get", f"tinker://{run_id}", dest, env=env).returncode == 0
    for checkpoint in checkpoints:
        directory = dest / f"{run_id}@{checkpoint.replace('/', '@')}"
        assert visible_files(directory) == expected_files(server, run_id, checkpoint)


def test_get_of_archive_being_built_reports_the_wait(env, demo_server, dest):
    server = demo_server(runs=1, checkpoints=1, building_polls=2, retry_after="1")
    run_id, [checkpoint] = ids(server)
    env |= server.environment
    done = tinkerfs("get", f"tinker://{run_id}/{checkpoint}", dest, env=env)
    assert done.returncode == 0
    assert "waiting for the server to build the archive" in done.stderr
    assert "waited 2s for the archive" in done.stderr


def test_get_on_full_disk_fails_and_keeps_partial_file(env, server, tmp_path, needs_root):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    small = tmp_path / "small"
    small.mkdir()
    assert run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small).returncode == 0
    try:
        done = tinkerfs("get", path, small, env=env)
        assert done.returncode == 1
        assert f"{small}/{NAME}: No space left on device (hint: partial files are" in one_line(done)
        [partial] = partials(small)
        assert partial.stat().st_size > 8 * MIB
        assert run("mount", "-o", "remount,size=64m", small).returncode == 0
        assert tinkerfs("get", path, small, env=env).returncode == 0
        assert visible_files(small) == expected_files(server, run_id, checkpoint)
    finally:
        assert run("umount", small).returncode == 0


def test_get_while_another_get_writes_fails(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    rule = server.faults.add(STORE, times=None, after=4, hang=True)
    with started("get", path, dest, env=env) as first:
        rule.wait_for(1)
        wait_until(lambda: any(NAME in each.name for each in partials(dest)))
        done = tinkerfs("get", path, dest, env=env)
        assert done.returncode == 1
        assert "another process is writing it" in one_line(done)
        server.faults.clear()
        assert first.wait(20) == 0
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)


def test_get_that_cannot_rename_a_file_fails(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    rule = server.faults.add(STORE, times=None, after=4, hang=True)
    with started("get", "--json", path, dest, env=env) as get:
        rule.wait_for(1)
        wait_until(lambda: any(NAME in each.name for each in partials(dest)))
        (dest / NAME).mkdir()
        server.faults.clear()
        output, message = get.communicate(timeout=20)
    assert get.returncode == 1
    report = json.loads(output)
    assert not report["is_complete"]
    assert [each["path"] for each in report["errors"]] == [f"{dest}/{NAME}"]
    assert f"tinkerfs: {dest}/{NAME}: Is a directory" in message
    (dest / NAME).rmdir()
    assert tinkerfs("get", path, dest, env=env).returncode == 0
    assert visible_files(dest) == expected_files(server, run_id, checkpoint)


def test_get_with_failing_requests_prints_one_line(env, server, dest, tmp_path):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    done = tinkerfs("get", f"{path}x", dest, env=env)
    assert done.returncode == 1
    assert "not found" in one_line(done)
    assert not dest.exists()
    done = tinkerfs("get", path, dest, env={**env, "TINKER_API_KEY": "tml-wrong-0123456789"})
    assert done.returncode == 1
    assert "401" in one_line(done)
    assert "0123456789" not in done.stderr
    server.faults.add("GET archive", times=None, status=500, body={"detail": "no such luck"})
    done = tinkerfs("get", "--timeout", "1", path, dest, env=env)
    assert done.returncode == 1
    assert "no such luck" in one_line(done)
    server.faults.clear()
    (tmp_path / "file").write_bytes(b"")
    done = tinkerfs("get", path, tmp_path / "file", env=env)
    assert done.returncode == 1
    assert str(tmp_path / "file") in one_line(done)
    server.stop_listening()
    done = tinkerfs("get", "--timeout", "1", path, dest, env=env)
    assert done.returncode == 1
    assert "onnect" in one_line(done)
