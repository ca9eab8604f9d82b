"""The tree on real mounts, as far as the kernel has a say in it: owners, modes, names, flags."""

import os
import stat

import pytest

from tests.support.account import HOSTILE_NAMES, account, make_account, quoted
from tinkerfs import name_encoding

__all__ = ["account", "make_account"]

NOBODY = 65534


def let_others_reach(mountpoint):
    """Open the folders above it, which pytest keeps to the user who runs it."""
    for folder in mountpoint.parents:
        if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)


def test_the_kernel_agrees_with_itself_about_every_name(account):
    for folder, _folders, _files in os.walk(account.root):
        with os.scandir(folder) as entries:
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


def test_an_open_file_tells_its_exact_size(account):
    run = account.server.account.run_ids[0]
    for path in ("README.md", f"runs/{run}/info.json", f"runs/{run}/latest/info.json"):
        with open(account.path(path), "rb") as file:
            assert os.fstat(file.fileno()).st_size == len(file.read())


def test_a_file_reads_the_same_from_anywhere(account):
    with open(account.path("README.md"), "rb", buffering=0) as file:
        whole = file.readall()
        assert os.pread(file.fileno(), 10, len(whole)) == b""
        assert os.pread(file.fileno(), 10, len(whole) - 4) == whole[-4:]
        assert os.pread(file.fileno(), 7, 3) == whole[3:10]
        assert os.pread(file.fileno(), 1 << 20, 0) == whole


def test_hostile_names_in_a_shell(account):
    run = account.new_run(*(f"weights/{name}" for name in HOSTILE_NAMES))
    folder = f"{run}/checkpoints/weights"
    done = account.sh(f'cd {quoted(folder)} && for c in *; do cat -- "$c/tinker_path"; done')
    assert done.returncode == 0, done
    shown = account.sh(f"cd {quoted(folder)} && find . -mindepth 1 -maxdepth 1 -print0").stdout
    found = {name.removeprefix("./") for name in shown.split("\0") if name}
    assert found == {name_encoding.encode(name) for name in HOSTILE_NAMES}
    assert not os.path.exists(account.root / "passwd")
    account.server.account.remove_run(run.partition("/")[2])


def test_a_name_that_is_too_long_is_nowhere(account):
    # Linux lets a FUSE name be longer than POSIX's 255 bytes, so that it comes to us to say so.
    assert "No such file" in account.sh(f"ls runs/{'x' * 256}").stderr


def test_a_cut_name_can_be_removed(account):
    name = "x" * 400
    run = account.new_run(f"weights/{name}")
    done = account.sh(f"rm -r {run}/checkpoints/weights/x*")
    assert (done.returncode, done.stderr) == (0, "")
    assert account.checkpoint_ids(run) == set()
    account.server.account.remove_run(run.partition("/")[2])


def test_permissions_are_the_kernel_s_to_keep(make_account, needs_root):
    account = make_account(runs=1, checkpoints=2, settings={"allow_other": True})
    run = account.server.account.run_ids[0]
    let_others_reach(account.root)

    def as_nobody(script):
        return account.sh(script, user=NOBODY, group=NOBODY, extra_groups=[])

    place = f"runs/{run}/checkpoints/weights/0001"
    assert as_nobody(f"cat {place}/info.json").returncode == 0
    for script in (
        f"cat {place}/archive_url",
        "cat .tinkerfs/errors",
        "cat .tinkerfs/changes",
        f"echo 1 > {place}/published",
        "echo 1 > .tinkerfs/refresh",
        f"rm -rf {place}",
        f"rmdir {place}",
        "rm -rf runs",
    ):
        done = as_nobody(script)
        assert "Permission denied" in done.stderr, script
    assert account.server.journal.count("GET archive") == 0
    assert len(account.checkpoint_ids()) == 2


def test_a_mount_for_somebody_else(make_account, needs_root):
    settings = {"allow_other": True, "uid": NOBODY, "gid": NOBODY, "umask": 0o077}
    account = make_account(runs=1, checkpoints=2, settings=settings)
    let_others_reach(account.root)
    run = account.server.account.run_ids[0]
    place = f"runs/{run}/checkpoints/weights/0001"
    done = account.sh(
        f"echo 1 > {place}/published && cat {place}/published && stat -c '%a %u %g' {place}"
        f" && rm -r {place}; cat runs/{run}/latest_sampler/archive_url",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    assert done.stdout.startswith(f"1\n700 {NOBODY} {NOBODY}\nhttp"), done
    assert "weights/0001" not in {name.partition("/")[2] for name in account.checkpoint_ids()}
    assert f"uid {NOBODY}" in account.changes()


def test_a_read_only_mount(make_account):
    account = make_account(runs=1, checkpoints=2, settings={"read_only": True})
    run = account.server.account.run_ids[0]
    place = f"runs/{run}/checkpoints/weights/0001"
    for script in (
        f"echo 1 > {place}/published",
        f"rm -rf {place}",
        f"rmdir {place}",
        "touch new",
        "mkdir new",
        f"mv {place} new",
        f"chmod 777 {place}/published",
    ):
        done = account.sh(script)
        assert "Read-only file system" in done.stderr, script
    assert "w" not in account.sh("ls -lR . | grep -v ^l | cut -c1-10 | tr -d '\\n'").stdout
    assert len(account.checkpoint_ids()) == 2
    assert account.sh(f"cat {place}/archive_url").stdout.startswith("http")


@pytest.mark.parametrize("path", ["README.md", "runs", ".tinkerfs/errors"])
def test_xattrs_are_not_supported_and_cost_no_call(account, path):
    account.server.journal.clear()
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(account.path(path), "user.tinker.path")
    assert account.server.journal.count("api") == 0


def test_an_open_folder_lists_what_was_there_when_it_was_opened(account):
    run = account.new_run(*(f"weights/{n:04}" for n in range(600)))
    folder = account.path(f"{run}/checkpoints/weights")
    with os.scandir(folder) as entries:
        first = next(entries).name
        account.server.account.add_checkpoint(run.partition("/")[2], "weights/new")
        account.refresh()
        rest = {entry.name for entry in entries}
    assert len(rest) == 599
    assert first not in rest
    assert len(os.listdir(folder)) == 601
    account.server.account.remove_run(run.partition("/")[2])
