"""Run the units of the package under a real systemd: a machine in namespaces of its own.

The machine boots a copy of this machine's files with systemd as process 1. The embedded server is
one of its services. See `systemd_machine.sh`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "tinkerfs/data/systemd"
SYSTEMD = Path("/lib/systemd/systemd")
SERVICE = "tinkerfs@mnt-tinker.service"
KEY = "tml-demo-key"

#: Prepares the copy: everything that an administrator does before the boot.
PREPARE = f"""
set -e
chmod 755 /root
ln -sf {sysconfig.get_path("scripts")}/tinkerfs /usr/local/bin/tinkerfs
ln -sf /usr/local/bin/tinkerfs /sbin/mount.tinkerfs
mkdir -p /mnt/tinker /mnt/line /etc/tinkerfs /etc/systemd/user
cp {UNITS}/system/* /etc/systemd/system/
cp {UNITS}/user/* /etc/systemd/user/
install -d -m 700 /etc/credstore
for file in /etc/credstore/tinker-api-key /etc/tinkerfs/key; do
    (umask 077; echo {KEY} >$file)
done
echo 'base-url = "http://127.0.0.1:8765"' >/etc/tinkerfs.toml
echo 'tinker /mnt/line tinkerfs _netdev,nofail,api_key_file=/etc/tinkerfs/key 0 0' >/etc/fstab
cat >/etc/systemd/system/demo.service <<END
[Service]
Type=exec
ExecStart=tinkerfs demo-server --port 8765
StandardOutput=null
END
cat >/etc/systemd/system/user-of-mount.service <<END
[Unit]
Requires={SERVICE}
After={SERVICE}
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/ls /mnt/tinker/runs
END
# The boot has nothing but this. The API is not there yet, as without a network.
cat >/etc/systemd/system/tinkerfs-test.target <<END
[Unit]
Requires=sysinit.target
Wants=remote-fs.target
After=sysinit.target remote-fs.target
END
mkdir -p /etc/systemd/system/{SERVICE}.d
printf '[Install]\\nWantedBy=\\nWantedBy=tinkerfs-test.target\\n' \\
    >/etc/systemd/system/{SERVICE}.d/test.conf
systemctl enable -q {SERVICE}
systemctl mask -q systemd-udevd.service systemd-resolved.service systemd-timesyncd.service
useradd --create-home --uid 1500 tester
install -d -o tester -m 700 /home/tester/.config /home/tester/.config/tinkerfs
(umask 077; echo TINKER_API_KEY={KEY} >/home/tester/.config/tinkerfs/home-tester-tinker.env)
chown -R tester: /home/tester
"""

#: Blocks every worker of the mount in `statfs`, once /run/stick exists.
STICK = """
import os, threading, time
def stick():
    while not os.path.exists("/run/stick"):
        time.sleep(0.05)
    from tinkerfs.vfs.filesystem import FileSystem
    FileSystem.statfs = lambda self: threading.Event().wait()
threading.Thread(target=stick, daemon=True).start()
"""

AS_TESTER = (
    "setpriv --reuid=1500 --regid=1500 --clear-groups"
    " env HOME=/home/tester XDG_RUNTIME_DIR=/run/user/1500"
)


class Machine:
    """A running machine.

    Args:
        pid: Its process 1, as this machine numbers it.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def run(self, script: str) -> str:
        """Run a shell script on the machine, and return its output.

        Raises:
            AssertionError: The script failed.
        """
        command = ["nsenter", "--target", str(self._pid), "--all", "sh", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}{self._journal()}"
        return done.stdout.strip()

    def value(self, name: str, unit: str = SERVICE) -> str:
        """Return a property of a unit."""
        return self.run(f"systemctl show --value --property={name} {unit}")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> float:
        """Wait for a condition; return how long it took, seconds.

        Raises:
            AssertionError: The condition was not true in time.
        """
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout_s, f"{what}{self._journal()}"
            time.sleep(0.05)
        return time.monotonic() - started

    def can_list(self, directory: str) -> bool:
        """Return whether a mount lists the ten runs of the sample account."""
        return self.run(f"ls {directory}/runs 2>/dev/null | wc -l") == "10"

    def _journal(self) -> str:
        command = ["nsenter", "--target", str(self._pid), "--all", "journalctl", "--no-pager"]
        return "\n" + subprocess.run(command, capture_output=True, text=True, check=False).stdout


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """Boot a machine, and end it."""
    with tempfile.TemporaryDirectory(prefix="tinkerfs-machine-") as directory:
        work = Path(directory)
        (work / "prepare").write_text(PREPARE)
        shown = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        script = ROOT / "scripts/interoperability/systemd_machine.sh"
        process = subprocess.Popen(["sh", script, work, "tinkerfs-test.target", *shown])
        try:
            yield Machine(_first_process(process))
        finally:
            process.kill()
            process.wait()
            _remove_cgroup(f"tinkerfs-interop-{process.pid}")


def _first_process(process: "subprocess.Popen[bytes]") -> int:
    """Wait until systemd is process 1, and return its number."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/exe").resolve().name == "systemd":
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("the machine does not boot")


def _remove_cgroup(name: str) -> None:
    script = """
        mount -t cgroup2 cgroup2 "$1"
        for try in 1 2 3 4 5 6 7 8 9 10; do
            find "$1/$2" -depth -type d -exec rmdir {} + 2>/dev/null && exit
            sleep 0.2
        done
    """
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", directory, name], check=False
        )


def boot_without_api(machine: Machine) -> None:
    """The enabled unit and the line of fstab are up after the boot, and serve once the API does."""
    machine.wait_until(
        lambda: "socket" in machine.run("stat --format=%F /run/systemd/private 2>&1 || :"),
        "systemd does not listen",
    )
    machine.wait_until(
        lambda: machine.value("ActiveState", "tinkerfs-test.target") == "active", "not booted"
    )
    assert machine.value("ActiveState") == "active"
    assert "No route to host" in machine.run("ls /mnt/tinker/runs 2>&1 || true")
    machine.run("systemctl start demo")
    machine.wait_until(lambda: machine.can_list("/mnt/tinker"), "the unit does not serve")
    machine.wait_until(lambda: machine.can_list("/mnt/line"), "the line does not serve")
    shown = machine.run("findmnt --noheadings --output SOURCE,FSTYPE /mnt/line")
    assert shown.split() == ["tinker", "fuse.tinkerfs"]
    machine.run("umount /mnt/line")


def start_and_stop(machine: Machine) -> None:
    """Start returns when the mount is ready for a unit after it; stop leaves nothing mounted."""
    machine.run(f"systemctl stop {SERVICE}")
    assert machine.run("findmnt /mnt/tinker || echo none") == "none"
    assert machine.value("Result") == "success"
    machine.run("systemctl start user-of-mount.service")
    machine.run(f"systemctl stop user-of-mount.service {SERVICE}")
    times = []
    for _ in range(5):
        started = time.monotonic()
        machine.run(f"systemctl start {SERVICE}")
        times.append(time.monotonic() - started)
        assert machine.can_list("/mnt/tinker")
        machine.run(f"systemctl stop {SERVICE}; ! findmnt /mnt/tinker")
    machine.run(f"systemctl start {SERVICE}")
    print(f"systemd: start to READY {sorted(times)[2]:.2f} s (median of 5)")


def status_and_reload(machine: Machine) -> None:
    """The status has runs and key; a reload and SIGUSR2 change the log's level."""
    assert machine.can_list("/mnt/tinker")
    machine.run(f"systemctl reload {SERVICE}")
    machine.wait_until(lambda: "10 runs" in machine.value("StatusText"), "no status")
    assert "tinker-api-key in use" in machine.value("StatusText")
    journal = f"journalctl --no-pager --unit={SERVICE}"
    for level in ("debug", "warning"):
        machine.run(f"systemctl kill --signal=USR2 {SERVICE}")
        line = f"the log level is {level}"
        machine.wait_until(lambda: line in machine.run(journal), line)  # noqa: B023
    machine.run("printf 'log-level = \"debug\"\\nxattr = true\\n' >>/etc/tinkerfs.toml")
    machine.run(f"systemctl reload {SERVICE}")

    def is_adopted() -> bool:
        machine.run("ls /mnt/tinker/models")
        return "opendir /models" in machine.run(journal)

    machine.wait_until(is_adopted, "the level is not adopted")
    assert "the changed option xattr takes effect with the next mount" in machine.run(journal)
    assert KEY not in machine.run("journalctl --no-pager; cat /proc/[0-9]*/cmdline || :")
    machine.run("sed -i /log-level/d /etc/tinkerfs.toml")


