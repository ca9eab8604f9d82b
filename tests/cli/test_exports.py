"""`tinkerfs get --export` and `prefetch --export` against a service without archives."""

import json
import os
import re
import stat
import tarfile

import pyrage
import pytest

from tests.support.mount import run, tinkerfs
from tests.support.server import demo_server
from tinkerfs.demo.exports import ExportOptions

__all__ = ["demo_server"]

MIB = 1 << 20
NAME = "adapter_model.safetensors"


def encrypt(data, recipients):
    return pyrage.encrypt(data, [pyrage.x25519.Recipient.from_str(each) for each in recipients])


@pytest.fixture
def server(demo_server):
    options = ExportOptions(encrypt=encrypt)
    server = demo_server(runs=1, checkpoints=1, profile="official-0.36", exports=options)
    run_id = server.account.run_ids[-1]
    server.account.add_checkpoint(run_id, "weights/w", size_bytes=9 * MIB)
    server.account.add_checkpoint(run_id, "sampler_weights/s", size_bytes=MIB)
    return server


@pytest.fixture
def env(tmp_path, server):
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": os.environ["PATH"], **server.environment, "HOME": str(home), "LANG": "C.UTF-8"}


@pytest.fixture
def path(server):
    return f"tinker://{server.account.run_ids[-1]}/weights/w"


def expected_files(server):
    files = server.files(server.account.run_ids[-1], "weights/w").items()
    return {name: content.read(0, content.size_bytes) for name, content in files}


def files_in(directory):
    return {each.name: each.read_bytes() for each in directory.iterdir() if each.name[0] != "."}


def exports_of(server):
    """Return the external weights that the server has."""
    runs = server.account.runs()
    return [c.id for run in runs for c in run.checkpoints if c.id == "external_weights/tinkerfs"]


def test_get_exports_copies_and_deletes(server, env, path, tmp_path):
    done = tinkerfs("get", path, tmp_path / "plain", env=env)
    assert done.returncode == 1
    assert "tinkerfs get --export" in done.stderr
    done = tinkerfs("get", "--export", "--json", path, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert f"exporting {path}: the server has no archive of it" in done.stderr
    assert json.loads(done.stdout)["is_complete"]
    assert files_in(tmp_path / "out") == expected_files(server)
    assert exports_of(server) == []
    assert server.journal.count("POST create_session") == 1
    assert server.journal.count("POST finish") == 1


def test_get_archive_exports_and_makes_a_tar(server, env, path, tmp_path):
    tar = tmp_path / "w.tar"
    done = tinkerfs("get", "--archive", path, tar, env=env)
    assert done.returncode == 1
    assert "tinkerfs get --export" in done.stderr
    done = tinkerfs("get", "--archive", "--export", path, tar, env=env)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tar) as opened:
        found = {member.name: opened.extractfile(member).read() for member in opened}
    assert found == expected_files(server)
    assert exports_of(server) == []
    server.journal.clear()
    done = tinkerfs("get", "--archive", path, tar, env=env)
    assert done.returncode == 0, done.stderr
    done = tinkerfs("get", path, tmp_path / "files", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "files") == expected_files(server)
    assert server.journal.count("store") == 0, "the files have the blocks of the tar"


def is_after_4_mib(record):
    return int(record.range.removeprefix("bytes=").partition("-")[0]) >= 4 * MIB


def test_get_archive_resumes_a_tar_of_files(server, env, path, tmp_path):
    run_id = path.split("/")[2]
    server.account.add_checkpoint(run_id, "external_weights/e", size_bytes=9 * MIB)
    external = f"tinker://{run_id}/external_weights/e"
    tar = tmp_path / "e.tar"
    rule = server.faults.add("GET store/file", status=500, times=None, when=is_after_4_mib)
    failed = tinkerfs("get", "--archive", "--timeout=1", external, tar, env=env)
    assert failed.returncode == 1, failed
    rule.remove()
    done = tinkerfs("get", "--archive", "--json", external, tar, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0]["outcome"] == "resumed"
    with tarfile.open(tar) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened}
    expected = server.files(run_id, "external_weights/e")
    assert members == {name: each.read(0, each.size_bytes) for name, each in expected.items()}


