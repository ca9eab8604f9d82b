"""A mount as a service: messages to the service manager, reloads, and the watchdog.

The interoperability test of systemd runs the units. Nothing here depends on the binding.
"""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.mount import memory_mount, run, running, tinkerfs, wait_until
from tests.support.service_manager import service_manager
from tinkerfs.cli.service import MountService
from tinkerfs.cli.service_notifier import ServiceNotifier
from tinkerfs.fuse.worker_pool import CORE_WORKERS

MOUNT = (sys.executable, "-m", "tinkerfs", "mount", "--foreground")


@pytest.fixture
def binding():
    return "mfusepy3"


@pytest.fixture
def manager(tmp_path):
    with service_manager(tmp_path) as manager:
        yield manager


@pytest.fixture
def start(mountpoint, env):
    """Return a function that starts a mount in the foreground of a session without a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **variables):
            process = stack.enter_context(
                subprocess.Popen(
                    [*MOUNT, *arguments, str(mountpoint)],
                    env=env | variables,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def test_service_reports_ready_reload_and_stop(mountpoint, start, manager):
    process = start(WATCHDOG_USEC="2000000", **manager.environment)
    ready = manager.receive()
    assert ready["READY"] == "1"
    assert len(os.listdir(mountpoint / "runs")) == 10, "usable at once"
    assert manager.wait_for("WATCHDOG")["WATCHDOG"] == "1"
    status = manager.wait_for("WATCHDOG")["STATUS"]
    assert status == "10 runs; 0 pending; key: TINKER_API_KEY in use"
    environment = Path(f"/proc/{process.pid}/cmdline").read_text()
    assert "NOTIFY" not in environment

    process.send_signal(signal.SIGHUP)
    assert int(manager.wait_for("RELOADING")["MONOTONIC_USEC"]) > 0
    assert manager.wait_for("READY")["READY"] == "1"

    process.send_signal(signal.SIGTERM)
    assert manager.wait_for("STOPPING")["STOPPING"] == "1"
    assert process.wait(20) == 0
    assert process.stderr.read() == b""
    assert not os.path.ismount(mountpoint)


def test_umount_reports_stop(mountpoint, start, manager):
    process = start(**manager.environment)
    manager.wait_for("READY")
    assert run("umount", mountpoint).returncode == 0
    manager.wait_for("STOPPING")
    assert process.wait(20) == 0


def test_mount_in_the_background_notifies_no_service(mountpoint, env, manager):
    done = tinkerfs("mount", mountpoint, env=env | manager.environment)
    assert done.returncode == 0
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    assert manager.receive(timeout_s=0.05) is None


def test_stuck_workers_stop_keep_alives(mountpoint, binding, manager, expect_warnings):
    """Occupy both workers with handlers that hang outside a blocking section."""
    expect_warnings("not responsive, no keep-alive was sent")
    notifier = ServiceNotifier(manager.environment | {"WATCHDOG_USEC": "1000000"})
    service = MountService(notifier, str(mountpoint), lambda: "here")
    with memory_mount(mountpoint, binding) as process:
        service.on_ready()
        assert manager.receive() == {"READY": "1", "STATUS": "here"}
        assert manager.receive() == {"WATCHDOG": "1", "STATUS": "here"}
        paths = [mountpoint / f"slow/stuck-{number}" for number in range(CORE_WORKERS)]
        with running([["cat", path] for path in paths]) as readers:
            while manager.receive(timeout_s=2.0) is not None:  # sent before both were stuck
                pass
            assert "service" in [thread.name for thread in threading.enumerate()]
            service.on_stopping()
            process.kill()
            assert all(reader.wait(20) for reader in readers)


def test_sighup_reopens_the_log_and_adopts_options(mountpoint, start, manager, tmp_path, server):
    config, log = tmp_path / "config.toml", tmp_path / "log"
    config.write_text('ttl = 1000\nlog-level = "warning"\numask = "000"\n')
    process = start(f"--config={config}", f"--log-file={log}", "--stale=2h", **manager.environment)
    manager.wait_for("READY")

    def reload(text):
        config.write_text(text)
        process.send_signal(signal.SIGHUP)
        manager.wait_for("RELOADING")
        manager.wait_for("READY")

    os.listdir(mountpoint / "runs")
    log.rename(tmp_path / "log.1")
    reload('ttl = 0\nlog-level = "debug"\numask = "027"\nstale = 1\nxattr = true\n')
    os.listdir(mountpoint / "runs")
    assert "opendir /runs" in log.read_text()
    assert "opendir /runs" not in (tmp_path / "log.1").read_text()
    warnings = [line for line in log.read_text().splitlines() if " WARNING " in line]
    assert [line.partition("reloader: ")[2] for line in warnings] == [
        "the changed option xattr takes effect with the next mount",
        "the changed option umask takes effect with the next mount",
    ]
    (mountpoint / ".tinkerfs/refresh").write_text("1")  # the listing has the former TTL
    os.listdir(mountpoint / "runs")
    before = server.journal.count()
    os.listdir(mountpoint / "runs")
    assert server.journal.count() > before, "a TTL of 0 is in force"

    for broken in ("ttl = [", "ttl = 'soon'", "tll = 3"):
        reload(broken)
    assert log.read_text().count("reloader: no option was reloaded: ") == 3
    reload("")
    assert len(os.listdir(mountpoint / "runs")) == 10
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_sighup_rereads_the_key_during_a_backoff(mountpoint, start, manager, tmp_path, server):
    key = tmp_path / "key"
    key.write_text(server.api_key)
    key.chmod(0o600)
    process = start(f"--api-key-file={key}", "--ttl=0", TINKER_API_KEY="", **manager.environment)
    manager.wait_for("READY")
    rejection = server.faults.add("*", status=401, times=None)
    with pytest.raises(PermissionError):
        os.listdir(mountpoint / "runs")
    rejection.remove()
    with pytest.raises(PermissionError):
        os.listdir(mountpoint / "sessions")
    process.send_signal(signal.SIGHUP)
    manager.wait_for("RELOADING")
    manager.wait_for("READY")
    assert len(os.listdir(mountpoint / "checkpoints")) == 50  # has no cached failure


def test_hangup_of_the_terminal_unmounts(mountpoint, env):
    master, slave = pty.openpty()
    # A session leader gets the first terminal that it opens as its controlling terminal.
    script = f"exec <>$(tty) && exec {sys.executable} -m tinkerfs mount --foreground {mountpoint}"
    with subprocess.Popen(
        ["sh", "-c", script], env=env, stdin=slave, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        os.close(slave)
        wait_until(lambda: os.path.ismount(mountpoint))
        os.listdir(mountpoint / "runs")
        os.close(master)
        assert process.wait(20) == 0
    assert not os.path.ismount(mountpoint)
