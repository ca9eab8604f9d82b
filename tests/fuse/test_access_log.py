"""`.tinkerfs/access_log` with the programs that read logs."""

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.account import account, every_binding, make_account, needs
from tests.support.mount import tinkerfs, wait_until
from tinkerfs.access_log import parse_line
from tinkerfs.fuse import mount_table

__all__ = ["account", "make_account"]

LOG = ".tinkerfs/access_log"
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\t[a-z]+\t\S+\t(-|\d+@\d+)\t(OK|E[A-Z]+)"
    r"\t\d+\.\d{6}\t\d+\t\d+\t.+"
)


class Follower:
    """A program that reads the access log, and its output so far."""

    def __init__(self, account, path, *command):
        self._account = account
        self._path = path
        with path.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=account.root, stdout=output, stderr=output, start_new_session=True
            )

    def lines(self):
        return self._path.read_text(errors="surrogateescape").splitlines()

    def shows(self, *texts):
        """Return whether one line has all the texts, after some time."""

        def is_shown():
            return any(all(text in line for text in texts) for line in self.lines())

        return self._account.eventually(is_shown, 20)

    def wait_until_attached(self):
        assert self._account.eventually(self._is_attached, 20)
        return self

    def _is_attached(self):
        self._account.path("runs").stat()
        os.listdir(self._account.root)
        return len(self.lines()) > 1

    def interrupt(self):
        """Press Ctrl-C; return how long the program took to exit, seconds."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        return time.monotonic() - started

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.process.kill()
        self.process.wait(20)


@pytest.fixture
def binding():
    return "auto"


@pytest.fixture
def follow(account, tmp_path):
    return lambda *command: Follower(account, tmp_path / f"out-{command[0]}", *command)


@every_binding
def test_cat_shows_operations_until_ctrl_c(account, follow):
    run = account.new_run("weights/1")
    path = f"{run}/checkpoints/weights/1"
    with follow("cat", LOG) as cat:
        cat.wait_until_attached()
        account.sh(f"cat {path}/info.json; cat {path}/nothing; mkdir {path}/new")
        assert cat.shows("\tread\t", f"/{path}/info.json\t", "@0\tOK\t", "\tcat")
        assert cat.shows("\tgetattr\t", f"/{path}/nothing\t-\tENOENT\t")
        assert cat.shows("\tmkdir\t", f"/{path}/new\t-\tEPERM\t", "\tmkdir")
        header, *lines = cat.lines()
        assert header.startswith("#time\toperation\tpath\t")
        for line in lines:
            assert LINE.fullmatch(line), line
            assert parse_line(line).command != "", line
        uid = next(line for line in lines if "\tmkdir\t" in line).split("\t")[6]
        assert uid == str(os.getuid())
        assert not any(LOG in line for line in lines), "its own reads are not logged"
        assert cat.process.poll() is None, "it waits for the next line"
        assert cat.interrupt() < 5


def test_head_and_grep_get_lines_as_they_happen(account, follow):
    with follow("sh", "-c", f"cat {LOG} | head -n 3") as head:
        head.wait_until_attached()
        assert account.eventually(lambda: bool(os.listdir(account.root)) and len(head.lines()) == 3)
        os.listdir(account.root)  # cat writes once more, and ends
    with follow("grep", "--line-buffered", "ENOENT", LOG) as grep:
        assert account.eventually(
            lambda: not account.path("no-such-file").exists() and len(grep.lines()) > 0, 20
        )
        assert all("\tENOENT\t" in line for line in grep.lines())


def test_several_readers_get_every_line(account, follow, tmp_path):
    with follow("cat", LOG) as cat, follow("tail", "-s", "0.1", "-f", LOG) as tail:
        cat.wait_until_attached()
        tail.wait_until_attached()
        for number in range(200):
            account.path(f"none-{number}").exists()
        for reader in (cat, tail):
            assert reader.shows("/none-199\t")
            seen = [line for line in reader.lines() if re.search(r"\t/none-\d+\t", line)]
            assert len(seen) == 200
            assert not any("truncated" in line or "dropped" in line for line in reader.lines())


@pytest.mark.parametrize("command", [["tail", "-f"], ["tail", "-s", "0.1", "-F", "-n", "1"]])
def test_tail_f_shows_new_lines(account, follow, command):
    with follow(*command, LOG) as tail:
        tail.wait_until_attached()
        account.path("marker-of-tail").exists()
        assert tail.shows("/marker-of-tail\t")


def test_slow_reader_gets_the_number_of_dropped_lines(account):
    with open(account.path(LOG), "rb", buffering=0) as log:
        assert log.read(65536).startswith(b"#time")
        name = "x" * 200
        for number in range(6000):  # more than the log holds
            account.path(f"{name}-{number}").exists()
        content = b""
        while f"{name}-5999".encode() not in content:
            content += log.read(1 << 20)
    (dropped,) = re.findall(rb"(?m)^# (\d+) lines dropped$", content)
    assert 1000 < int(dropped) < 12_000
    lines = content.decode().splitlines()
    assert all(line.startswith("#") or LINE.fullmatch(line) for line in lines[1:])
    assert len(content) < 2 << 20


def test_without_reader_nothing_is_recorded_or_listed(account):
    server = account.server
    with open(account.path(LOG), "rb", buffering=0) as log:
        log.read(65536)
        os.listdir(account.path("runs"))
        assert log.read(65536)
    server.journal.clear()
    with open(account.path(LOG), "rb", buffering=0) as log:
        (line,) = log.read(65536).splitlines()
        assert line.startswith(b"#"), "the lines of the last reader are gone"
    assert not server.journal.entries(), "it sends no request"
    assert "access_log" not in os.listdir(account.path(".tinkerfs"))
    status = account.path(LOG).stat()
    assert status.st_mode & 0o777 == 0o600
    # A program that reads every file is not stopped by it.
    needs(["grep", "tar"])
    assert account.sh("grep -r none .tinkerfs; tar c .tinkerfs | wc -c").returncode == 0
    assert account.sh(f"echo 1 > {LOG}").returncode != 0


def test_wait_of_a_reader_is_not_time_of_operations(account):
    def read_seconds():
        stats = json.loads(account.path(".tinkerfs/stats.json").read_text())
        return stats["operations"]["read"]["duration_s"]

    before = read_seconds()
    with ThreadPoolExecutor(1) as pool, open(account.path(LOG), "rb", buffering=0) as log:
        assert log.read(65536).startswith(b"#")
        started = time.monotonic()
        waiting = pool.submit(log.read, 65536)
        assert account.eventually(lambda: time.monotonic() > started + 2)
        assert not waiting.done()
        os.listdir(account.root)
        assert waiting.result(20).endswith(b"\n")
    assert read_seconds() - before < 1


def test_waiting_reader_ends_with_the_mount(mountpoint, env):
    assert tinkerfs("mount", mountpoint, env=env).returncode == 0
    (pid,) = mount_table.find_daemon_pids(mount_table.find_mount(str(mountpoint)))
    cat = subprocess.Popen(
        ["cat", mountpoint / LOG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with cat:
        assert cat.stdout.readline().startswith("#")
        busy = tinkerfs("umount", mountpoint, env=env)
        assert busy.returncode == 1
        assert f"cat[{cat.pid}]" in busy.stderr
        os.kill(pid, signal.SIGTERM)
        _, errors = cat.communicate(timeout=20)
    assert "not connected" in errors or "aborted" in errors
    wait_until(lambda: not mount_table.is_running(pid))
