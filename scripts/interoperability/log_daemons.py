"""Send the audit lines of a mount to a real rsyslog and a real journald.

Runs in a mount namespace of its own, in which journald has an empty /run.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

JOURNALD = Path("/lib/systemd/systemd-journald")
RSYSLOGD = Path("/usr/sbin/rsyslogd")
JOURNAL_SOCKET = Path("/run/systemd/journal/dev-log")
TIMEOUT_S = 60

RSYSLOG_CONF = """
module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{directory}/log")
template(name="line" type="string" string="%syslogfacility-text% %programname% %msg%\\n")
*.* action(type="omfile" file="{directory}/lines" template="line")
"""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


@contextlib.contextmanager
def running(command: list[str], socket: Path) -> Iterator[None]:
    """Run a log daemon, which makes a socket, until the block ends."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(socket.is_socket, f"{command[0]} makes no {socket}")
        yield
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def change_checkpoints(directory: Path, socket: Path) -> None:
    """Publish and remove a checkpoint through a mount that audits to a socket."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir(exist_ok=True)
    tinkerfs = [sys.executable, "-m", "tinkerfs"]
    environment = {**os.environ, "TINKERFS_AUDIT": str(socket)}
    subprocess.run(
        [*tinkerfs, "demo", "--detach", str(mountpoint)],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    try:
        script = "set -- */checkpoints/weights/*; echo 1 >$1/published; rm -r $2"
        subprocess.run(["sh", "-ec", script], cwd=mountpoint / "runs", check=True)
        errors = (mountpoint / ".tinkerfs/errors").read_text()
        assert not errors, errors
    finally:
        subprocess.run([*tinkerfs, "umount", str(mountpoint)], check=True)


def check(text: str) -> None:
    """Check the four lines that a daemon stored."""
    lines = [line for line in text.splitlines() if "action=" in line]
    found = [dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\d+)', line)) for line in lines]
    assert len(found) == 4, text
    expected = [(command, outcome) for command in ("sh", "rm") for outcome in ("in flight", "done")]
    for values, (command, outcome) in zip(found, expected, strict=True):
        assert values["uid"] == str(os.getuid()), text
        assert json.loads(values["command"]) == command, text
        assert json.loads(values["outcome"]) == outcome, text
        assert json.loads(values["tinker_path"]).startswith("tinker://"), text


def main() -> int:
    """Check both daemons, in a mount namespace."""
    if os.geteuid() or not (JOURNALD.exists() and RSYSLOGD.exists()):
        print("log_daemons: skipped, needs root, rsyslog and systemd")
        return 0
    if sys.argv[1:] != ["isolated"]:
        command = [sys.executable, "-m", f"{__spec__.name}", "isolated"]
        return subprocess.run(["unshare", "-m", *command], check=False).returncode
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        configuration = directory / "rsyslog.conf"
        configuration.write_text(RSYSLOG_CONF.format(directory=directory))
        rsyslog = [str(RSYSLOGD), "-n", "-f", str(configuration), "-i", str(directory / "pid")]
        with running(rsyslog, directory / "log"):
            change_checkpoints(directory, directory / "log")
            lines = directory / "lines"
            wait_until(lambda: lines.exists() and lines.read_text().count("\n") == 4, "no lines")
        text = lines.read_text()
        assert text.count("authpriv tinkerfs ") == 4, text
        check(text)
        with running([str(JOURNALD)], JOURNAL_SOCKET):
            change_checkpoints(directory, JOURNAL_SOCKET)
            query = ["journalctl", "--no-pager", "-o", "cat", "-t", "tinkerfs"]
            query.append("SYSLOG_FACILITY=10")

            def read_journal() -> str:
                return subprocess.run(query, capture_output=True, text=True, check=True).stdout

            wait_until(lambda: read_journal().count("action=") == 4, "no lines in the journal")
            check(read_journal())
    print("log_daemons: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
