"""Life of a mount, from `tinkerfs mount` to the end of its process."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.mount import force_unmount, run, tinkerfs, wait_until
from tinkerfs.fuse import mount_table

OTHER_UID = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def mounted(mountpoint, env):
    done = tinkerfs("mount", mountpoint, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    yield mountpoint
    tinkerfs("umount", "--force", mountpoint, env=env)


@pytest.fixture
def public_directory():
    """Return a mountpoint that other users can access; pytest's directories may have mode 0700."""
    directory = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    directory.chmod(0o755)
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    yield mountpoint
    force_unmount(str(mountpoint))
    shutil.rmtree(directory)


def daemon_of(mountpoint):
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    return pid


def error_line(done, code=1):
    """Check that a command failed with one line of output; return the line."""
    assert done.returncode == code, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinkerfs: ")
    return line


def test_mount_returns_when_ready_and_umount_when_gone(mounted, env):
    assert len(os.listdir(mounted / "runs")) == 10
    pid = daemon_of(mounted)
    done = tinkerfs("umount", mounted, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not mount_table.is_running(pid)
    assert mount_table.find_mount(str(mounted)) is None


def test_daemon_detaches_from_terminal_and_directory(mounted, server, env):
    process = f"/proc/{daemon_of(mounted)}"
    assert {os.readlink(f"{process}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
    assert os.readlink(f"{process}/cwd") == "/"
    assert int(Path(f"{process}/stat").read_text().rpartition(")")[2].split()[3]) != os.getsid(0)
    command = Path(f"{process}/cmdline").read_bytes()
    assert server.api_key.encode() not in command
    assert b"--serve" in command


def test_captured_output_of_mount_ends_with_the_command(mountpoint, env):
    script = f"{sys.executable} -m tinkerfs mount {mountpoint} 2>&1 | cat"
    assert run("sh", "-c", script, env=env, timeout_s=20).returncode == 0
    assert os.path.ismount(mountpoint)


def test_ctrl_c_before_the_mount_is_ready_leaves_nothing(mountpoint, env, server):
    server.faults.add("GET training_runs", hang=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinkerfs", "mount", str(mountpoint)],
        env=env,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        assert server.journal.wait_for(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert b"Traceback" not in process.stderr.read()
    assert not os.path.ismount(mountpoint)
    children = run("pgrep", "-f", f"tinkerfs mount --foreground.*{mountpoint}")
    assert children.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount_and_exit_0(mountpoint, env, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "tinkerfs", "mount", "--foreground", str(mountpoint)],
        env=env,
        stderr=subprocess.PIPE,
    )
    with process:
        wait_until(lambda: os.path.ismount(mountpoint))
        os.listdir(mountpoint / "runs")
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 2
        assert process.stderr.read() == b""
    assert not os.path.ismount(mountpoint)


def test_signal_ends_mount_with_hanging_server(mounted, env, server):
    server.faults.add("*", hang=True, times=None)
    before = server.journal.count()
    with subprocess.Popen(["ls", mounted / "runs"], stderr=subprocess.PIPE) as waiting:
        server.journal.wait_for(before + 1)
        pid = daemon_of(mounted)
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not mount_table.is_running(pid))
        assert time.monotonic() - started < 2
        assert waiting.wait(10) != 0
        assert b"Transport endpoint is not connected" in waiting.stderr.read()
    assert mount_table.find_mount(str(mounted)) is None


@pytest.mark.parametrize("name", ["a b", "-o", "it's\nü", "back\\slash"])
def test_mountpoint_name_may_have_any_characters(mountpoint, env, name):
    directory = mountpoint / name
    directory.mkdir()
    try:
        assert tinkerfs("mount", directory, env=env).returncode == 0
        assert len(os.listdir(directory / "runs")) == 10
        (report,) = json.loads(tinkerfs("status", "--json", directory, env=env).stdout)
        assert report["mountpoint"] == str(directory)
        assert tinkerfs("umount", directory, env=env).returncode == 0
        assert mount_table.find_mount(str(directory)) is None
    finally:
        force_unmount(str(directory))


def test_killed_mount_is_dead_and_next_mount_replaces_it(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(pid))
    report = json.loads(tinkerfs("status", "--json", mounted, env=env).stdout)
    assert report[0]["state"] == "dead"
    done = tinkerfs("mount", mounted, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(os.listdir(mounted / "runs")) == 10


def test_umount_removes_a_killed_mount(mounted, env):
    os.kill(daemon_of(mounted), signal.SIGKILL)
    wait_until(lambda: mount_table.check_health(str(mounted)) == "dead")
    assert tinkerfs("umount", mounted, env=env).returncode == 0
    assert mount_table.find_mount(str(mounted)) is None


def test_umount_names_processes_that_use_the_mount(mounted, env):
    with subprocess.Popen(["sleep", "60"], cwd=mounted) as holder:
        try:
            line = error_line(tinkerfs("umount", mounted, env=env))
            assert f"sleep[{holder.pid}] (its working directory)" in line
            assert "--force" in line
            assert os.path.ismount(mounted)
            pid = daemon_of(mounted)
            forced = tinkerfs("umount", "--force", mounted, env=env)
            assert forced.returncode == 0
            assert forced.stderr == (
                f"tinkerfs: {mounted} is detached; its daemon {pid} serves"
                f" sleep[{holder.pid}] (its working directory) until they exit\n"
            )
            assert mount_table.find_mount(str(mounted)) is None
            assert len(os.listdir(f"/proc/{holder.pid}/cwd/runs")) == 10
        finally:
            holder.kill()
    wait_until(lambda: not mount_table.is_running(pid))


def test_umount_force_reports_a_daemon_that_does_not_end(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGSTOP)
    try:
        done = tinkerfs("umount", "--force", mounted, env=env)
        assert done.returncode == 0
        assert done.stderr == (
            f"tinkerfs: {mounted} is detached; its daemon {pid} still runs: a process is waiting in"
            f" the mount, or the daemon hangs (hint: kill -9 {pid})\n"
        )
        assert mount_table.find_mount(str(mounted)) is None
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not mount_table.is_running(pid))


def test_status_shows_counters_of_the_mount(mounted, env, server):
    os.listdir(mounted / "runs")
    (report,) = json.loads(tinkerfs("status", "--json", mounted, env=env).stdout)
    assert report["mountpoint"] == str(mounted)
    assert report["state"] == "mounted"
    assert report["pid"] == daemon_of(mounted)
    assert report["base_url"] == server.base_url
    assert report["api_requests"]["GET training_runs"]["200"] >= 1
    text = tinkerfs("status", mounted, env=env).stdout
    assert "\x1b" not in text
    for word in (str(mounted), server.base_url, "GET training_runs", "x 200"):
        assert word in text


def test_status_of_hanging_mount_does_not_hang(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        done = tinkerfs("status", mounted, env=env, timeout_s=20)
        assert time.monotonic() - started < 10
        assert done.returncode == 1
        assert "unresponsive" in done.stdout
    finally:
        os.kill(pid, signal.SIGCONT)


# Errors of `tinkerfs mount`: one line with a hint.


def test_mount_without_key_fails(mountpoint, env):
    del env["TINKER_API_KEY"]
    line = error_line(tinkerfs("mount", mountpoint, env=env))
    assert "no API key" in line
    assert "TINKER_API_KEY" in line
    assert not os.path.ismount(mountpoint)


def test_mount_with_wrong_key_fails(mountpoint, env):
    env["TINKER_API_KEY"] = "tml-wrong-0123456789"
    line = error_line(tinkerfs("mount", mountpoint, env=env))
    assert "rejects the key" in line
    assert "wrong-0123456789" not in line
    assert not os.path.ismount(mountpoint)


def test_mount_on_unusable_mountpoint_fails(tmp_path, env):
    missing = tmp_path / "missing"
    assert f"mkdir -p {missing}" in error_line(tinkerfs("mount", missing, env=env))
    file = tmp_path / "file"
    file.touch()
    assert "is not a directory" in error_line(tinkerfs("mount", file, env=env))
    assert "is not empty" in error_line(tinkerfs("mount", tmp_path, env=env))


def test_mount_on_mounted_directory_fails(mounted, env):
    line = error_line(tinkerfs("mount", mounted, env=env))
    assert "is already mounted on" in line
    assert f"tinkerfs umount {mounted}" in line


def test_mount_with_invalid_options_fails(mountpoint, env):
    for arguments, word in (
        (("--base-url", "ftp://x"), "--base-url"),
        (("--ttl", "soon"), "--ttl"),
        (("-o", "nonsense"), "nonsense"),
    ):
        assert word in error_line(tinkerfs("mount", *arguments, mountpoint, env=env), code=2)


def test_mount_with_unwritable_cache_fails(mountpoint, tmp_path, env):
    (tmp_path / "file").touch()
    line = error_line(
        tinkerfs("mount", "--cache-dir", tmp_path / "file/cache", mountpoint, env=env)
    )
    assert "--cache-dir" in line


def test_mount_without_libfuse_fails(mountpoint, env, tmp_path):
    env["FUSE_LIBRARY_PATH"] = str(tmp_path / "libfuse-none.so")
    assert "FUSE_LIBRARY_PATH" in error_line(tinkerfs("mount", mountpoint, env=env))


def test_mount_without_device_fails(mountpoint, env, needs_root):
    script = (
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
        " && mknod -m 666 /dev/urandom c 1 9"
        f" && exec {sys.executable} -m tinkerfs mount {mountpoint}"
    )
    line = error_line(run("unshare", "-m", "sh", "-c", script, env=env))
    assert "/dev/fuse not found" in line
    assert "--device /dev/fuse" in line


def test_user_mounts_through_fusermount(public_directory, env, needs_root):
    """Mount through fusermount, with a /dev/fuse of mode 0666, as distributions configure it."""
    home = public_directory.with_name("home")
    for directory in (public_directory, home):
        directory.mkdir(exist_ok=True)
        os.chown(directory, 65534, 65534)
    # The capability is needed only to read this Python, wherever it is installed.
    user = [*OTHER_UID, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    script = """
        set -e
        mount -t tmpfs -o mode=755 none /dev
        mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/null c 1 3
        mknod -m 666 /dev/urandom c 1 9
        if [ -e /etc/fuse.conf ]; then mount --bind /dev/null /etc/fuse.conf; fi
        user() { %s "$@"; }
        tinkerfs() { user %s -m tinkerfs "$@"; }
        tinkerfs mount %s
        user ls %s/runs | wc -l
        if ls %s 2>/dev/null; then exit 9; fi
        tinkerfs mount --allow-other / || true
        tinkerfs umount %s
        if grep -q %s /proc/mounts; then exit 8; fi
    """ % (" ".join(user), sys.executable, *[public_directory] * 5)  # noqa: UP031
    done = run("unshare", "-m", "sh", "-c", script, env={**env, "HOME": str(home)})
    assert (done.returncode, done.stdout) == (0, "10\n"), done
    (line,) = done.stderr.splitlines()
    assert "user_allow_other" in line


def test_mount_without_privilege_fails(mountpoint, env, needs_root):
    # Like a container without the privilege to mount; the message includes that of libfuse.
    script = f"exec {sys.executable} -m tinkerfs mount {mountpoint}"
    line = error_line(run("setpriv", "--bounding-set=-sys_admin", "sh", "-c", script, env=env))
    assert "--cap-add SYS_ADMIN" in line


# Unreachable servers.


def test_mount_without_network_starts_and_serves_later(mountpoint, env, server):
    server.stop_listening("api")
    done = tinkerfs("mount", "--ttl=0", "--timeout=2", mountpoint, env=env)
    assert done.returncode == 0
    assert "without a response from the server" in done.stderr
    listed = run("ls", mountpoint / "runs")
    assert "No route to host" in listed.stderr
    server.resume_listening()
    wait_until(lambda: run("ls", mountpoint / "runs").returncode == 0, 30)
    assert len(os.listdir(mountpoint / "runs")) == 10


def test_hanging_server_delays_mounting_by_3_s_at_most(mountpoint, env, server):
    """The delay begins with the request: a busy machine may take long to start the program."""
    fault = server.faults.add("GET training_runs", hang=True)
    with ThreadPoolExecutor() as pool:
        mounting = pool.submit(tinkerfs, "mount", mountpoint, env=env)
        fault.wait_for(1, timeout_s=60)
        started = time.monotonic()
        assert mounting.result().returncode == 0
    assert time.monotonic() - started < 15  # and not the timeout of 30 s


# Options that affect the kernel.


def test_read_only_mount_rejects_changes(mountpoint, env):
    assert tinkerfs("mount", "--read-only", mountpoint, env=env).returncode == 0
    assert not os.stat(mountpoint).st_mode & 0o222
    refused = run("sh", "-c", f"echo x > {mountpoint}/.tinkerfs/refresh")
    assert "Read-only file system" in refused.stderr
    (checkpoint,) = list(mountpoint.glob("runs/*/checkpoints/weights/0001"))[:1]
    assert "Read-only file system" in run("rm", "-r", checkpoint).stderr


def test_owner_and_umask_options_set_attributes(mountpoint, env):
    arguments = ("--uid=1234", "--gid=2345", "--umask=077")
    assert tinkerfs("mount", *arguments, mountpoint, env=env).returncode == 0
    status = os.stat(mountpoint / "README.md")
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert stat.S_IMODE(status.st_mode) == 0o400


def test_allow_other_enforces_permissions(public_directory, env, needs_root):
    assert tinkerfs("mount", public_directory, env=env).returncode == 0
    assert run(*OTHER_UID, "ls", public_directory).returncode != 0
    assert tinkerfs("umount", public_directory, env=env).returncode == 0

    assert tinkerfs("mount", "--allow-other", public_directory, env=env).returncode == 0
    assert run(*OTHER_UID, "cat", public_directory / "README.md").returncode == 0
    assert (
        "Permission denied" in run(*OTHER_UID, "cat", public_directory / ".tinkerfs/errors").stderr
    )
    url = next(public_directory.glob("runs/*/checkpoints/*/*/archive_url"))
    assert "Permission denied" in run(*OTHER_UID, "cat", url).stderr
    assert "Permission denied" in run(*OTHER_UID, "rmdir", url.parent).stderr
    assert tinkerfs("umount", public_directory, env=env).returncode == 0


# mount(8) and fstab.


def test_mount_8_mounts(mountpoint, as_installed, needs_root):
    options = "ro,allow_other,ttl=5m,uid=1000,_netdev,noauto,x-systemd.automount"
    done = as_installed(
        f"mount -t fuse.tinkerfs tinker {mountpoint} -o {options}; ls {mountpoint}/runs | wc -l;"
        f" stat -c %u {mountpoint}/README.md; grep {mountpoint} /proc/mounts; umount {mountpoint}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    runs, uid, line = done.stdout.splitlines()
    assert (runs, uid) == ("10", "1000")
    assert " fuse.tinkerfs ro," in line
    assert "allow_other" in line


def test_fstab_line_mounts(mountpoint, as_installed, env, server, tmp_path, needs_root):
    fstab = tmp_path / "fstab"
    options = "read_only,allow_other,umask=022,noauto,user,nofail"
    fstab.write_text(f"{server.base_url}  {mountpoint}  fuse.tinkerfs  {options}  0  0\n")
    del env["TINKER_BASE_URL"]
    done = as_installed(
        f"mount --fstab {fstab} {mountpoint}; ls {mountpoint}/runs | wc -l; umount {mountpoint}"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")


def test_log_contains_no_key_and_is_private(mountpoint, env, tmp_path, server):
    log = tmp_path / "log"
    arguments = ("--log-level=debug", f"--log-file={log}")
    assert tinkerfs("mount", *arguments, mountpoint, env=env).returncode == 0
    url = next(mountpoint.glob("runs/*/checkpoints/*/*/archive_url")).read_text().strip()
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    text = log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "opendir /runs" in text
    assert server.api_key not in text
    assert url.partition("?")[2] not in text


def test_demo_mounts_without_configuration(mountpoint, tmp_path, binding):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TINKERFS_FUSE_BINDING": binding}
    command = [sys.executable, "-m", "tinkerfs", "demo", "--runs=3", str(mountpoint)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        for line in process.stdout:
            if "Ctrl-C" in line:
                break
        assert len(os.listdir(mountpoint / "runs")) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert not os.path.ismount(mountpoint)


def test_demo_runs_in_the_background(mountpoint, env):
    assert tinkerfs("demo", "--detach", "--runs=2", mountpoint, env=env).returncode == 0
    assert len(os.listdir(mountpoint / "runs")) == 2
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
