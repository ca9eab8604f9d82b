"""The mount table, and the processes that use or serve a mount."""

import os
import subprocess
import sys
import time

import pytest

from tinkerfs.fuse import mount_table

MOUNTINFO = r"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:40 / /home/me/with\040space\134 rw,nosuid - fuse.tinkerfs tinkerfs rw,user_id=0
31 22 0:41 / /twice rw - tmpfs none rw
32 22 0:42 / /twice rw - fuse.tinkerfs tinkerfs rw
nonsense
""".lstrip()


@pytest.fixture
def mountinfo(tmp_path, monkeypatch):
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    listed = mount_table.list_mounts(str(path))
    monkeypatch.setattr(mount_table, "list_mounts", lambda *_: listed)
    return listed


def test_list_mounts_decodes_escapes(mountinfo):
    assert [mount.mountpoint for mount in mountinfo] == [
        "/",
        "/home/me/with space\\",
        "/twice",
        "/twice",
    ]
    assert mountinfo[1] == mount_table.Mount(
        "/home/me/with space\\", "fuse.tinkerfs", "tinkerfs", "0:40", 0
    )


@pytest.mark.parametrize(
    ("fstype", "options", "owner_uid"),
    [
        ("fuse.tinkerfs", "rw,user_id=1000,group_id=1,allow_other", 1000),
        ("fuse", "rw,user_id=1000", 1000),
        ("fuse.tinkerfs", "rw,x_user_id=0,group_id=0", None),
        ("fuse.tinkerfs", "rw,user_id=0x", None),
        ("cifs", "rw,domain=x,user_id=0", None),
    ],
)
def test_owner_of_mount_is_its_user_id(tmp_path, fstype, options, owner_uid):
    path = tmp_path / "mountinfo"
    path.write_text(f"30 22 0:40 / /mnt rw - {fstype} user_id=7 {options}\n")
    [mount] = mount_table.list_mounts(str(path))
    assert mount.owner_uid == owner_uid


@pytest.mark.parametrize(
    ("owner_uid", "is_trusted"), [(1000, True), (0, True), (1001, False), (None, False)]
)
def test_mount_of_this_user_or_root_is_trusted(monkeypatch, owner_uid, is_trusted):
    monkeypatch.setattr(mount_table.os, "geteuid", lambda: 1000)
    assert (
        mount_table.Mount("/mnt", "fuse.tinkerfs", "x", "0:1", owner_uid).is_trusted is is_trusted
    )


def test_list_mounts_reads_names_with_other_line_ends(tmp_path):
    path = tmp_path / "mountinfo"
    name = "/a\rb\x0bc\x1cd\u2028e"
    path.write_text(f"30 22 0:40 / {name} rw - fuse.tinkerfs x rw,user_id=5\n", newline="\n")
    [mount] = mount_table.list_mounts(str(path))
    assert (mount.mountpoint, mount.owner_uid) == (name, 5)


def test_find_mount_returns_topmost_mount(mountinfo):
    assert mount_table.find_mount("/twice").fstype == "fuse.tinkerfs"
    assert mount_table.find_mount("/nowhere") is None
    assert len(mount_table.tinkerfs_mounts()) == 2


def test_canonical_mountpoint_does_not_resolve_a_mount(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert mount_table.canonical_mountpoint(str(tmp_path / "link")) == f"{tmp_path}/target"
    here = mount_table.Mount(f"{tmp_path}/link", "fuse.tinkerfs", "tinkerfs", "0:1")
    monkeypatch.setattr(
        mount_table, "find_mount", lambda path: here if path == here.mountpoint else None
    )
    assert mount_table.canonical_mountpoint(str(tmp_path / "link")) == f"{tmp_path}/link"


def test_find_mount_users_names_process_and_usage(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    code = (
        "import mmap, sys, time\n"
        "file = open(sys.argv[1])\n"
        "mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "if len(sys.argv) > 2: file.close()\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    processes = [
        subprocess.Popen(["sleep", "60"], cwd=tmp_path),
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE),
    ]
    try:
        processes[1].stdout.readline()
        found = {user.pid: user for user in mount_table.find_mount_users(str(tmp_path))}
        assert found[processes[0].pid].usage == "its working directory"
        assert found[processes[1].pid].usage == f"open: {path}"
        assert str(found[processes[0].pid]).startswith("sleep[")
        assert os.getpid() not in found
    finally:
        for process in processes:
            process.kill()
            process.wait()
        processes[1].stdout.close()


def test_read_file_raises_timeout_error(tmp_path):
    (tmp_path / "file").write_text("content")
    assert mount_table.read_file(str(tmp_path / "file")) == b"content"
    assert mount_table.read_file(str(tmp_path / "none")) is None
    os.mkfifo(tmp_path / "fifo")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        mount_table.read_file(str(tmp_path / "fifo"), timeout_s=0.2)
    assert time.monotonic() - started < 2


def test_read_file_discards_what_exceeds_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(mount_table, "_MAX_FILE_BYTES", 3)
    (tmp_path / "file").write_text("content")
    assert mount_table.read_file(str(tmp_path / "file")) == b"con"


def test_zombie_is_not_running():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert mount_table.is_running(process.pid)
        process.kill()
        assert mount_table.wait_until(lambda: not mount_table.is_running(process.pid), 5)
        assert os.path.exists(f"/proc/{process.pid}")
    assert not mount_table.is_running(process.pid)


def test_wait_until_returns_false_after_timeout():
    assert not mount_table.wait_until(lambda: False, 0.05)
    assert mount_table.wait_until(lambda: True, 0)


def test_find_daemon_pids_of_other_mount_is_empty():
    root = mount_table.find_mount("/")
    assert mount_table.find_daemon_pids(root) == []


def test_daemon_of_other_mount_does_not_serve_its_cwd():
    # Like every daemon, it runs in / with /dev/fuse open and tinkerfs in its arguments.
    code = "import os, sys; os.open('/dev/fuse', os.O_RDWR); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "tinkerfs", "/somewhere/else"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd="/", stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        found = mount_table.find_daemon_pids(mount_table.find_mount("/"))
        process.stdin.close()
    assert process.returncode == 0
    assert process.pid not in found


def test_unmount_without_mount_raises_os_error(tmp_path):
    with pytest.raises(OSError, match=r"\w"):
        mount_table.unmount(str(tmp_path))
