"""Operations that every binding must pass between the kernel and a file system."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.support.memoryfs import MTIME_NS
from tests.support.mount import memory_mount, run
from tinkerfs.fuse import mount_table
from tinkerfs.vfs.node import inode_for_path

ROOT = Path(__file__).parent.parent.parent


def log_of(mountpoint):
    return mountpoint.with_name(f"{mountpoint.name}.log").read_text(errors="replace")


def test_stat_returns_all_attributes(memory):
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


def test_scandir_returns_names_types_and_inodes(memory):
    with os.scandir(memory) as entries:
        found = {entry.name: entry for entry in entries}
    assert found["folder"].is_dir(follow_symlinks=False)
    assert found["link"].is_symlink()
    assert found["hello"].inode() == inode_for_path("/hello")
    assert "\udcff" in found
    assert run("ls", "-a", memory / "empty").stdout == ".\n..\n"


def test_mount_has_tinkerfs_type_and_source(memory):
    mount = mount_table.find_mount(str(memory))
    assert (mount.fstype, mount.source) == ("fuse.tinkerfs", "tinkerfs")


#: Mounts, and compares everything that a binding's module contains with what it was before.
COMPARE = """
import os, sys, threading
from tests.support.memoryfs import MemoryFileSystem
from tinkerfs.fuse import binding, mount_table, session
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.telemetry import Telemetry

def contents(module):
    owners = [module, module._libfuse]
    owners += [each for each in vars(module).values() if isinstance(each, type)]
    functions = [each for each in vars(module._libfuse).values() if hasattr(each, "restype")]
    return (
        [dict(vars(owner)) for owner in owners],
        [(each.restype, each.argtypes, each.errcheck) for each in functions],
    )

name, mountpoint = os.environ["TINKERFS_FUSE_BINDING"], sys.argv[1]
os.environ["FUSE_LIBRARY_PATH"] = binding.find_library(binding.BINDINGS[name]).path
module = __import__("fuse" if name == "fusepy" else "mfusepy")
del os.environ["FUSE_LIBRARY_PATH"]
before = contents(module)

def check():
    os.listdir(mountpoint)
    assert contents(module) == before
    mount_table.unmount(mountpoint)

session.block_signals()
loaded = binding.load_binding()
assert loaded.module is module
assert contents(module) == before
passthrough = Passthrough(Telemetry())
operations = Telemetry().operations
session.serve(
    MemoryFileSystem(),
    loaded,
    mountpoint,
    passthrough,
    operation_log=operations,
    timeout_s=9,
    ready=check,
)
assert contents(module) == before
print("unchanged")
"""


def test_mount_changes_nothing_in_the_binding_module(mountpoint, binding):
    environment = os.environ | {"TINKERFS_FUSE_BINDING": binding}
    done = run(sys.executable, "-c", COMPARE, mountpoint, env=environment, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("unchanged\n", "")


def test_long_listing_is_requested_once(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--many=5000"):
        names = os.listdir(mountpoint / "folder")
        assert sorted(names) == sorted(["costly", *(f"{i:04}" for i in range(5000))])
        assert len(run("ls", "-l", mountpoint / "folder").stdout.splitlines()) == 5002
    calls = [
        line.split(" ", 2)[2] for line in log_of(mountpoint).splitlines() if "operation_log" in line
    ]
    assert calls.count("opendir /folder") == 2
    looked_up = [call for call in calls if call.startswith("getattr /folder/")]
    if binding == "mfusepy3":
        # The listing included the attributes, except those of the expensive entry and of the first
        # buffer. Until then nothing had indicated that `ls` needs attributes.
        assert len(set(looked_up)) < 1000
    else:
        assert len(set(looked_up)) == 5001


def test_plain_ls_requests_no_attributes(memory, binding):
    run("ls", memory / "folder")
    assert "getattr /folder/costly" not in log_of(memory)


def test_non_utf8_name_is_served(memory):
    path = os.path.join(os.fsencode(memory), b"\xff")
    assert Path(os.fsdecode(path)).read_text() == "hello\n"
    with pytest.raises(FileNotFoundError):
        os.stat(os.path.join(os.fsencode(memory), b"\xfe"))


def test_reads_through_page_cache_return_the_bytes(memory):
    data = (memory / "cached-1048576").read_bytes()
    assert data == bytes(range(256)) * 4096
    with open(memory / "cached-1048576", "rb") as file:
        file.seek(1_000_003)
        assert file.read(5) == data[1_000_003:1_000_008]


def test_write_takes_effect_and_reports_errors(memory):
    assert run("sh", "-c", f"echo 1 > {memory}/control").returncode == 0
    assert (memory / "control").read_text() == "1\n"
    assert run("sh", "-c", f"echo 2 >> {memory}/control").returncode == 0
    assert (memory / "control").read_text() == "2\n"
    refused = run("bash", "-c", f"echo bad > {memory}/control")
    assert refused.returncode == 1
    assert "write error: Invalid argument" in refused.stderr
    assert (memory / "control").read_text() == "2\n"


def test_setting_attributes_of_control_has_no_effect(memory):
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
        lambda directory: os.mkdir(directory / "new"),
        lambda directory: os.symlink("hello", directory / "new"),
        lambda directory: os.link(directory / "hello", directory / "new"),
        lambda directory: os.rename(directory / "hello", directory / "new"),
        lambda directory: os.mknod(directory / "new"),
        lambda directory: (directory / "new").write_text("x"),
        lambda directory: (directory / "hello").write_text("x"),
        lambda directory: os.unlink(directory / "hello"),
    ],
    ids=["mkdir", "symlink", "link", "rename", "mknod", "create", "write", "unlink"],
)
def test_unsupported_changes_raise_eperm(memory, attempt):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        attempt(memory)
    assert failure.value.errno == errno.EPERM


def test_removal_of_file_and_directory(memory):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        os.rmdir(memory / "folder")
    assert failure.value.errno == errno.ENOTEMPTY
    os.rmdir(memory / "empty")
    with open(memory / "removable") as file:
        os.unlink(memory / "removable")
        assert not os.path.exists(memory / "removable")
        assert file.read() == "hello\n"
    assert not [name for name in os.listdir(memory) if name.startswith(".fuse_hidden")]


def test_internal_error_is_eio_and_logged_once(memory):
    with pytest.raises(OSError) as failure:  # noqa: PT011
        (memory / "broken").read_bytes()
    assert failure.value.errno == errno.EIO
    assert log_of(memory).count("ZeroDivisionError: on purpose") == 1


def test_xattr_calls_are_unsupported_and_send_no_request(memory):
    for ask in (lambda path: os.getxattr(path, "user.tinker.path"), os.listxattr):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            ask(memory / "hello")
        assert failure.value.errno == errno.EOPNOTSUPP


def test_df_shows_the_file_system_size(memory):
    status = os.statvfs(memory)
    assert status.f_blocks * status.f_frsize == 1 << 30
    assert status.f_bavail * status.f_frsize == 1 << 29
    assert status.f_namemax == 255


def test_read_only_mount_is_enforced_by_the_kernel(mountpoint, binding):
    with memory_mount(mountpoint, binding, "--read-only"):
        with pytest.raises(OSError) as failure:  # noqa: PT011
            (mountpoint / "control").write_text("1")
        assert failure.value.errno == errno.EROFS
