"""The control `export` on real mounts: a server without archives exports checkpoints."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from tests.support.account import Account, account, every_binding, make_account, mounted, new_run
from tests.support.faulty_server import FaultyServer
from tests.support.mount import BINDINGS, ROOT, force_unmount, tinkerfs, wait_until
from tinkerfs.demo.exports import ExportOptions

__all__ = ["make_account"]


@pytest.fixture(scope="module")
def account(make_account):  # noqa: F811
    """An account at a service without archives."""
    return make_account(
        runs=1, checkpoints=1, profile="official-0.36", settings={"archive_timeout_s": 20.0}
    )


@pytest.fixture
def directory(account):
    """Return the directory of a training checkpoint; the options are reset after the test."""
    run = account.new_run("weights/1")
    yield f"{run}/checkpoints/weights/1"
    options(account, **dataclasses.asdict(ExportOptions()))
    account.server.faults.clear()


def options(account, **values):
    for name, value in values.items():
        setattr(account.server.behaviour.exports, name, value)


def last_session(account):
    """Return the status of the newest session of an export."""
    ids = [each for each in account.server.account.session_ids() if each.startswith("export-")]
    newest = max(ids, key=lambda each: int(each.rpartition("-")[2]))
    return account.server.account.session(newest).status


def test_written_duration_exports_the_checkpoint(account, directory):
    done = account.sh(f"echo 1h > {directory}/export && cat {directory}/export")
    assert done.returncode == 0, done
    assert done.stdout.startswith("tinker://export-session-"), done
    assert last_session(account)["reason"] == {"type": "success"}
    run_id = directory.split("/")[1]
    files = account.root / directory / "files"
    expected = account.server.files(run_id, "weights/1")
    assert set(os.listdir(files)) == set(expected)
    for name, content in expected.items():
        assert (files / name).read_bytes() == content.read(0, content.size_bytes)
    with safe_open(files / "adapter_model.safetensors", framework="np") as weights:
        tensors = json.loads((account.root / directory / "tensors.json").read_text())["tensors"]
        assert set(weights.keys()) == set(tensors)
    assert f"/{directory}/export\texport for 3600 s\t" in account.changes()


@every_binding
def test_tar_and_cp_read_the_archive_of_an_export(make_account, tmp_path):
    account = make_account(runs=1, checkpoints=1, profile="official-0.36")
    directory = f"{account.new_run('weights/1')}/checkpoints/weights/1"
    done = account.sh(f"echo 1h > {directory}/export && ls -lL {directory}/archive.tar")
    assert done.returncode == 0, done
    out = tmp_path / "out"
    out.mkdir()
    script = f"""
        set -e
        cd {directory}
        cp archive.tar {out}/copy.tar
        stat -Lc %s archive.tar
        tar xf archive.tar -C {out}
        tar tvf archive.tar --full-time --utc --numeric-owner
        diff -r --exclude=copy.tar files/ {out}
        tar tf {out}/copy.tar | sort | diff - <(ls files/)
        tail -c 10240 archive.tar | cmp - <(tail -c 10240 {out}/copy.tar)
        rsync -L archive.tar {out}/again.tar && cmp {out}/copy.tar {out}/again.tar
    """
    done = account.sh(script)
    assert (done.returncode, done.stderr) == (0, ""), done
    size, *listed = done.stdout.splitlines()
    assert int(size) == (out / "copy.tar").stat().st_size
    expected = account.server.files(directory.split("/")[1], "weights/1")
    assert len(listed) == len(expected)
    saved_at = time.strftime(
        "%Y-%m-%d %H:%M", time.gmtime((account.root / directory).stat().st_mtime)
    )
    for line in listed:
        mode, owner, size, *when, name = line.split()
        assert (mode, owner) == ("-rw-r--r--", "0/0")
        assert int(size) == expected[name].size_bytes
        assert " ".join(when).startswith(saved_at)


def test_prefetch_and_get_read_an_export(account, directory, tmp_path):
    def command(name, *arguments):
        return tinkerfs(name, account.root / directory, *arguments, env=env)

    env = {**os.environ, **account.server.environment, "HOME": str(tmp_path)}
    refused = command("get", tmp_path / "copy")
    assert refused.returncode == 1
    assert "`echo 1h > export`" in refused.stderr
    account.sh(f"echo 1h > {directory}/export")
    prefetched = command("prefetch")
    assert prefetched.returncode == 0, prefetched
    account.server.journal.clear()
    copied = command("get", tmp_path / "copy")
    assert copied.returncode == 0, copied
    assert account.server.journal.count("store") == 0, "the mount and the command share the cache"
    for name, content in account.server.files(directory.split("/")[1], "weights/1").items():
        assert (tmp_path / "copy" / name).read_bytes() == content.read(0, content.size_bytes)


def test_look_at_export_costs_no_request(account, directory):
    account.sh(f"ls -l {directory}")
    account.server.journal.clear()
    done = account.sh(f"ls -l {directory}; cat {directory}/export; grep -r none {directory}/export")
    assert done.stdout.count("none") == 2
    assert account.server.journal.count("api") == 0


def test_refused_listing_says_how_to_export(account, directory):
    done = account.sh(f"ls {directory}/files/")
    assert "Operation not supported" in done.stderr
    assert "`echo 1h > export`" in account.errors().splitlines()[-1]


@every_binding
def test_ctrl_c_leaves_the_export_running(make_account):
    account = make_account(runs=1, checkpoints=1, profile="official-0.36")
    directory = f"{account.new_run('weights/1')}/checkpoints/weights/1"
    options(account, load_s=1.5, queue_state="paused_capacity")
    process = account.start("bash", "-c", f"echo 1h > {directory}/export")
    path = account.root / directory / "export"
    wait_until(lambda: "waiting for capacity" in path.read_text())
    stats = json.loads((account.root / ".tinkerfs/stats.json").read_text())
    assert [each for each in stats["pending"] if "waiting for capacity" in each["what"]]
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - started < 1.0
    assert process.returncode != 0
    assert path.read_text().startswith("exporting: ")
    wait_until(lambda: path.read_text().startswith("tinker://"))
    assert "done (its caller: EINTR)" in account.changes()


def test_concurrent_writers_share_an_export(account, directory):
    options(account, load_s=0.4)
    done = account.sh(
        f"for n in 1 2 3; do echo 1h > {directory}/export & done; wait; cat {directory}/export"
    )
    assert done.stdout.startswith("tinker://"), done
    assert account.server.journal.count("POST create_session") == 1


@pytest.mark.parametrize(
    ("endpoint", "status", "message"),
    [
        ("POST create_session", 403, "Permission denied"),
        ("POST create_session", 402, "Disk quota exceeded"),
        ("POST load_weights", 422, "Invalid argument"),
        ("POST retrieve_future", 402, "Disk quota exceeded"),
        ("POST save_weights_external", 403, "Permission denied"),
    ],
)
def test_failure_of_a_step_is_reported(account, directory, endpoint, status, message):
    account.server.faults.add(
        endpoint, times=None, status=status, body={"detail": "the words of the service"}
    )
    done = account.sh(f"echo 1h > {directory}/export; cat {directory}/export")
    assert message in done.stderr, done
    assert done.stdout == "failed: the words of the service\n"
    assert "the words of the service" in account.errors().splitlines()[-1]
    assert "the words of the service" in account.changes().splitlines()[-1]
    if endpoint != "POST create_session":
        assert last_session(account)["reason"] == {"type": "errored"}
    account.server.faults.clear()
    assert account.sh(f"echo 1h > {directory}/export").returncode == 0


def test_retired_base_model_is_reported(account, directory):
    run_id = directory.split("/")[1]
    base_model = account.server.account.run(run_id).base_model
    options(account, retired_models=frozenset({base_model}))
    done = account.sh(f"echo 1h > {directory}/export; cat {directory}/export")
    assert "Invalid argument" in done.stderr
    assert f"{base_model} was retired" in done.stdout


def test_missing_capacity_ends_with_the_archive_timeout(make_account):
    account = make_account(
        runs=1, checkpoints=1, profile="official-0.36", settings={"archive_timeout_s": 1.0}
    )
    directory = f"{account.new_run('weights/1')}/checkpoints/weights/1"
    options(account, load_s=600.0, queue_state="paused_capacity")
    done = account.sh(f"echo 1h > {directory}/export; cat {directory}/export")
    assert "Connection timed out" in done.stderr, done
    assert "waiting for capacity" in done.stdout
    assert last_session(account)["reason"] == {"type": "errored"}


def test_never_deletes_the_export(account, directory):
    script = f"cd {directory} && echo 1h > export && echo never > export && cat export"
    assert account.sh(script).stdout == "none\n"
    assert account.server.journal.count("DELETE checkpoint") == 1


def test_removal_deletes_a_checkpoint_with_an_export(account, directory):
    run = directory.partition("/checkpoints")[0]
    done = account.sh(f"echo 1h > {directory}/export; ls -l {directory}; rm -r {directory}")
    assert done.returncode == 0, done
    assert account.checkpoint_ids(run) == set()


def test_read_only_mount_starts_no_export(make_account):
    account = make_account(
        runs=1, checkpoints=1, profile="official-0.36", settings={"read_only": True}
    )
    run_id = new_run(account.server, "weights/1")
    path = f"runs/{run_id}/checkpoints/weights/1/export"
    done = account.sh(f"cat {path}; echo 1h > {path}")
    assert "Read-only file system" in done.stderr
    assert done.stdout == "none\n"
    assert not account.server.journal.count("POST create_session")


def exporting(server, directory, path):
    """Mount, start an export of 10 minutes, and return the process of the mount."""
    environment = {"TINKERFS_FUSE_BINDING": BINDINGS[-1], "HOME": str(directory)}
    root, cache_dir = directory / "mnt", directory / "cache"
    root.mkdir()
    cache_dir.mkdir(mode=0o700)
    settings = {"base_url": server.base_url, "cache_dir": str(cache_dir)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.account", str(root), json.dumps(settings)],
        cwd=ROOT,
        env=os.environ | environment | server.environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    server.behaviour.exports.load_s = 600.0
    writer = Account(server, root).start("bash", "-c", f"echo 1h > {path}")
    wait_until(lambda: (root / path).read_text().startswith("exporting: loading weights"))
    return process, writer


@pytest.fixture
def lone(tmp_path):
    """Return a server without archives, and the path of a checkpoint's export."""
    with FaultyServer(
        runs=1, checkpoints=1, profile="official-0.36", exports=ExportOptions()
    ) as server:
        run_id = new_run(server, "weights/1")
        yield server, f"runs/{run_id}/checkpoints/weights/1/export"
        force_unmount(str(tmp_path / "mnt"))