def watchdog(machine: Machine) -> None:
    """A mount with stuck workers is killed and restarted."""
    machine.run(f"""
        mkdir -p /run/stuck
        cat >/run/stuck/sitecustomize.py <<'END'
{STICK}
END
        mkdir -p /run/systemd/system/{SERVICE}.d
        printf '[Service]\\nWatchdogSec=2\\nEnvironment=PYTHONPATH=/run/stuck\\n' \\
            >/run/systemd/system/{SERVICE}.d/stuck.conf
        systemctl daemon-reload
        systemctl restart {SERVICE}
    """)
    before = machine.value("MainPID")
    assert machine.can_list("/mnt/tinker")
    time.sleep(5)  # more than twice WatchdogSec=
    assert machine.value("MainPID") == before, "a mount that responds is not killed"
    # The restarted process is an ordinary one.
    machine.run(f"rm -r /run/systemd/system/{SERVICE}.d; systemctl daemon-reload; touch /run/stick")
    took_s = machine.wait_until(lambda: machine.value("NRestarts") == "1", "not restarted")
    machine.wait_until(lambda: machine.value("ActiveState") == "active", "not active again")
    assert machine.can_list("/mnt/tinker")
    assert machine.value("MainPID") != before
    assert "Watchdog timeout" in machine.run(f"journalctl --no-pager --unit={SERVICE}")
    print(f"systemd: a stuck mount was killed and restarted after {took_s:.1f} s (WatchdogSec=2)")


