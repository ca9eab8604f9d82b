"""Every refusal before a mount is tried names its cure."""

import os
import shutil

import pytest

from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table, preflight


def test_no_device(tmp_path):
    with pytest.raises(StartupError, match=r"there is no .*--device /dev/fuse"):
        preflight.check_device(str(tmp_path / "fuse"))
    with pytest.raises(StartupError, match="does not open"):
        preflight.check_device(str(tmp_path))


def test_a_device_that_is_somebody_elses(monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StartupError, match=r"may not be opened by you: .*chmod 666 /dev/fuse"):
        preflight.check_device()


def test_allow_other_needs_a_word_of_root(tmp_path):
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
    with pytest.raises(StartupError, match=rf"no {name}, .*apt install fuse3"):
        preflight.check_fusermount(major, is_root=False)


def test_fusermount_needs_mtab_to_unmount(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(preflight, "_MTAB", str(tmp_path / "mtab"))
    preflight.check_fusermount(3, is_root=True)
    with pytest.raises(StartupError, match=r"users cannot unmount: .*ln -s /proc/self/mounts"):
        preflight.check_fusermount(3, is_root=False)
    (tmp_path / "mtab").symlink_to("/proc/self/mounts")
    preflight.check_fusermount(3, is_root=False)


def test_a_good_mountpoint_is_named_as_the_kernel_does(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    assert preflight.prepare_mountpoint("link/") == f"{tmp_path}/folder"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none", "does not exist: mkdir -p"),
        ("file", "is no folder"),
        ("file/below", "is below a file"),
        ("full", "is not empty"),
    ],
)
def test_a_bad_mountpoint(tmp_path, name, told):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(StartupError, match=told):
        preflight.prepare_mountpoint(str(tmp_path / name))


def test_somebody_elses_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *_args: False)
    with pytest.raises(StartupError, match="is not yours"):
        preflight.prepare_mountpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("fstype", "health", "told"),
    [
        ("fuse.tinkerfs", "answers", "is mounted there already: tinkerfs umount"),
        ("fuse.tinkerfs", "hangs", "hangs there already: tinkerfs umount"),
        ("fuse.sshfs", "hangs", "name another folder"),
    ],
)
def test_what_is_mounted_there(tmp_path, monkeypatch, fstype, health, told):
    mount = mount_table.Mount(str(tmp_path), fstype, "x", "0:1")
    monkeypatch.setattr(
        mount_table, "find_mount", lambda path: mount if path == str(tmp_path) else None
    )
    monkeypatch.setattr(mount_table, "check_health", lambda _path: health)
    with pytest.raises(StartupError, match=told):
        preflight.prepare_mountpoint(str(tmp_path))


def test_what_a_dead_daemon_left_is_cleaned_up(tmp_path, monkeypatch):
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
def test_apparmor_is_suspected_where_fusermount_has_a_profile(tmp_path, files, is_suspected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert preflight.may_be_apparmor(str(tmp_path)) == is_suspected