def test_next_mount_finds_the_export_of_a_killed_one(lone, tmp_path):
    server, path = lone
    process, writer = exporting(server, tmp_path, path)
    process.kill()
    process.wait(10)
    process.stdout.close()
    writer.communicate(timeout=10)
    force_unmount(str(tmp_path / "mnt"))
    server.behaviour.exports.load_s = 0.0
    with mounted(server, tmp_path, BINDINGS[-1]) as root:
        assert (root / path).read_text() == "failed: the process that exported was killed\n"
        (root / path).write_text("1h")
        assert (root / path).read_text().startswith("tinker://")


def test_unmount_finishes_the_session_of_an_export(lone, tmp_path):
    server, path = lone
    process, writer = exporting(server, tmp_path, path)
    process.terminate()
    assert process.wait(10) == 0
    process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        writer.communicate(timeout=5)
    assert writer.returncode != 0
    assert last_session(Account(server, tmp_path))["reason"] == {"type": "interrupted"}


def test_demo_of_a_service_without_archives_shows_exports(mountpoint, tmp_path):
    command = [sys.executable, "-m", "tinkerfs", "demo", "--profile=official-0.36", mountpoint]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        tour = ""
        for line in process.stdout:
            tour += line
            if "Ctrl-C" in line:
                break
        assert "echo 1h > checkpoints/weights/" in tour
        paths = list(mountpoint.glob("runs/*/checkpoints/weights/*/export"))
        assert {path.read_text() for path in paths} == {"none\n"}
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


