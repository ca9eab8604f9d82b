"""From `tinkerfs mount` to the end of its process, as a user, a script and fstab see it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.mount import force_unmount, run, tinkerfs, wait_until
from tinkerfs.fuse import mount_table

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def mounted(mountpoint, env):
    done = tinkerfs("mount", mountpoint, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    yield mountpoint
    tinkerfs("umount", "--force", mountpoint, env=env)


@pytest.fixture
def public_folder():
    """A mountpoint that other users can reach: pytest's own folders, and a $TMPDIR, may be 0700."""
    folder = Path(tempfile.mkdtemp(prefix="tinkerfs-test-", dir="/tmp"))
    folder.chmod(0o755)
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    yield mountpoint
    force_unmount(str(mountpoint))
    shutil.rmtree(folder)


def daemon_of(mountpoint):
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    return pid


def refusal(done):
    """The one line of a refusal."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinkerfs: ")
    return line


def test_mount_returns_when_the_mount_answers_and_umount_when_it_is_gone(mounted, env):
    assert len(os.listdir(mounted / "runs")) == 10
    pid = daemon_of(mounted)
    done = tinkerfs("umount", mounted, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not mount_table.is_running(pid)
    assert mount_table.find_mount(str(mounted)) is None


def test_the_daemon_lets_go_of_terminal_and_folder(mounted, server, env):
    process = f"/proc/{daemon_of(mounted)}"
    assert {os.readlink(f"{process}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}
    assert os.readlink(f"{process}/cwd") == "/"
    assert int(Path(f"{process}/stat").read_text().rpartition(")")[2].split()[3]) != os.getsid(0)
    command = Path(f"{process}/cmdline").read_bytes()
    assert server.api_key.encode() not in command
    assert b"--foreground" in command


def test_capturing_the_output_does_not_wait_for_the_mounts_end(mountpoint, env):
    script = f"{sys.executable} -m tinkerfs mount {mountpoint} 2>&1 | cat"
    assert run("sh", "-c", script, env=env, timeout_s=20).returncode == 0
    assert os.path.ismount(mountpoint)


def test_ctrl_c_before_the_mount_answers_leaves_nothing(mountpoint, env, server):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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


def test_a_signal_ends_a_mount_whose_server_hangs(mounted, env, server):
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
def test_any_folder_can_be_mounted_on(mountpoint, env, name):
    folder = mountpoint / name
    folder.mkdir()
    try:
        assert tinkerfs("mount", folder, env=env).returncode == 0
        assert len(os.listdir(folder / "runs")) == 10
        (told,) = json.loads(tinkerfs("status", "--json", folder, env=env).stdout)
        assert told["mountpoint"] == str(folder)
        assert tinkerfs("umount", folder, env=env).returncode == 0
        assert mount_table.find_mount(str(folder)) is None
    finally:
        force_unmount(str(folder))


def test_a_killed_mount_says_so_and_the_next_one_cleans_up(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount_table.is_running(pid))
    told = json.loads(tinkerfs("status", "--json", mounted, env=env).stdout)
    assert told[0]["state"] == "dead"
    done = tinkerfs("mount", mounted, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(os.listdir(mounted / "runs")) == 10


def test_umount_cleans_up_after_a_killed_mount(mounted, env):
    os.kill(daemon_of(mounted), signal.SIGKILL)
    wait_until(lambda: mount_table.check_health(str(mounted)) == "dead")
    assert tinkerfs("umount", mounted, env=env).returncode == 0
    assert mount_table.find_mount(str(mounted)) is None


def test_umount_says_who_holds_the_mount(mounted, env):
    with subprocess.Popen(["sleep", "60"], cwd=mounted) as holder:
        try:
            line = refusal(tinkerfs("umount", mounted, env=env))
            assert f"sleep[{holder.pid}] (its working directory)" in line
            assert "--force" in line
            assert os.path.ismount(mounted)
            pid = daemon_of(mounted)
            forced = tinkerfs("umount", "--force", mounted, env=env)
            assert forced.returncode == 0
            assert forced.stderr == (
                f"tinkerfs: {mounted} is detached; its process {pid} goes on until it is let go by"
                f" sleep[{holder.pid}] (its working directory)\n"
            )
            assert mount_table.find_mount(str(mounted)) is None
            assert len(os.listdir(f"/proc/{holder.pid}/cwd/runs")) == 10
        finally:
            holder.kill()
    wait_until(lambda: not mount_table.is_running(pid))


def test_umount_force_says_that_a_daemon_does_not_end(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGSTOP)
    try:
        done = tinkerfs("umount", "--force", mounted, env=env)
        assert done.returncode == 0
        assert done.stderr == (
            f"tinkerfs: {mounted} is detached; its process {pid} still runs, for who waits in it or"
            f" because it hangs: kill -9 {pid}\n"
        )
        assert mount_table.find_mount(str(mounted)) is None
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not mount_table.is_running(pid))


def test_status_tells_what_the_mount_does(mounted, env, server):
    os.listdir(mounted / "runs")
    (told,) = json.loads(tinkerfs("status", "--json", mounted, env=env).stdout)
    assert told["mountpoint"] == str(mounted)
    assert told["state"] == "mounted"
    assert told["pid"] == daemon_of(mounted)
    assert told["base_url"] == server.base_url
    assert told["calls"]["GET training_runs"]["200"] >= 1
    text = tinkerfs("status", mounted, env=env).stdout
    assert "\x1b" not in text
    for word in (str(mounted), server.base_url, "GET training_runs", "x 200"):
        assert word in text


def test_status_does_not_hang_with_the_mount(mounted, env):
    pid = daemon_of(mounted)
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        done = tinkerfs("status", mounted, env=env, timeout_s=20)
        assert time.monotonic() - started < 10
        assert done.returncode == 1
        assert "hangs" in done.stdout
    finally:
        os.kill(pid, signal.SIGCONT)


# What refuses a mount: one line, with its cure.


def test_no_key(mountpoint, env):
    del env["TINKER_API_KEY"]
    line = refusal(tinkerfs("mount", mountpoint, env=env))
    assert "no API key" in line
    assert "TINKER_API_KEY" in line
    assert not os.path.ismount(mountpoint)


def test_a_wrong_key(mountpoint, env):
    env["TINKER_API_KEY"] = "tml-wrong-0123456789"
    line = refusal(tinkerfs("mount", mountpoint, env=env))
    assert "does not take the key" in line
    assert "wrong-0123456789" not in line
    assert not os.path.ismount(mountpoint)


def test_a_mountpoint_that_cannot_be_one(tmp_path, env):
    missing = tmp_path / "missing"
    assert f"mkdir -p {missing}" in refusal(tinkerfs("mount", missing, env=env))
    file = tmp_path / "file"
    file.touch()
    assert "is no folder" in refusal(tinkerfs("mount", file, env=env))
    assert "is not empty" in refusal(tinkerfs("mount", tmp_path, env=env))


def test_mounted_already(mounted, env):
    line = refusal(tinkerfs("mount", mounted, env=env))
    assert "is mounted there already" in line
    assert f"tinkerfs umount {mounted}" in line


def test_bad_options(mountpoint, env):
    for arguments, word in (
        (("--base-url", "ftp://x"), "--base-url"),
        (("--ttl", "soon"), "--ttl"),
        (("-o", "nonsense"), "nonsense"),
    ):
        assert word in refusal(tinkerfs("mount", *arguments, mountpoint, env=env))


def test_an_unwritable_cache(mountpoint, tmp_path, env):
    (tmp_path / "file").touch()
    line = refusal(tinkerfs("mount", "--cache-dir", tmp_path / "file/cache", mountpoint, env=env))
    assert "--cache-dir" in line


def test_no_libfuse(mountpoint, env, tmp_path):
    env["FUSE_LIBRARY_PATH"] = str(tmp_path / "libfuse-none.so")
    assert "FUSE_LIBRARY_PATH" in refusal(tinkerfs("mount", mountpoint, env=env))


def test_no_device(mountpoint, env, needs_root):
    script = (
        "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
        " && mknod -m 666 /dev/urandom c 1 9"
        f" && exec {sys.executable} -m tinkerfs mount {mountpoint}"
    )
    line = refusal(run("unshare", "-m", "sh", "-c", script, env=env))
    assert "there is no /dev/fuse" in line
    assert "--device /dev/fuse" in line


def test_a_user_who_is_not_root(public_folder, env, needs_root):
    """Through fusermount, with a /dev/fuse that is open to all, as distributions have it."""
    home = public_folder.with_name("home")
    for folder in (public_folder, home):
        folder.mkdir(exist_ok=True)
        os.chown(folder, 65534, 65534)
    # The capability is for reading this Python, wherever it is installed, and for nothing else.
    user = [*NOBODY, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
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
    """ % (" ".join(user), sys.executable, *[public_folder] * 5)  # noqa: UP031
    done = run("unshare", "-m", "sh", "-c", script, env={**env, "HOME": str(home)})
    assert (done.returncode, done.stdout) == (0, "10\n"), done
    (line,) = done.stderr.splitlines()
    assert "user_allow_other" in line


