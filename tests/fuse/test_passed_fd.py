"""`tinkerfs mount /dev/fd/N`: a privileged process mounts, and passes the descriptor."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mount import ROOT, force_unmount, run, tinkerfs, wait_until
from tests.support.passed_fd import RECEIVE_FD, UID, in_pod, mount_fd, send_fd
from tinkerfs.fuse import mount_table

TINKERFS = (sys.executable, "-m", "tinkerfs")


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def directory():
    """Return a directory with `mnt`, of which the user of the pod owns `cache`."""
    path = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    path.chmod(0o755)
    for name in ("mnt", "other", "cache"):
        (path / name).mkdir()
    for name in ("other", "cache"):
        os.chown(path / name, UID, UID)
    yield path
    for name in ("mnt", "other"):
        force_unmount(str(path / name))
    shutil.rmtree(path)


@pytest.fixture
def pod_env(server, directory):
    """Return the environment of a container: no HOME, no XDG_RUNTIME_DIR, no user name."""
    return {
        **server.environment,
        "PATH": os.environ["PATH"],
        "TINKERFS_FUSE_BINDING": "mfusepy3",
        "TINKERFS_CACHE_DIR": str(directory / "cache"),
    }


@pytest.fixture
def mounted_fd(directory, needs_root):
    """Return the descriptor of a mount at `mnt` that has no daemon yet."""
    with ExitStack() as stack:
        fd = mount_fd(directory / "mnt")
        stack.callback(os.close, fd)
        yield fd


@pytest.fixture
def start(pod_env):
    """Return a function that starts a command, and kills it after the test."""
    started = []

    def popen(*command, **kwargs):
        options = {"env": pod_env, "cwd": ROOT, "stdin": subprocess.DEVNULL, **kwargs}
        process = subprocess.Popen(
            [str(part) for part in command], stderr=subprocess.PIPE, text=True, **options
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.wait(20)
        process.stderr.close()


def fd_daemons(fd, directory):
    """Return the daemons of a mount, without those that parallel tests serve by that number."""
    device = mount_table.find_mount(str(directory / "mnt")).device
    found = mount_table.find_fd_daemons()
    return [each for each in found if (each.name, each.device) == (f"/dev/fd/{fd}", device)]


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


def close_here(fd):
    """Replace a descriptor: only the daemon may hold that of the mount."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), fd)


def runs(mountpoint):
    return len(os.listdir(mountpoint / "runs"))