#: Maps a file, and prints 4 KiB from each offset that it reads. It is a process of its own, because
#: a page fault holds the interpreter's lock, which the server needs.
MAPPED = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
mapped.madvise(mmap.MADV_RANDOM)
for line in sys.stdin:
    offset = int(line)
    print(mapped[offset : offset + 4096].hex(), flush=True)
"""


def test_mapped_file_outlives_the_duration_of_its_export(tmp_path):
    offset_file, name = tmp_path / "offset", "adapter_model.safetensors"

    def offset_s():
        return float(offset_file.read_text())

    def advance(seconds):
        # Replaced at once, because the mount reads it at any time.
        new = tmp_path / "new offset"
        new.write_text(str(offset_s() + seconds))
        new.replace(offset_file)

    def read(offset):
        reader.stdin.write(f"{offset}\n")
        reader.stdin.flush()
        return bytes.fromhex(reader.stdout.readline())

    offset_file.write_text("0")
    with FaultyServer(
        runs=1,
        checkpoints=1,
        profile="official-0.36",
        exports=ExportOptions(),
        size_bytes=40 << 20,
        clock=lambda: time.time() + offset_s(),
    ) as server:
        run_id = server.account.run_ids[0]
        server.account.add_checkpoint(run_id, "weights/1", size_bytes=40 << 20)
        expected = server.files(run_id, "weights/1")[name]
        constants = {"tinkerfs.weights.export_renewal.CHECK_S": 0.05}
        settings = {"clock_offset_file": str(offset_file), "constants": constants}
        with mounted(server, tmp_path, BINDINGS[-1], **settings) as root:
            directory = root / f"runs/{run_id}/checkpoints/weights/1"
            (directory / "export").write_text("1h")
            path = (directory / "export").read_text().partition(",")[0]
            with subprocess.Popen(
                [sys.executable, "-c", MAPPED, directory / "files" / name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as reader:
                assert read(0) == expected.read(0, 4096)
                server.journal.clear()
                for number in range(1, 6):
                    advance(1810)
                    wait_until(lambda number=number: server.journal.count("PUT ttl") == number)
                offset = 36 << 20
                assert read(offset) == expected.read(offset, offset + 4096)
                assert server.journal.count("store") > 0
                reader.stdin.close()
                assert reader.wait(10) == 0
            advance(3700)
            server.account.delete_expired()
            exported, checkpoint_id = path.removeprefix("tinker://").split("/", 1)
            assert server.account.checkpoint(exported, checkpoint_id) is None
            assert server.journal.count("PUT ttl") == 5
            assert (directory / "export").read_text() == "none\n"
            assert (root / ".tinkerfs/errors").read_text() == ""


def test_export_works_at_a_server_that_requires_tokens(tmp_path):
    with FaultyServer(
        runs=1,
        checkpoints=1,
        profile="official-0.36",
        exports=ExportOptions(),
        requires_token=True,
    ) as server:
        run_id = new_run(server, "weights/1")
        with mounted(server, tmp_path, BINDINGS[-1]) as root:
            path = root / f"runs/{run_id}/checkpoints/weights/1/export"
            path.write_text("1h")
            assert path.read_text().startswith("tinker://")
        assert server.journal.count("POST auth/token") == 1
        assert sum(entry.status == 401 for entry in server.journal.entries("api")) == 1
