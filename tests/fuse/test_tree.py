"""Aspects of the tree that involve the kernel: owners, modes, names and flags."""

import os
import stat

import pytest

from tests.support.account import HOSTILE_NAMES, account, every_binding, make_account, quoted
from tinkerfs import name_encoding

__all__ = ["account", "make_account"]

pytestmark = every_binding

OTHER_UID = 65534


def let_others_reach(mountpoint):
    """Make the parent directories accessible to others; pytest creates them with mode 0700."""
    for directory in mountpoint.parents:
        if directory.stat().st_uid == os.getuid() and directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(directory.stat().st_mode | 0o055)


def test_stat_and_scandir_agree_on_every_name(account):
    for directory, _directories, _files in os.walk(account.root):
        with os.scandir(directory) as entries:
            for entry in entries:
                status = os.lstat(entry.path)
                assert entry.inode() == status.st_ino
                assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
                assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)
                assert entry.stat(follow_symlinks=False).st_size == status.st_size


def test_inodes_are_the_same_in_another_mount(account, make_account):
    run = account.server.account.run_ids[0]
    other = make_account(runs=3, checkpoints=4)
    for path in ("", "runs", f"runs/{run}", f"runs/{run}/checkpoints/weights/0001/info.json"):
        if path:
            assert os.lstat(account.path(path)).st_ino == os.lstat(other.path(path)).st_ino


def test_open_file_has_its_exact_size(account):
    run = account.server.account.run_ids[0]
    for path in ("README.md", f"runs/{run}/info.json", f"runs/{run}/latest/info.json"):
        with open(account.path(path), "rb") as file:
            assert os.fstat(file.fileno()).st_size == len(file.read())


def test_read_at_any_offset_returns_the_same_bytes(account):
    with open(account.path("README.md"), "rb", buffering=0) as file:
        content = file.readall()
        assert os.pread(file.fileno(), 10, len(content)) == b""
        assert os.pread(file.fileno(), 10, len(content) - 4) == content[-4:]
        assert os.pread(file.fileno(), 7, 3) == content[3:10]
        assert os.pread(file.fileno(), 1 << 20, 0) == content


def test_hostile_names_are_usable_in_a_shell(account):
    run = account.new_run(*(f"weights/{name}" for name in HOSTILE_NAMES))
    directory = f"{run}/checkpoints/weights"
    done = account.sh(f'cd {quoted(directory)} && for c in *; do cat -- "$c/tinker_path"; done')
    assert done.returncode == 0, done
    output = account.sh(f"cd {quoted(directory)} && find . -mindepth 1 -maxdepth 1 -print0").stdout
    found = {name.removeprefix("./") for name in output.split("\0") if name}
    assert found == {name_encoding.encode(name) for name in HOSTILE_NAMES}
    assert not os.path.exists(account.root / "passwd")
    account.server.account.remove_run(run.partition("/")[2])


def test_too_long_name_does_not_exist(account):
    # Linux passes FUSE names of more than 255 bytes to the file system, which must reject them.
    assert "No such file" in account.sh(f"ls runs/{'x' * 256}").stderr


def test_checkpoint_with_truncated_name_can_be_removed(account):
    name = "x" * 400
    run = account.new_run(f"weights/{name}")
    done = account.sh(f"rm -r {run}/checkpoints/weights/x*")
    assert (done.returncode, done.stderr) == (0, "")
    assert account.checkpoint_ids(run) == set()
    account.server.account.remove_run(run.partition("/")[2])


def test_kernel_enforces_permissions(make_account, needs_root):
    account = make_account(runs=1, checkpoints=2, settings={"allow_other": True})
    run = account.server.account.run_ids[0]
    let_others_reach(account.root)

    def as_other_user(script):
        return account.sh(script, user=OTHER_UID, group=OTHER_UID, extra_groups=[])

    checkpoint = f"runs/{run}/checkpoints/weights/0001"
    assert as_other_user(f"cat {checkpoint}/info.json").returncode == 0
    for script in (
        f"cat {checkpoint}/archive_url",
        "cat .tinkerfs/errors",
        "cat .tinkerfs/changes",
        f"echo 1 > {checkpoint}/published",
        "echo 1 > .tinkerfs/refresh",
        f"rm -rf {checkpoint}",
        f"rmdir {checkpoint}",
        "rm -rf runs",
    ):
        done = as_other_user(script)
        assert "Permission denied" in done.stderr, script
    assert account.server.journal.count("GET archive") == 0
    assert len(account.checkpoint_ids()) == 2


def test_mount_for_another_user(make_account, needs_root):
    settings = {"allow_other": True, "uid": OTHER_UID, "gid": OTHER_UID, "umask": 0o077}
    account = make_account(runs=1, checkpoints=2, settings=settings)
    let_others_reach(account.root)
    run = account.server.account.run_ids[0]
    checkpoint = f"runs/{run}/checkpoints/weights/0001"
    done = account.sh(
        f"echo 1 > {checkpoint}/published && cat {checkpoint}/published"
        f" && stat -c '%a %u %g' {checkpoint}"
        f" && rm -r {checkpoint}; cat runs/{run}/latest_sampler/archive_url",
        user=OTHER_UID,
        group=OTHER_UID,
        extra_groups=[],
    )
    assert done.stdout.startswith(f"1\n700 {OTHER_UID} {OTHER_UID}\nhttp"), done
    assert "weights/0001" not in {name.partition("/")[2] for name in account.checkpoint_ids()}
    assert f"uid {OTHER_UID}" in account.changes()


def test_read_only_mount_rejects_changes(make_account):
    account = make_account(runs=1, checkpoints=2, settings={"read_only": True})
    run = account.server.account.run_ids[0]
    checkpoint = f"runs/{run}/checkpoints/weights/0001"
    for script in (
        f"echo 1 > {checkpoint}/published",
        f"rm -rf {checkpoint}",
        f"rmdir {checkpoint}",
        "touch new",
        "mkdir new",
        f"mv {checkpoint} new",
        f"chmod 777 {checkpoint}/published",
    ):
        done = account.sh(script)
        assert "Read-only file system" in done.stderr, script
    assert "w" not in account.sh("ls -lR . | grep -v ^l | cut -c1-10 | tr -d '\\n'").stdout
    assert len(account.checkpoint_ids()) == 2
    assert account.sh(f"cat {checkpoint}/archive_url").stdout.startswith("http")


@pytest.mark.parametrize("path", ["README.md", "runs", ".tinkerfs/errors"])
def test_xattrs_are_unsupported_and_send_no_request(account, path):
    account.server.journal.clear()
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(account.path(path), "user.tinker.path")
    assert account.server.journal.count("api") == 0


def test_open_directory_lists_its_content_at_opendir(account):
    run = account.new_run(*(f"weights/{n:04}" for n in range(600)))
    directory = account.path(f"{run}/checkpoints/weights")
    with os.scandir(directory) as entries:
        first = next(entries).name
        account.server.account.add_checkpoint(run.partition("/")[2], "weights/new")
        account.refresh()
        rest = {entry.name for entry in entries}
    assert len(rest) == 599
    assert first not in rest
    assert len(os.listdir(directory)) == 601
    account.server.account.remove_run(run.partition("/")[2])
