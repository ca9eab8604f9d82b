"""What mounts there are, and who holds or serves them."""

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


def test_mountinfo_is_read_with_its_escapes(mountinfo):
    assert [mount.mountpoint for mount in mountinfo] == [
        "/",
        "/home/me/with space\\",
        "/twice",
        "/twice",
    ]
    assert mountinfo[1] == mount_table.Mount(
        "/home/me/with space\\", "fuse.tinkerfs", "tinkerfs", "0:40"
    )


def test_of_mounts_on_one_another_the_uppermost_counts(mountinfo):
    assert mount_table.find_mount("/twice").fstype == "fuse.tinkerfs"
    assert mount_table.find_mount("/nowhere") is None
    assert len(mount_table.tinkerfs_mounts()) == 2


def test_a_mountpoint_is_not_touched_to_name_it(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert mount_table.canonical_mountpoint(str(tmp_path / "link")) == f"{tmp_path}/folder"
    here = mount_table.Mount(f"{tmp_path}/link", "fuse.tinkerfs", "tinkerfs", "0:1")
    monkeypatch.setattr(
        mount_table, "find_mount", lambda path: here if path == here.mountpoint else None
    )
    assert mount_table.canonical_mountpoint(str(tmp_path / "link")) == f"{tmp_path}/link"


def test_who_holds_a_folder_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    code = (
        "import mmap, sys, time\n"
        "file = open(sys.argv[1])\n"
        "kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "if len(sys.argv) > 2: file.close()\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    processes = [
        subprocess.Popen(["sleep", "60"], cwd=tmp_path),
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE),
    ]
    try:
        processes[1].stdout.readline()
        found = {holder.pid: holder for holder in mount_table.find_mount_users(str(tmp_path))}
        assert found[processes[0].pid].what == "its working directory"
        assert found[processes[1].pid].what == f"open: {path}"
        assert str(found[processes[0].pid]).startswith("sleep[")
        assert os.getpid() not in found
    finally:
        for process in processes:
            process.kill()
            process.wait()
        processes[1].stdout.close()


def test_a_file_that_cannot_be_read_in_time(tmp_path):
    (tmp_path / "file").write_text("content")
    assert mount_table.read_file(str(tmp_path / "file")) == b"content"
    assert mount_table.read_file(str(tmp_path / "none")) is None
    os.mkfifo(tmp_path / "fifo")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        mount_table.read_file(str(tmp_path / "fifo"), timeout_s=0.2)
    assert time.monotonic() - started < 2


def test_a_process_that_waits_to_be_reaped_does_not_run():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert mount_table.is_running(process.pid)
        process.kill()
        assert mount_table.wait_until(lambda: not mount_table.is_running(process.pid), 5)
        assert os.path.exists(f"/proc/{process.pid}")
    assert not mount_table.is_running(process.pid)


def test_waiting_gives_up():
    assert not mount_table.wait_until(lambda: False, 0.05)
    assert mount_table.wait_until(lambda: True, 0)


def test_who_is_no_tinkerfs_serves_no_mount():
    root = mount_table.find_mount("/")
    assert mount_table.find_daemon_pids(root) == []


def test_who_serves_another_mount_does_not_serve_the_folder_it_stands_in():
    # It stands in /, has /dev/fuse open and tinkerfs in its arguments, as every daemon does.
    code = "import os, sys; os.open('/dev/fuse', os.O_RDWR); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "tinkerfs", "/somewhere/else"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd="/", stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        found = mount_table.find_daemon_pids(mount_table.find_mount("/"))
        process.stdin.close()
    assert process.returncode == 0
    assert process.pid not in found


def test_unmounting_nothing_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"\w"):
        mount_table.unmount(str(tmp_path))
