"""`tinkerfs get` of archive members with unusual names, in several locales."""

import json
import os

import pytest

from tests.cli.test_get import dest, env, ids, server
from tests.support.mount import tinkerfs
from tests.support.server import demo_server
from tests.support.tar_variants import END, header, member
from tinkerfs.demo.content import Data

__all__ = ["demo_server", "dest", "env", "server"]

FILES = {b"caf\xe9 \xff": b"data", b"d\xff/\xc3\xbc": b"more"}

LOCALES = {
    "UTF-8": {"LANG": "C.UTF-8"},
    "C": {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "strict": {"LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_get_of_non_utf8_names_writes_exact_names(env, server, dest, locale):
    run_id, [checkpoint, _] = ids(server)
    path = f"tinker://{run_id}/{checkpoint}"
    members = [member(name, data) for name, data in FILES.items()]
    packed = b"".join(members) + header(b"out\xff", 0, b"2", b"../\xff") + END
    server.account.find(run_id, checkpoint)[1].archive = Data(packed)
    env |= LOCALES[locale]
    done = tinkerfs("get", "--json", path, dest, env=env)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    report = json.loads(done.stdout)
    assert report["is_complete"]
    assert {os.fsencode(row["path"]) for row in report["files"]} == {
        os.path.join(os.fsencode(dest), name) for name in FILES
    }
    for name, data in FILES.items():
        with open(os.path.join(os.fsencode(dest), name), "rb") as file:
            assert file.read() == data
    done = tinkerfs("get", "--json", path, dest, env=env)
    assert {row["outcome"] for row in json.loads(done.stdout)["files"]} == {"already present"}


#: Member names that `get` uses for its own files -> their names on disk.
OWN_NAMES = {
    b".tinkerfs-get": b"%2Etinkerfs-get",
    b".TINKERFS-GET": b"%2ETINKERFS-GET",
    b"%2Etinkerfs-get": b"%252Etinkerfs-get",
    b"d/.tinkerfs-get/x": b"d/%2Etinkerfs-get/x",
    b".a.0123456789abcdef.partial": b"%2Ea.0123456789abcdef.partial",
    b".a.partial": b".a.partial",
    b"a": b"a",
}


def test_get_of_names_of_its_own_files_encodes_them(env, server, dest):
    run_id, [checkpoint, _] = ids(server)
    packed = b"".join(member(name, b"of " + name) for name in OWN_NAMES) + END
    server.account.find(run_id, checkpoint)[1].archive = Data(packed)
    for outcome in ("copied", "already present"):
        done = tinkerfs("get", "--json", f"tinker://{run_id}/{checkpoint}", dest, env=env)
        assert {row["outcome"] for row in json.loads(done.stdout)["files"]} == {outcome}
    for name, on_disk in OWN_NAMES.items():
        with open(os.path.join(os.fsencode(dest), on_disk), "rb") as file:
            assert file.read() == b"of " + name
    assert all(json.loads(line) for line in (dest / ".tinkerfs-get").read_text().splitlines())


def test_get_into_symlinked_directory_fails(env, server, dest, tmp_path):
    run_id, [checkpoint, _] = ids(server)
    packed = member(b"sub/file", b"data") + member(b"z", b"last") + END
    server.account.find(run_id, checkpoint)[1].archive = Data(packed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    dest.mkdir()
    (dest / "sub").symlink_to(elsewhere)
    for force in ((), ("--force",)):
        done = tinkerfs("get", *force, f"tinker://{run_id}/{checkpoint}", dest, env=env)
        assert done.returncode == 1
        assert "'sub' is not a directory, or is a symbolic link" in done.stderr
        assert os.listdir(elsewhere) == []
        assert not (dest / "z").exists()