def test_a_device_that_may_not_be_used(mountpoint, env, needs_root):
    # What a container without the right to mount meets; libfuse's own words come along.
    script = f"exec {sys.executable} -m tinkerfs mount {mountpoint}"
    line = refusal(run("setpriv", "--bounding-set=-sys_admin", "sh", "-c", script, env=env))
    assert "--cap-add SYS_ADMIN" in line


# A server that is not there.


def test_without_a_network_it_comes_up_and_serves_when_there_is_one(mountpoint, env, server):
    server.stop_listening("api")
    done = tinkerfs("mount", "--ttl=0", "--timeout=2", mountpoint, env=env)
    assert done.returncode == 0
    assert "without an answer from the server" in done.stderr
    listed = run("ls", mountpoint / "runs")
    assert "No route to host" in listed.stderr
    server.resume_listening()
    wait_until(lambda: run("ls", mountpoint / "runs").returncode == 0, 30)
    assert len(os.listdir(mountpoint / "runs")) == 10


def test_a_server_that_hangs_delays_a_mount_by_3_s_at_most(mountpoint, env, server):
    server.faults.add("GET training_runs", hang=True)
    started = time.monotonic()
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    assert time.monotonic() - started < 5


# Options that the kernel sees.


def test_read_only(mountpoint, env):
    assert tinkerfs("mount", "--read-only", mountpoint, env=env).returncode == 0
    assert not os.stat(mountpoint).st_mode & 0o222
    refused = run("sh", "-c", f"echo x > {mountpoint}/.tinkerfs/refresh")
    assert "Read-only file system" in refused.stderr
    (checkpoint,) = list(mountpoint.glob("runs/*/checkpoints/weights/0001"))[:1]
    assert "Read-only file system" in run("rm", "-r", checkpoint).stderr


