"""`tinkerfs get` as a real command, against a real server."""

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
    """2 runs of 2 checkpoints of 30 MiB."""
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
    """The run's id, and those of its checkpoints."""
    run = server.account.runs()[run]
    return run.id, [checkpoint.id for checkpoint in run.checkpoints]


def truth(server, run_id, checkpoint_id):
    files = server.files(run_id, checkpoint_id).items()
    return {name: content.read(0, content.size_bytes) for name, content in files}


def found(folder):
    """What is in a folder, but for what is hidden."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def partials(folder):
    return list(folder.glob(".*.partial"))


def sent_bytes(server):
    server.journal.wait_until_idle()
    return sum(entry.sent_bytes for entry in server.journal.entries("store"))


def first_byte(entry):
    return int(entry.range.removeprefix("bytes=").partition("-")[0])


@contextmanager
def started(*arguments, env):
    """The command, under way; killed if it is still there at the end."""
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


def test_the_files_come_whole_with_their_times_and_modes(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    done = run("sh", "-c", f"umask 027; {sys.executable} -m tinkerfs get '{path}' {dest}", env=env)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{dest}/{NAME}: 30.0 MiB in " in done.stderr
    expected = truth(server, run_id, checkpoint)
    assert found(dest) == expected
    assert partials(dest) == []
    archive = server.archive(run_id, checkpoint)
    header = tarfile.TarInfo.frombuf(archive.read(0, 512), "utf-8", "strict")
    for name in expected:
        status = (dest / name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_mtime == header.mtime
    assert sent_bytes(server) <= SIZE_BYTES + INDEX_BYTES


def test_what_is_whole_is_left_alone_and_what_is_another_is_refused(env, server, dest):
    run_id, [first, second] = ids(server)
    assert tinkerfs("get", f"tinker://{run_id}/{first}", dest, env=env).returncode == 0
    server.journal.clear()
    before = (dest / NAME).stat()
    done = tinkerfs("get", "--json", f"tinker://{run_id}/{first}", dest, env=env)
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["is_complete"]
    assert {row["outcome"] for row in told["files"]} == {"there already"}
    assert (dest / NAME).stat() == before
    assert server.journal.count("GET archive") == server.journal.count("store") == 0
    # The same names and lengths, and another checkpoint.
    done = tinkerfs("get", f"tinker://{run_id}/{second}", dest, env=env)
    assert done.returncode == 1
    assert f"{dest}/{NAME}: it is there, and not known to be this one" in done.stderr
    assert found(dest) == truth(server, run_id, first)
    assert tinkerfs("get", "--force", f"tinker://{run_id}/{second}", dest, env=env).returncode == 0
    assert found(dest) == truth(server, run_id, second)
    # A file that somebody touched is not known any more.
    (dest / "adapter_config.json").write_bytes(b"mine")
    done = tinkerfs("get", f"tinker://{run_id}/{second}", dest, env=env)
    assert done.returncode == 1
    assert "adapter_config.json" in one_line(done)
    assert (dest / "adapter_config.json").read_bytes() == b"mine"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_copy_goes_on_from_its_length(env, server, dest, number, status):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    # One request beyond is for the index, whose end is there; the blocks are not sent whole.
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
        _, told = process.communicate(timeout=5)
    assert process.returncode == status
    assert told.splitlines()[-1].startswith("tinkerfs: interrupted: what came is kept beside")
    assert "Traceback" not in told
    assert not (dest / NAME).exists()
    [partial] = partials(dest)
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    kept = partial.stat()
    server.faults.clear()
    done = tinkerfs("get", "--json", path, dest, env=env)
    assert done.returncode == 0
    outcomes = {os.path.basename(r["path"]): r["outcome"] for r in json.loads(done.stdout)["files"]}
    assert outcomes == {
        "adapter_config.json": "there already",
        NAME: "resumed",
        "checkpoint_complete": "copied",
    }
    assert (dest / NAME).stat().st_ino == kept.st_ino, "it went on in the same file"
    assert found(dest) == truth(server, run_id, checkpoint)
    assert partials(dest) == []
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_what_came_of_the_blocks_under_way_is_kept(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    server.faults.add(STORE, times=None, after=2, bytes_per_s=MIB)
    with started("get", path, dest, env=env) as process:
        server.journal.wait_for(8, STORE)
        wait_until(lambda: sum(e.sent_bytes for e in server.journal.entries(STORE)) > 12 * MIB)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
    assert process.returncode == 130
    came = sent_bytes(server)
    server.faults.clear()
    assert tinkerfs("get", path, dest, env=env).returncode == 0
    assert found(dest) == truth(server, run_id, checkpoint)
    assert came > 12 * MIB
    assert sent_bytes(server) <= SIZE_BYTES + BLOCK_BYTES


def test_a_partial_file_of_another_version_is_not_gone_on_with(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    late = {"after": 1, "when": lambda entry: first_byte(entry) >= 3 * BLOCK_BYTES}
    server.faults.add(STORE, times=None, status=500, **late)
    done = tinkerfs("get", "--timeout", "1", path, dest, env=env)
    assert done.returncode == 1
    assert f"{dest}/{NAME}: " in one_line(done)
    assert "goes on from there" in one_line(done)
    [partial] = partials(dest)
    assert partial.stat().st_size >= BLOCK_BYTES
    server.faults.clear()
    [record] = [c for c in server.account.runs()[0].checkpoints if c.id == checkpoint]
    record.generation += 1
    # What is known of it is told from the store's answer, and it begins anew by itself.
    done = tinkerfs("get", "--force", path, dest, env=env)
    assert (done.returncode, one_line_or_none(done)) == (0, None)
    assert found(dest) == truth(server, run_id, checkpoint)
    assert partials(dest) == []


def one_line_or_none(done):
    return next((x for x in done.stderr.splitlines() if x.startswith("tinkerfs: ")), None)


def test_undated_checkpoint_saved_again_is_copied_as_it_is_now(env, server, tmp_path):
    run_id, [name, _] = ids(server)
    for number in range(2):
        server.account.add_checkpoint(run_id, name, time_s=None, size_bytes=MIB)
        dest = tmp_path / str(number)
        assert tinkerfs("get", f"tinker://{run_id}/{name}", dest, env=env).returncode == 0
        assert found(dest) == truth(server, run_id, name)


def test_a_transfer_that_breaks_off_is_taken_up(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    server.faults.add(STORE, times=4, after=2, cut_after_bytes=MIB)
    assert tinkerfs("get", f"tinker://{run_id}/{checkpoint}", dest, env=env).returncode == 0
    assert found(dest) == truth(server, run_id, checkpoint)
    assert sent_bytes(server) <= SIZE_BYTES + 2 * INDEX_BYTES


def test_the_archive_itself(env, server, tmp_path):
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
    folder = tmp_path / "folder"
    folder.mkdir()
    assert tinkerfs("get", "--archive", f"tinker://{run_id}", folder, env=env).returncode == 0
    assert sorted(os.listdir(folder)) == sorted(
        [".tinkerfs-get", *(f"{run_id}@{c.replace('/', '@')}.tar" for c in (first, second))]
    )


def test_all_of_a_run_come_to_a_folder_each(env, server, dest):
    run_id, checkpoints = ids(server)
    assert tinkerfs("get", f"tinker://{run_id}", dest, env=env).returncode == 0
    for checkpoint in checkpoints:
        folder = dest / f"{run_id}@{checkpoint.replace('/', '@')}"
        assert found(folder) == truth(server, run_id, checkpoint)


def test_an_archive_being_built_is_shown_as_that(env, demo_server, dest):
    server = demo_server(runs=1, checkpoints=1, building_polls=2, retry_after="1")
    run_id, [checkpoint] = ids(server)
    env |= server.environment
    done = tinkerfs("get", f"tinker://{run_id}/{checkpoint}", dest, env=env)
    assert done.returncode == 0
    assert "its archive is being built" in done.stderr
    assert "waited 2s for its archive" in done.stderr


def test_a_full_disk_is_said_and_the_partial_stays(env, server, tmp_path, needs_root):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    small = tmp_path / "small"
    small.mkdir()
    assert run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small).returncode == 0
    try:
        done = tinkerfs("get", path, small, env=env)
        assert done.returncode == 1
        assert f"{small}/{NAME}: No space left on device; what came is kept" in one_line(done)
        [partial] = partials(small)
        assert partial.stat().st_size > 8 * MIB
        assert run("mount", "-o", "remount,size=64m", small).returncode == 0
        assert tinkerfs("get", path, small, env=env).returncode == 0
        assert found(small) == truth(server, run_id, checkpoint)
    finally:
        assert run("umount", small).returncode == 0


def test_two_at_once_are_told_apart(env, server, dest):
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
    assert found(dest) == truth(server, run_id, checkpoint)


def test_what_cannot_be_had_is_one_line(env, server, dest, tmp_path):
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