@pytest.mark.parametrize("flags", [(), ("--foreground",)], ids=["background", "foreground"])
def test_daemon_without_privileges_serves_passed_fd(flags, mounted_fd, directory, start):
    mountpoint = directory / "mnt"
    command = (*TINKERFS, "mount", *flags, f"/dev/fd/{mounted_fd}")
    process = start(*in_pod(directory, *command), pass_fds=(mounted_fd,))
    close_here(mounted_fd)
    if not flags:
        assert process.wait(60) == 0, process.stderr.read()
    assert runs(mountpoint) == 10, "in another mount namespace than the daemon"
    assert (mountpoint / "README.md").read_text().startswith("# ")
    [daemon] = fd_daemons(mounted_fd, directory)
    mount = mount_table.find_mount(str(mountpoint))
    assert mount_table.find_daemon_pids(mount) == [daemon.pid]
    fields = status_of(daemon.pid)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert {fields[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd", "Inh", "Amb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: not mount_table.is_running(daemon.pid), 20)
    if flags:
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    assert mount_table.find_mount(str(mountpoint)) is not None, "the other process unmounts"
    assert mount_table.check_health(str(mountpoint)) == "dead"


def test_unmount_by_the_other_process_ends_daemon(mounted_fd, directory, start):
    mountpoint = directory / "mnt"
    process = start(
        *in_pod(directory, *TINKERFS, "mount", "--foreground", f"/dev/fd/{mounted_fd}"),
        pass_fds=(mounted_fd,),
    )
    close_here(mounted_fd)
    assert runs(mountpoint) == 10
    mount_table.unmount(str(mountpoint))
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_status_and_umount_of_passed_fd(mounted_fd, directory, start, pod_env):
    name = f"/dev/fd/{mounted_fd}"
    unused = tinkerfs("status", "/dev/fd/987654", env=pod_env)
    assert (unused.returncode, unused.stdout) == (1, "")
    assert "/dev/fd/987654 is not a tinkerfs mount (hint: " in unused.stderr
    process = start(
        *in_pod(directory, *TINKERFS, "mount", "--foreground", name), pass_fds=(mounted_fd,)
    )
    close_here(mounted_fd)
    assert runs(directory / "mnt") == 10
    [daemon] = fd_daemons(mounted_fd, directory)
    # Where the mount is visible it is shown by its mountpoint, elsewhere by the descriptor.
    shown = tinkerfs("status", directory / "mnt", env=pod_env)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"process  {daemon.pid}\n" in shown.stdout
    enter = f"umount -l {directory}/mnt; exec {' '.join(TINKERFS)} status {name}"
    shown = run("unshare", "-m", "sh", "-c", enter, env=pod_env, cwd=ROOT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"served by process {daemon.pid}; its mountpoint is in another" in shown.stdout
    refused = tinkerfs("umount", name, env=pod_env)
    assert refused.returncode == 1
    assert "unmounted by the process that mounted it" in refused.stderr
    done = tinkerfs("umount", directory / "mnt", env=pod_env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert process.wait(20) == 0


def _closed(_directory):
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


def _unmounted(directory):
    fd = mount_fd(directory / "mnt")
    mount_table.unmount(str(directory / "mnt"), lazy=True)
    return fd


UNUSABLE = {
    "closed": (_closed, "is closed"),
    "other-file": (lambda _: os.open(os.devnull, os.O_RDWR), "is /dev/null, not /dev/fuse"),
    "read-only": (lambda _: os.open("/dev/fuse", os.O_RDONLY), "reading and writing"),
    "never-mounted": (lambda _: os.open("/dev/fuse", os.O_RDWR), "is not mounted"),
    "unmounted": (_unmounted, "is not mounted, or not any more"),
    "standard-stream": (lambda _: 0, "is a standard stream"),
}


@pytest.mark.parametrize("flags", [(), ("--foreground",)], ids=["background", "foreground"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_fd_is_a_one_line_error(case, flags, directory, pod_env, needs_root):
    make, message = UNUSABLE[case]
    fd = make(directory)
    done = run(
        *TINKERFS,
        "mount",
        *flags,
        f"/dev/fd/{fd}",
        env=pod_env,
        cwd=ROOT,
        pass_fds=() if case == "closed" else (fd,),
    )
    if fd and case != "closed":
        os.close(fd)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"tinkerfs: /dev/fd/{fd} ")
    assert message in line
    assert "(hint: " in line


def test_fd_of_another_daemon_is_refused(mounted_fd, directory, start, pod_env):
    command = (*TINKERFS, "mount", "--foreground", f"/dev/fd/{mounted_fd}")
    start(*command, pass_fds=(mounted_fd,))
    assert runs(directory / "mnt") == 10
    second = run(*command, env=pod_env, cwd=ROOT, pass_fds=(mounted_fd,))
    assert second.returncode == 1
    assert "is or was served by another process" in second.stderr
    assert runs(directory / "mnt") == 10
    [daemon] = fd_daemons(mounted_fd, directory)
    os.kill(daemon.pid, signal.SIGTERM)


@pytest.mark.parametrize("flags", [(), ("--foreground",)], ids=["background", "foreground"])
@pytest.mark.parametrize("name", ["fusepy", "mfusepy2"])
def test_libfuse_2_refuses_fd(name, flags, mounted_fd, pod_env):
    command = (*TINKERFS, "mount", *flags, f"/dev/fd/{mounted_fd}")
    env = pod_env | {"TINKERFS_FUSE_BINDING": name}
    done = run(*command, env=env, cwd=ROOT, pass_fds=(mounted_fd,))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "libfuse 2.9 (libfuse.so.2) cannot serve a descriptor, libfuse 3 can (hint: " in line


@pytest.fixture
def driver(directory, needs_root):
    """A privileged process in a thread, which mounts for each connection to its socket.

    It sends the descriptor with the message `{}`.
    """
    path = directory / "driver.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the listener is shut down
                    return
                with connection:
                    fd = mount_fd(directory / "mnt", fstype="fuse")
                    send_fd(connection, b"{}", fd)
                    os.close(fd)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def test_fd_from_unix_socket_is_served(driver, directory, start):
    """Start the daemon as the starters of CSI drivers do, with the descriptor as number 3."""
    starter = (sys.executable, RECEIVE_FD, driver)
    process = start(*in_pod(directory, *starter, *TINKERFS, "mount", "--foreground", "/dev/fd/3"))
    wait_until(lambda: mount_table.find_mount(str(directory / "mnt")) is not None, 30)
    assert runs(directory / "mnt") == 10
    mount_table.unmount(str(directory / "mnt"))
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


#: A fusermount3 without privileges, as CSI drivers and sandboxes install it: it passes on the
#: descriptor of the privileged process to the socket of libfuse, and leaves unmounting to it.
PROXY = """
import os, socket, sys
if "-u" in sys.argv or "--unmount" in sys.argv:
    sys.exit(0)
driver = socket.socket(socket.AF_UNIX)
driver.connect({driver!r})
_, [message], _, _ = driver.recvmsg(4096, socket.CMSG_SPACE(4))
libfuse = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
libfuse.sendmsg([b"\\0"], [message])
"""


def test_fusermount3_proxy_mounts_elsewhere(driver, directory, start):
    proxy = directory / "fusermount3"
    proxy.write_text(f"#!{sys.executable}\n{PROXY.format(driver=str(driver))}")
    proxy.chmod(0o755)
    setup = f"""
        mknod -m 666 /dev/fuse c 10 229
        mount --bind {proxy} "$(readlink -f "$(command -v fusermount3)")"
    """
    command = (*TINKERFS, "mount", "--foreground", directory / "other")
    process = start(*in_pod(directory, *command, devices=setup))
    wait_until(lambda: mount_table.find_mount(str(directory / "mnt")) is not None, 30)
    assert runs(directory / "mnt") == 10
    assert mount_table.find_mount(str(directory / "other")) is None
    process.terminate()
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    assert mount_table.check_health(str(directory / "mnt")) == "dead"


def test_mount_fuse3_drops_privileges(directory, as_installed, needs_root):
    """Mount by mount(8): its helper passes a descriptor, and drops every capability."""
    done = as_installed(f"""
        mount -t fuse3 tinkerfs#tinker {directory}/mnt -o drop_privileges,ro
        ls {directory}/mnt/runs | wc -l
        pid=$({sys.executable} -m tinkerfs status --json {directory}/mnt | jq .[0].pid)
        grep CapEff /proc/$pid/status
        umount {directory}/mnt
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"10\nCapEff:\t{'0' * 16}\n"


def test_mountpoint_on_read_only_root_names_it(directory, pod_env, needs_root):
    setup = "mknod -m 666 /dev/fuse c 10 229; mount -o remount,bind,ro /"
    command = (*TINKERFS, "mount", directory / "other")
    done = run(*in_pod(directory, *command, devices=setup), env=pod_env, cwd=ROOT)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "/other is on a read-only file system, where only root can mount (hint: " in line


@pytest.mark.parametrize(
    ("root", "cache"),
    [("ro", ""), ("ro", "var/tmp"), ("rw", "var/tmp")],
    ids=["read-only", "read-only-with-volume", "writable"],
)
def test_cache_of_pod_without_home_or_user(root, cache, mounted_fd, directory, start, pod_env):
    """Use `/var/tmp`, which every user may write to, or memory; a warning is one line."""
    del pod_env["TINKERFS_CACHE_DIR"]
    volume = f"mount -t tmpfs -o mode=1777 none /{cache}" if cache else ""
    setup = f"""
        {volume}
        mount -o remount,bind,{root} /
    """
    command = (*TINKERFS, "mount", "--foreground", f"/dev/fd/{mounted_fd}")
    process = start(*in_pod(directory, *command, devices=setup), pass_fds=(mounted_fd,))
    close_here(mounted_fd)
    assert runs(directory / "mnt") == 10
    [daemon] = fd_daemons(mounted_fd, directory)
    statistics = (directory / "mnt/.tinkerfs/stats.json").read_text()
    os.kill(daemon.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    output = process.stderr.read()
    if cache:
        assert output == ""
        assert f'"cache_dir": "/var/tmp/tinkerfs-{UID}"' in statistics
    else:
        [line] = output.splitlines()
        assert "caching only in memory: the cache directory " in line
        assert "cannot be written: Read-only file system (hint: " in line
        assert '"cache_dir": null' in statistics


@pytest.mark.parametrize(
    ("reply", "message"),
    [(None, "No such file or directory"), (b"{}", "the message contains no descriptor")],
    ids=["no-socket", "no-descriptor"],
)
def test_receive_fd_reports_error_in_one_line(reply, message, tmp_path):
    path = tmp_path / "socket"
    command = (sys.executable, str(RECEIVE_FD), str(path), "true")
    with socket.socket(socket.AF_UNIX) as listener:
        if reply is not None:
            listener.bind(str(path))
            listener.listen()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if reply is not None:
            with listener.accept()[0] as connection:
                connection.sendall(reply)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == f"receive-fd: {path}: {message}\n"