def test_get_keeps_an_export_on_request(server, env, path, tmp_path):
    done = tinkerfs("get", "--export", "--keep-export", path, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert exports_of(server) == ["external_weights/tinkerfs"]
    done = tinkerfs("get", path, tmp_path / "again", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "again") == expected_files(server)


def test_failed_transfer_leaves_the_export_to_resume(server, env, path, tmp_path):
    server.faults.add("store", status=500, times=None)
    failed = tinkerfs("get", "--export", "--timeout=1", path, tmp_path / "out", env=env)
    assert failed.returncode == 1
    assert exports_of(server) == ["external_weights/tinkerfs"]
    server.faults.clear()
    done = tinkerfs("get", path, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "out") == expected_files(server)
    assert server.journal.count("POST create_session") == 1


def test_prefetch_exports_and_deletes(server, env, path, tmp_path):
    done = tinkerfs("prefetch", "--export", path, env=env)
    assert done.returncode == 0, done.stderr
    assert exports_of(server) == []
    assert tinkerfs("prefetch", "--check", path, env=env).returncode == 0
    log = server.journal
    log.clear()
    done = tinkerfs("get", "--export", path, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "out") == expected_files(server)
    assert (log.count("store"), log.count("POST create_session")) == (0, 0)


def test_sampler_checkpoint_is_not_exported(server, env, tmp_path):
    path = f"tinker://{server.account.run_ids[-1]}/sampler_weights/s"
    done = tinkerfs("get", "--export", path, tmp_path / "out", env=env)
    assert done.returncode == 1
    assert "save a training checkpoint or external weights" in done.stderr
    assert server.journal.count("POST create_session") == 0


def test_failed_export_has_the_words_of_the_server(server, env, path, tmp_path):
    server.behaviour.exports.failure = ("out of memory", "server")
    done = tinkerfs("get", "--export", path, tmp_path / "out", env=env)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("endpoint", ["POST load_weights", "POST save_weights_external"])
def test_checkpoint_saved_again_leaves_no_export(server, env, path, tmp_path, endpoint):
    def save_again():
        run_id = server.account.run_ids[-1]
        server.account.add_checkpoint(run_id, "weights/w", size_bytes=MIB, time_s=1.9e9)

    server.faults.add(endpoint, call=save_again)
    done = tinkerfs("get", "--export", path, tmp_path / "out", env=env)
    assert done.returncode == 1
    assert f"{path}: API: the checkpoint was saved again" in done.stderr
    assert "Traceback" not in done.stderr
    assert exports_of(server) == []
    done = tinkerfs("get", "--export", path, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "out") == expected_files(server)


@pytest.mark.parametrize("is_listed", [True, False])
def test_public_checkpoint_of_other_user_is_exported(server, env, tmp_path, is_listed):
    run_id = server.account.foreign_run_ids[0]
    server.account.add_checkpoint(run_id, "weights/p", size_bytes=MIB, is_public=True)
    if not is_listed:
        hidden = re.compile(f"GET .*/{run_id.partition(':')[0]}.*/checkpoints$")
        server.faults.add(hidden, status=404, times=None)
    done = tinkerfs("get", "--export", f"tinker://{run_id}/weights/p", tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert NAME in files_in(tmp_path / "out")
    assert server.journal.count("POST create_session") == 1
    assert exports_of(server) == []


def test_age_files_are_copied_and_decrypted(server, env, path, tmp_path):
    identity = pyrage.x25519.Identity.generate()
    key = tmp_path / "key.txt"
    key.write_text(f"# created by a test\n{identity}\n")
    flags = ("--export", "--keep-export", "--age-recipient", str(identity.to_public()))
    done = tinkerfs("get", *flags, path, tmp_path / "encrypted", env=env)
    assert done.returncode == 0, done.stderr
    encrypted = files_in(tmp_path / "encrypted")
    assert set(encrypted) == {f"{name}.age" for name in expected_files(server)}
    assert pyrage.decrypt(encrypted[f"{NAME}.age"], [identity]) == expected_files(server)[NAME]
    done = tinkerfs("get", "--age-identity", key, path, tmp_path / "plain", env=env)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "plain") == expected_files(server)
    mode = stat.S_IMODE((tmp_path / "plain" / NAME).stat().st_mode)
    assert mode == 0o666 & ~os.umask(os.umask(0o022))


def test_wrong_identity_is_an_error_and_leaves_the_file(server, env, path, tmp_path):
    identity, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    key = tmp_path / "key.txt"
    key.write_text(f"{other}\n")
    flags = ("--export", "--age-recipient", str(identity.to_public()), "--age-identity", key)
    done = tinkerfs("get", *flags, path, tmp_path / "out", env=env)
    assert done.returncode == 1
    assert "cannot be decrypted" in done.stderr
    assert str(other) not in done.stderr
    assert all(name.endswith(".age") for name in files_in(tmp_path / "out"))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "AGE-SECRET-KEY-1NONSENSE\n", "\xff"])
def test_file_without_an_identity_is_an_error(env, path, tmp_path, text):
    key = tmp_path / "key.txt"
    key.write_text(text)
    done = tinkerfs("get", "--age-identity", key, path, tmp_path / "out", env=env)
    assert done.returncode == 1
    assert done.stderr.startswith(("tinkerfs: --age-identity", "Error: --age-identity"))
    assert "NONSENSE" not in done.stderr


def test_flags_of_exports_need_export(env, path, tmp_path):
    done = tinkerfs("get", "--keep-export", path, tmp_path / "out", env=env)
    assert done.returncode == 2
    assert "need --export" in done.stderr


def test_interrupt_finishes_the_session(server, env, path, tmp_path):
    server.behaviour.exports.load_s = 3600
    command = f"timeout -s INT 4 tinkerfs-under-test get --export {path} {tmp_path}/out"
    script = tmp_path / "tinkerfs-under-test"
    import sys

    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m tinkerfs "$@"\n')
    script.chmod(0o755)
    done = run("sh", "-c", command, env=env | {"PATH": f"{tmp_path}:{env['PATH']}"})
    assert done.returncode == 124
    assert "interrupted" in done.stderr
    session = server.account.session("export-session-1")
    assert session.status["reason"] == {"type": "interrupted"}
