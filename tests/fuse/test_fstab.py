"""mount(8) with fstab lines of other FUSE programs, and mounts with missing privileges.

Nothing here depends on the binding, so each test runs under one.
"""

import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.support.mount import force_unmount, run, tinkerfs
from tinkerfs.fuse import mount_table

AS_OTHER_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.mark.parametrize(
    "options",
    [
        "rw,noauto,nofail,_netdev,x-systemd.automount,allow_other,default_permissions",  # rclone
        "_netdev,users,idmap=user,allow_other,reconnect,delay_connect",  # sshfs
        "_netdev,allow_other,umask=0022,uid=1000,nonempty,kernel_cache,max_background=64",  # s3fs
        "rw,auto,users,exec,uid=1000,gid=1000,umask=022,big_writes,permissions",  # ntfs-3g
    ],
)
def test_fstab_line_of_another_program_mounts(options, mountpoint, as_installed, needs_root):
    if "idmap" in options:
        done = as_installed(f"mount -t fuse.tinkerfs tinker {mountpoint} -o {options}")
        assert done.returncode != 0
        assert "-o idmap: unknown option" in done.stderr
        options = options.replace("idmap=user,", "")
    done = as_installed(
        f"mount -t fuse.tinkerfs tinker {mountpoint} -o {options};"
        f" ls {mountpoint}/runs | wc -l; umount {mountpoint}"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")


def test_umount_without_privilege_calls_fusermount(mountpoint, env, tmp_path, needs_root):
    """Unmount as in a container with a fusermount3 that forwards the request to the host."""
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    programs = tmp_path / "bin"
    programs.mkdir()
    shim = programs / "fusermount3"
    shim.write_text(f'#!/bin/sh\necho "$@" > {fifo}\nread status < {fifo}\n')
    shim.chmod(0o755)
    commands = []

    def serve():
        commands.append(fifo.read_text())
        mount_table.unmount(str(mountpoint))
        fifo.write_text("done\n")

    host = threading.Thread(target=serve, daemon=True)
    host.start()
    env["PATH"] = f"{programs}:{env['PATH']}"
    done = run("unshare", "-Ur", sys.executable, "-m", "tinkerfs", "umount", mountpoint, env=env)
    host.join(10)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert commands == [f"-u -- {mountpoint}\n"]
    assert mount_table.find_mount(str(mountpoint)) is None


def test_umount_without_any_privilege_reports_error(mountpoint, env, needs_root):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    done = run("unshare", "-Ur", sys.executable, "-m", "tinkerfs", "umount", mountpoint, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{mountpoint} cannot be unmounted: " in line
    assert "fusermount3: " in line
    assert os.path.ismount(mountpoint)
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0


@pytest.fixture
def public_directory():
    """Return a mountpoint that other users can access, unlike pytest's own directories."""
    directory = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    (directory / "mnt").mkdir()
    (directory / "home").mkdir()
    for each in (directory, directory / "mnt", directory / "home"):
        each.chmod(0o755)
        os.chown(each, 65534, 65534)
    yield directory / "mnt"
    force_unmount(str(directory / "mnt"))
    shutil.rmtree(directory)


def test_mount_denied_by_apparmor_names_it(public_directory, env, tmp_path, needs_root):
    """Mount with a fusermount3 that fails as if AppArmor confined it."""
    shim = tmp_path / "fusermount3"
    shim.write_text('#!/bin/sh\necho "fusermount3: mount failed: Permission denied" >&2\nexit 1\n')
    shim.chmod(0o755)
    user = [
        *AS_OTHER_USER,
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
    ]
    script = f"""
        set -e
        mount -t tmpfs -o mode=755 none /dev
        mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/null c 1 3
        mknod -m 666 /dev/urandom c 1 9
        mount --bind {shim} $(readlink -f $(command -v fusermount3))
        mount -t tmpfs none /sys/module
        mkdir -p /sys/module/apparmor/parameters
        echo Y > /sys/module/apparmor/parameters/enabled
        exec {" ".join(user)} {sys.executable} -m tinkerfs mount {public_directory}
    """
    env["HOME"] = str(public_directory.with_name("home"))
    done = run("unshare", "-m", "sh", "-c", script, env=env)
    assert done.returncode == 1, done
    assert "AppArmor confines fusermount3" in done.stderr
    assert "/etc/apparmor.d/local/fusermount3" in done.stderr
    assert "--cap-add" not in done.stderr
