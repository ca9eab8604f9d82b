"""The cache directory is private to the user, wherever the given directory is."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tinkerfs.cache import directory
from tinkerfs.cache.directory import (
    UnusableCacheError,
    default_cache_dir,
    locate_cache_dir,
    prepare_cache,
    prepare_cache_dir,
)
from tinkerfs.concurrency import run_concurrently
from tinkerfs.errors import StartupError

OWN = f"tinkerfs-{os.getuid()}"


def test_cache_with_a_directory_shared_is_for_many_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "cache").mkdir(mode=0o700)
    alone = prepare_cache(tmp_path / "cache", 60.0)
    assert (alone.is_shared, alone.metadata) == (False, alone.root)
    (tmp_path / "cache/shared").mkdir()
    shared = prepare_cache(tmp_path / "cache", 60.0)
    assert shared.is_shared
    assert shared.blocks == tmp_path / "cache/shared"
    assert shared.metadata == tmp_path / "home/.cache/tinkerfs"
    assert shared.metadata.is_dir()


def test_prepare_cache_dir_that_is_new_makes_it_private(tmp_path):
    path = prepare_cache_dir(tmp_path / "a" / "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert prepare_cache_dir(path) == path == locate_cache_dir(path)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o2775, 0o1777, 0o720])
def test_prepare_cache_dir_open_to_others_nests_its_own(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    path = prepare_cache_dir(tmp_path / "open")
    assert path == tmp_path / "open" / OWN == locate_cache_dir(tmp_path / "open")
    assert stat.S_IMODE(path.stat().st_mode) & 0o777 == 0o700
    assert prepare_cache_dir(tmp_path / "open") == path
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == mode


def test_prepare_cache_dir_of_another_user_nests_its_own(tmp_path, needs_root):
    os.chown(tmp_path, 1234, 1234)
    assert prepare_cache_dir(tmp_path) == tmp_path / OWN
    os.chown(tmp_path / OWN, 1234, 1234)
    with pytest.raises(UnusableCacheError, match=r"another user \(uid 1234\)"):
        prepare_cache_dir(tmp_path)


def test_prepare_cache_dir_with_planted_subdirectory_fails(tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / OWN).symlink_to("elsewhere")
    with pytest.raises(StartupError, match="is a symbolic link"):
        prepare_cache_dir(tmp_path)
    (tmp_path / OWN).unlink()
    (tmp_path / OWN).write_text("")
    with pytest.raises(StartupError, match="not a directory"):
        prepare_cache_dir(tmp_path)


def test_prepare_cache_dir_of_a_file_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(StartupError, match="--cache-dir") as failure:
            prepare_cache_dir(tmp_path / name)
        assert not isinstance(failure.value, UnusableCacheError)


def test_prepare_cache_dir_by_many_threads_succeeds(tmp_path):
    tmp_path.chmod(0o700)
    made = run_concurrently([lambda: prepare_cache_dir(tmp_path)] * 32, 8, "cache directory")
    assert {each.result() for each in made} == {tmp_path}
    assert list(tmp_path.iterdir()) == []


def test_default_cache_dir_on_a_network_is_local(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "tinkerfs"
    monkeypatch.setattr(directory, "file_system_of", lambda _: "nfs4")
    assert default_cache_dir() == Path("/var/tmp") / OWN


def test_default_cache_dir_under_home_that_is_root_is_local(needs_root):
    """Like in a pod that runs as a user without a home directory."""
    code = "from tinkerfs.cache.directory import default_cache_dir; print(default_cache_dir())"
    rights = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")
    command = (sys.executable, "-c", code)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *rights, *command],
        env={"HOME": "/"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/var/tmp/tinkerfs-65534\n"


def test_world_writable_fallback_is_not_nested(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    trap.mkdir()
    trap.chmod(0o777)
    monkeypatch.setattr(directory, "_fallback", lambda: trap)
    assert locate_cache_dir(trap) == trap