def test_owner_and_umask(mountpoint, env):
    arguments = ("--uid=1234", "--gid=2345", "--umask=077")
    assert tinkerfs("mount", *arguments, mountpoint, env=env).returncode == 0
    status = os.stat(mountpoint / "README.md")
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert stat.S_IMODE(status.st_mode) == 0o400


def test_others_are_let_in_under_true_permissions(public_folder, env, needs_root):
    assert tinkerfs("mount", public_folder, env=env).returncode == 0
    assert run(*NOBODY, "ls", public_folder).returncode != 0
    assert tinkerfs("umount", public_folder, env=env).returncode == 0

    assert tinkerfs("mount", "--allow-other", public_folder, env=env).returncode == 0
    assert run(*NOBODY, "cat", public_folder / "README.md").returncode == 0
    assert "Permission denied" in run(*NOBODY, "cat", public_folder / ".tinkerfs/errors").stderr
    url = next(public_folder.glob("runs/*/checkpoints/*/*/archive_url"))
    assert "Permission denied" in run(*NOBODY, "cat", url).stderr
    assert "Permission denied" in run(*NOBODY, "rmdir", url.parent).stderr
    assert tinkerfs("umount", public_folder, env=env).returncode == 0


# mount(8) and fstab.


def test_mount_8(mountpoint, as_installed, needs_root):
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


def test_an_fstab_line(mountpoint, as_installed, env, server, tmp_path, needs_root):
    fstab = tmp_path / "fstab"
    options = "read_only,allow_other,umask=022,noauto,user,nofail"
    fstab.write_text(f"{server.base_url}  {mountpoint}  fuse.tinkerfs  {options}  0  0\n")
    del env["TINKER_BASE_URL"]
    done = as_installed(
        f"mount --fstab {fstab} {mountpoint}; ls {mountpoint}/runs | wc -l; umount {mountpoint}"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")


def test_the_log_has_no_key_and_is_ones_own(mountpoint, env, tmp_path, server):
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


def test_demo_needs_nothing(mountpoint, tmp_path, binding):
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


def test_demo_in_the_background(mountpoint, env):
    assert tinkerfs("demo", "--detach", "--runs=2", mountpoint, env=env).returncode == 0
    assert len(os.listdir(mountpoint / "runs")) == 2
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
