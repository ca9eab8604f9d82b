"""mount(8) with lines of fstab, of other FUSE programs too, and mounts with missing privileges.

Nothing here depends on the binding, so each test runs under one.
"""

import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.support.mount import ROOT, force_unmount, run, tinkerfs, wait_until
from tinkerfs.fuse import mount_table

#: Script that lets all users open /dev/fuse, in a mount namespace.
DEVICES = """
    mount -t tmpfs -o mode=755 none /dev
    mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/null c 1 3
    mknod -m 666 /dev/urandom c 1 9
"""
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


@pytest.fixture
def with_fstab(env, tmp_path):
    """Return a function that runs a shell script with a line of /etc/fstab and mount helpers.

    The script runs in a new mount namespace, in which /sbin has the helpers, and /etc/fstab has
    only this line.
    """
    helpers = tmp_path / "sbin"
    helpers.mkdir()
    for name in ("mount.tinkerfs", "mount.fuse.tinkerfs"):
        (helpers / name).symlink_to(Path(sys.executable).with_name("tinkerfs"))
    fstab = tmp_path / "fstab"

    def run_script(line, script):
        fstab.write_text(f"{line}\n")
        setup = f"""
            set -e
            sbin=$(readlink -f /sbin)
            mount -t overlay overlay -o lowerdir={helpers}:$sbin $sbin
            mount --bind {fstab} /etc/fstab
        """
        return run("unshare", "-m", "sh", "-c", f"{setup}{script}", env=env)

    return run_script


def test_fstab_line_of_own_type_mounts_once(mountpoint, with_fstab, needs_root):
    options = "_netdev,nofail,x-systemd.automount,x-systemd.requires=a.service,allow_other,ro,ttl=5"
    done = with_fstab(
        f"tinker  {mountpoint}  tinkerfs  {options}  0  0",
        f"""
            mount -a
            ls {mountpoint}/runs | wc -l
            mount -a                                   # already mounted: nothing to do
            findmnt --noheadings --output SOURCE,FSTYPE {mountpoint}
            if mount -o remount,rw {mountpoint}; then exit 9; fi
            ls {mountpoint}/runs | wc -l
            umount {mountpoint}
            mount --fake {mountpoint}
            findmnt {mountpoint} || echo none
        """,
    )
    assert done.returncode == 0, done
    assert done.stdout.split() == ["10", "tinker", "fuse.tinkerfs", "10", "none"]
    (refusal,) = done.stderr.splitlines()
    assert refusal.startswith("tinkerfs: -o remount: a mounted file system has the options of its")


def test_fstab_line_with_noauto_waits_for_mount(mountpoint, with_fstab, server, needs_root):
    done = with_fstab(
        f"{server.base_url}  {mountpoint}  fuse.tinkerfs  noauto,_netdev  0  0",
        f"""
            mount -a
            findmnt {mountpoint} || echo none
            mount {mountpoint}
            findmnt --noheadings --output SOURCE {mountpoint}
            umount {mountpoint}
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["none", server.base_url]


def _let_others_run_this_interpreter():
    """Return a script that opens a way to this interpreter and checkout, in a mount namespace.

    Each may be in the home directory of root, or in another private directory.
    """
    hidden = {}
    for path in (Path(sys.base_prefix), ROOT, Path(sys.prefix)):
        parents = reversed(path.parents)
        closed = next((each for each in parents if not each.stat().st_mode & stat.S_IXOTH), None)
        if closed is not None:
            hidden.setdefault(closed, []).append(path)
    script = "mount -t tmpfs none /mnt"
    for closed, paths in hidden.items():
        for number, path in enumerate(paths):
            script += f"""
                mkdir -p /mnt/{number}
                mount --bind {path} /mnt/{number}
            """
        script += f"""
            mount -t tmpfs -o mode=755 none {closed}
        """
        for number, path in enumerate(paths):
            script += f"""
                mkdir -p {path}
                mount --move /mnt/{number} {path}
            """
    return script


def test_fstab_line_with_user_lets_users_mount(public_directory, with_fstab, env, needs_root):
    env["HOME"] = str(public_directory.with_name("home"))
    done = with_fstab(
        f"tinker  {public_directory}  fuse.tinkerfs  user,noauto  0  0",
        f"""
            {_let_others_run_this_interpreter()}
            {DEVICES}
            as_user="{" ".join(AS_OTHER_USER)}"
            $as_user mount {public_directory}
            $as_user ls {public_directory}/runs | wc -l
            findmnt --noheadings --output OPTIONS {public_directory} | tr , '\n' | grep user_id
            $as_user umount {public_directory}
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\nuser_id=65534\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tinker", "usage: mount.tinkerfs SOURCE MOUNTPOINT [-o OPTIONS]"),
        ("/dev/sda1 /mnt", "unknown source '/dev/sda1' (hint: `tinker`, or a URL)"),
        ("tinker /mnt -x", "option -x not recognized (see mount(8), EXTERNAL HELPERS)"),
        ("tinker /mnt -o ro,xyzzy=1", "-o xyzzy: unknown option (hint: valid options: "),
        ("tinker /does/not/exist -s -o xyzzy=1", "/does/not/exist does not exist (hint: mkdir"),
    ],
)
def test_mount_helper_explains_errors(arguments, message, tmp_path, env):
    helper = tmp_path / "mount.tinkerfs"
    helper.symlink_to(Path(sys.executable).with_name("tinkerfs"))
    done = run(helper, *arguments.split(), env=env)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tinkerfs: {message}")


def test_mount_before_the_network_serves_when_the_api_does(mountpoint, env, demo_server):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    env["TINKER_BASE_URL"] = f"http://127.0.0.1:{port}"
    done = tinkerfs("mount", mountpoint, env=env)
    assert done.returncode == 0
    assert "without a response from the server" in done.stderr
    with pytest.raises(OSError, match="No route to host"):
        os.listdir(mountpoint / "runs")
    demo_server(port=port)
    wait_until(lambda: _can_list(mountpoint / "runs"))


def _can_list(directory):
    with contextlib.suppress(OSError):
        return len(os.listdir(directory)) == 10
    return False


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
        {DEVICES}
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