def late_key(machine: Machine) -> None:
    """A unit without a key starts by itself when the key is there."""
    machine.run(f"""
        systemctl stop {SERVICE}
        echo 'TINKER_CREDENTIAL_CMD=cat /run/late-key' >/etc/tinkerfs/mnt-tinker.env
        ! systemctl start {SERVICE}
        echo {KEY} >/run/late-key
    """)
    machine.wait_until(lambda: machine.value("ActiveState") == "active", "not started again")
    assert machine.can_list("/mnt/tinker")
    assert "TINKER_CREDENTIAL_CMD in use" in machine.value("StatusText")
    machine.run("rm /etc/tinkerfs/mnt-tinker.env")


def mount_unit(machine: Machine) -> None:
    """The `.mount` unit mounts and unmounts; a remount is refused, and changes nothing."""
    machine.run(f"systemctl stop {SERVICE}")
    machine.run("echo 'api-key-file = \"/etc/tinkerfs/key\"' >>/etc/tinkerfs.toml")
    machine.run("systemctl start mnt-tinker.mount")
    assert machine.can_list("/mnt/tinker")
    machine.run("! systemctl reload mnt-tinker.mount")
    assert machine.can_list("/mnt/tinker")
    machine.run("systemctl stop mnt-tinker.mount; ! findmnt /mnt/tinker")
    machine.run("sed -i /api-key-file/d /etc/tinkerfs.toml")


def user_unit(machine: Machine) -> None:
    """The user unit mounts with fusermount3 and an ordinary user's privileges."""
    machine.run("""
        install -d -o tester -m 700 /run/user/1500
        systemd-run --quiet --unit=manager --uid=tester --property=Delegate=yes \\
            --setenv=XDG_RUNTIME_DIR=/run/user/1500 --setenv=HOME=/home/tester \\
            --setenv=PATH=/usr/local/bin:/usr/bin:/bin /lib/systemd/systemd --user
    """)
    machine.wait_until(
        lambda: machine.run("ls /run/user/1500/systemd/private 2>/dev/null || :") != "",
        "the user's manager does not start",
    )
    unit = machine.run("systemd-escape --template=tinkerfs@.service --path /home/tester/tinker")
    machine.run(f"{AS_TESTER} systemctl --user enable --now {unit}")
    assert machine.run(f"{AS_TESTER} ls /home/tester/tinker/runs | wc -l") == "10"
    machine.run(f"{AS_TESTER} systemctl --user stop {unit}; ! findmnt /home/tester/tinker")


def verify(machine: Machine) -> None:
    """systemd-analyze accepts every unit; the docs have the exposure level of the system unit."""
    units = f"{SERVICE} mnt-tinker.mount mnt-tinker.automount"
    assert machine.run(f"systemd-analyze verify --man=no {units} 2>&1") == ""
    analyze = f"{AS_TESTER} systemd-analyze --user verify --man=no tinkerfs@x.service 2>&1"
    assert machine.run(analyze) == "", machine.run(analyze)
    level = machine.run(f"systemd-analyze security --no-pager {SERVICE} | tail -1").split()[-3]
    assert f"{level} of 10" in (ROOT / "docs/operations.md").read_text(), level


CHECKS = (
    boot_without_api,
    start_and_stop,
    status_and_reload,
    watchdog,
    late_key,
    mount_unit,
    user_unit,
    verify,
)


def main() -> int:
    """Run the checks on one machine; return 0 if all succeed."""
    if os.geteuid() != 0 or not SYSTEMD.exists():
        print("systemd: skipped, needs root and systemd")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # from timeout(1); ends the machine
    started = time.monotonic()
    with machine() as running:
        for check in CHECKS:
            check(running)
            print(f"systemd: {(check.__doc__ or '').splitlines()[0]}", flush=True)
    print(f"systemd: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
