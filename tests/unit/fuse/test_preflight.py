"""Checks before mounting: every error has a hint."""

import os
import shutil

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, preflight


def test_missing_device_raises_error(tmp_path):
    with pytest.raises(StartupError, match=r"not found .*--device /dev/fuse"):
        preflight.check_device(str(tmp_path / "fuse"))
    with pytest.raises(StartupError, match="cannot open "):
        preflight.check_device(str(tmp_path))


def test_forbidden_device_raises_error(monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StartupError, match=r"permission denied: /dev/fuse .*chmod 666 /dev/fuse"):
        preflight.check_device()


def test_allow_other_needs_fuse_conf_or_root(tmp_path):
    conf = tmp_path / "fuse.conf"
    for text in (None, "", "#user_allow_other\n", "mount_max = 3\n"):
        if text is not None:
            conf.write_text(text)
        with pytest.raises(StartupError, match="user_allow_other"):
            preflight.check_allow_other(str(conf), is_root=False)
    preflight.check_allow_other(str(conf), is_root=True)
    conf.write_text("mount_max = 3\n  user_allow_other  \n")
    preflight.check_allow_other(str(conf), is_root=False)


@pytest.mark.parametrize(("major", "name"), [(2, "fusermount"), (3, "fusermount3")])
def test_users_need_fusermount(monkeypatch, major, name):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    preflight.check_fusermount(major, is_root=True)
    with pytest.raises(StartupError, match=rf"{name} not found, .*apt install fuse3"):
        preflight.check_fusermount(major, is_root=False)


def test_fusermount_needs_mtab_to_unmount(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(preflight, "_MTAB", str(tmp_path / "mtab"))
    preflight.check_fusermount(3, is_root=True)
    with pytest.raises(StartupError, match=r"users cannot unmount .*ln -s /proc/self/mounts"):
        preflight.check_fusermount(3, is_root=False)
    (tmp_path / "mtab").symlink_to("/proc/self/mounts")
    preflight.check_fusermount(3, is_root=False)


def test_valid_mountpoint_returns_canonical_path(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path)
    assert preflight.prepare_mountpoint("link/") == f"{tmp_path}/target"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", r"does not exist \(hint: mkdir -p"),
        ("file", "is not a directory"),
        ("file/below", "is below a file"),
        ("full", "is not empty"),
    ],
)
def test_invalid_mountpoint_raises_error(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(StartupError, match=message):
        preflight.prepare_mountpoint(str(tmp_path / name))


def test_mountpoint_of_other_user_raises_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *_args: False)
    with pytest.raises(StartupError, match="is not yours"):
        preflight.prepare_mountpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("fstype", "health", "message"),
    [
        ("fuse.tinkerfs", "responsive", "is already mounted on .*: tinkerfs umount"),
        ("fuse.tinkerfs", "unresponsive", "mounted but unresponsive on .*: tinkerfs umount"),
        ("fuse.sshfs", "unresponsive", "use another directory"),
    ],
)
def test_mounted_mountpoint_raises_error(tmp_path, monkeypatch, fstype, health, message):
    mount = mount_table.Mount(str(tmp_path), fstype, "x", "0:1")
    monkeypatch.setattr(
        mount_table, "find_mount", lambda path: mount if path == str(tmp_path) else None
    )
    monkeypatch.setattr(mount_table, "check_health", lambda _path: health)
    with pytest.raises(StartupError, match=message):
        preflight.prepare_mountpoint(str(tmp_path))


def test_dead_mount_is_unmounted(tmp_path, monkeypatch):
    mount = mount_table.Mount(str(tmp_path), "fuse.tinkerfs", "x", "0:1")
    unmounted = []
    monkeypatch.setattr(
        mount_table, "find_mount", lambda path: mount if path == str(tmp_path) else None
    )
    monkeypatch.setattr(mount_table, "check_health", lambda _path: "dead")
    monkeypatch.setattr(mount_table, "unmount", lambda path, lazy: unmounted.append((path, lazy)))
    assert preflight.prepare_mountpoint(str(tmp_path)) == str(tmp_path)
    assert unmounted == [(str(tmp_path), True)]


@pytest.mark.parametrize(
    ("files", "is_suspected"),
    [
        ({}, False),
        ({"etc/apparmor.d/fusermount3": ""}, True),
        ({"sys/module/apparmor/parameters/enabled": "Y\n"}, True),
        (
            {"sys/module/apparmor/parameters/enabled": "N\n", "etc/apparmor.d/fusermount3": ""},
            False,
        ),
        (
            {
                "sys/module/apparmor/parameters/enabled": "Y\n",
                "proc/self/attr/apparmor/current": "unconfined\n",
            },
            True,
        ),
        (
            {
                "sys/module/apparmor/parameters/enabled": "Y\n",
                "proc/self/attr/current": "docker-default (enforce)\n",
            },
            False,
        ),
    ],
)
def test_may_be_apparmor_depends_on_profiles(tmp_path, files, is_suspected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert preflight.may_be_apparmor(str(tmp_path)) == is_suspected
