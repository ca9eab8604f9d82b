"""What every binding must hand to and fro between the kernel and a file system."""

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.support.memoryfs import MTIME_NS
from tests.support.mount import memory_mount, run
from tinkerfs.fuse import mount_table
from tinkerfs.vfs.node import inode_for_path


def log_of(mountpoint):
    return mountpoint.with_name(f"{mountpoint.name}.log").read_text(errors="replace")


def test_attributes_arrive_whole(memory):
    status = os.stat(memory / "hello")
    assert stat.filemode(status.st_mode) == "-rw-r--r--"
    assert (status.st_size, status.st_mtime_ns, status.st_nlink) == (6, MTIME_NS, 1)
    assert (status.st_ino, status.st_uid, status.st_blocks) == (
        inode_for_path("/hello"),
        os.getuid(),
        1,
    )
    assert os.readlink(memory / "link") == "folder/0000"
    assert (memory / "link").read_text() == "hello\n"


def test_a_listing_has_names_kinds_and_inodes(memory):
    with os.scandir(memory) as entries:
        found = {entry.name: entry for entry in entries}
    assert found["folder"].is_dir(follow_symlinks=False)
    assert found["link"].is_symlink()
    assert found["hello"].inode() == inode_for_path("/hello")
    assert "\udcff" in found
    assert run("ls", "-a", memory / "empty").stdout == ".\n..\n"


def test_the_mount_says_what_it_is(memory):
    mount = mount_table.find_mount(str(memory))
    assert (mount.fstype, mount.source) == ("fuse.tinkerfs", "tinkerfs")


def test_a_long_listing_is_listed_once(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--many=5000"):
        names = os.listdir(mountpoint / "folder")
        assert sorted(names) == sorted(["costly", *(f"{i:04}" for i in range(5000))])
        assert len(run("ls", "-l", mountpoint / "folder").stdout.splitlines()) == 5002
    calls = [line.split(" ", 2)[2] for line in log_of(mountpoint).splitlines() if "fuse" in line]
    assert calls.count("opendir /folder") == 2
    looked_up = [call for call in calls if call.startswith("getattr /folder/")]
    if binding == "mfusepy3":
        # The attributes came along with the names, but for the one that would have cost a call
        # and those of the first buffer: `ls` had shown by nothing that it would want them.
        assert len(set(looked_up)) < 1000
    else:
        assert len(set(looked_up)) == 5001


def test_plain_ls_asks_for_no_attributes(memory, binding):
    run("ls", memory / "folder")
    assert "getattr /folder/costly" not in log_of(memory)


def test_a_name_that_is_no_utf8_is_served(memory):
    path = os.path.join(os.fsencode(memory), b"\xff")
    assert Path(os.fsdecode(path)).read_text() == "hello\n"
    with pytest.raises(FileNotFoundError):
        os.stat(os.path.join(os.fsencode(memory), b"\xfe"))


def test_page_cached_reads_give_the_bytes(memory):
    data = (memory / "cached-1048576").read_bytes()
    assert data == bytes(range(256)) * 4096
    with open(memory / "cached-1048576", "rb") as file:
        file.seek(1_000_003)
        assert file.read(5) == data[1_000_003:1_000_008]


def test_a_write_acts_and_its_failure_is_seen(memory):
    assert run("sh", "-c", f"echo 1 > {memory}/control").returncode == 0
    assert (memory / "control").read_text() == "1\n"
    assert run("sh", "-c", f"echo 2 >> {memory}/control").returncode == 0
    assert (memory / "control").read_text() == "2\n"
    refused = run("bash", "-c", f"echo bad > {memory}/control")
    assert refused.returncode == 1
    assert "write error: Invalid argument" in refused.stderr
    assert (memory / "control").read_text() == "2\n"


def test_attributes_of_a_control_may_be_set_to_no_effect(memory):
    control = memory / "control"
    os.chmod(control, 0o600)
    os.utime(control)
    os.truncate(control, 0)
    assert control.read_bytes() == b"0\n"
    with pytest.raises(PermissionError):
        os.chmod(memory / "hello", 0o600)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda folder: os.mkdir(folder / "new"),
        lambda folder: os.symlink("hello", folder / "new"),
        lambda folder: os.link(folder / "hello", folder / "new"),
        lambda folder: os.rename(folder / "hello", folder / "new"),
        lambda folder: os.mknod(folder / "new"),
        lambda folder: (folder / "new").write_text("x"),
        lambda folder: (folder / "hello").write_text("x"),
        lambda folder: os.unlink(folder / "hello"),
    ],
    ids=["mkdir", "symlink", "link", "rename", "mknod", "create", "write", "unlink"],
)
def test_changes_are_refused_by_the_file_system(memory, attempt):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        attempt(memory)
    assert failure.value.errno == errno.EPERM


def test_removal(memory):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.rmdir(memory / "folder")
    assert failure.value.errno == errno.ENOTEMPTY
    os.rmdir(memory / "empty")
    with open(memory / "removable") as file:
        os.unlink(memory / "removable")
        assert not os.path.exists(memory / "removable")
        assert file.read() == "hello\n"
    assert not [name for name in os.listdir(memory) if name.startswith(".fuse_hidden")]


def test_a_fault_of_ours_is_eio_and_logged_once(memory):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        (memory / "broken").read_bytes()
    assert failure.value.errno == errno.EIO
    assert log_of(memory).count("ZeroDivisionError: on purpose") == 1


def test_no_extended_attributes_and_no_call_for_them(memory):
    for ask in (lambda path: os.getxattr(path, "user.tinker.path"), os.listxattr):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            ask(memory / "hello")
        assert failure.value.errno == errno.EOPNOTSUPP


def test_df(memory):
    status = os.statvfs(memory)
    assert status.f_blocks * status.f_frsize == 1 << 30
    assert status.f_bavail * status.f_frsize == 1 << 29
    assert status.f_namemax == 255


def test_a_read_only_mount_is_one_to_the_kernel(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--read-only"):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            (mountpoint / "control").write_text("1")
        assert failure.value.errno == errno.EROFS
