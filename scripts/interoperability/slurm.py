"""Run jobs on a real Slurm of one node, with the prolog and epilog of docs/deploy/slurm.

    python -m scripts.interoperability.slurm

slurmctld, slurmd and munged run in mount and PID namespaces of their own, which end with this
check. Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT
from tests.support.passed_fd import expose
from tinkerfs.fuse import mount_table

SCRIPTS = ROOT / "docs/deploy/slurm"
TIMEOUT_S = 180

SLURM_CONF = """
ClusterName=check
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthInfo=socket={directory}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
PrologFlags=Alloc
Prolog={scripts}/prolog.sh
TaskProlog={scripts}/task-prolog.sh
Epilog={scripts}/epilog.sh
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=check Nodes={host} Default=YES State=UP
"""

#: Runs as root in the namespaces. `logger` writes to a file, because there is no syslog.
SETUP = """
{expose}
mount -t tmpfs -o mode=755 none /home
mkdir -m 700 -p /home/ada/.config/tinkerfs
printf 'base-url = "%s"\\napi-key-file = "/home/ada/key"\\n' "$TINKER_BASE_URL" \\
    >/home/ada/.config/tinkerfs/config.toml
(umask 077; printf %s "$TINKER_API_KEY" >/home/ada/key)
unset TINKER_BASE_URL TINKER_API_KEY
chown -R 12345:12345 /home/ada
mkdir -p /home/bin /home/scripts
printf '#!/bin/sh\\nexec %s -m tinkerfs "$@"\\n' {python} >/home/bin/tinkerfs
printf '#!/bin/sh\\ncat >>{directory}/prolog.log\\n' >/home/bin/logger
cp {scripts}/*.sh /home/scripts
chmod 755 /home/bin/* /home/scripts/*
mount --bind /home/bin /usr/local/sbin
printf 'ada:x:12345:12345::/home/ada:/bin/sh\\n' | cat /etc/passwd - >/home/passwd
printf 'ada:x:12345:\\n' | cat /etc/group - >/home/group
mount --bind /home/passwd /etc/passwd
mount --bind /home/group /etc/group
mknod -m 666 /home/fuse c 10 229
mount --bind /home/fuse /dev/fuse
mount -t tmpfs -o mode=755 none /run
mkdir -m 755 {directory}/munge
mkdir {directory}/state {directory}/spool
dd if=/dev/urandom of={directory}/munge/key bs=1024 count=1 status=none
chmod 600 {directory}/munge/key
munged --force --key-file={directory}/munge/key --socket={directory}/munge/socket \\
    --pid-file={directory}/munge/pid --log-file={directory}/munge/log \\
    --seed-file={directory}/munge/seed
export SLURM_CONF={directory}/slurm.conf
slurmctld -i
slurmd
exec {python} -m scripts.interoperability.slurm --jobs
"""

#: The first job reads its mount, and leaves a process behind that holds it.
JOB = """
cd "$TINKER_MOUNT" && ls runs | wc -l && stat -f -c %T . && id -un
setsid sh -c 'cd "$1"; exec sleep 1000' sh "$TINKER_MOUNT" </dev/null >/dev/null 2>&1 &
sleep 1
"""


def main() -> None:
    if os.geteuid() != 0:
        print("slurm: skipped, needs root")
        return
    if sys.argv[1:] == ["--jobs"]:
        run_jobs()
        return
    with tempfile.TemporaryDirectory(prefix="tinkerfs-slurm-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "exposed").mkdir()
        host = os.uname().nodename.partition(".")[0]
        (directory / "slurm.conf").write_text(
            SLURM_CONF.format(host=host, directory=directory, scripts="/home/scripts")
        )
        script = SETUP.format(
            expose=expose(directory / "exposed"),
            python=sys.executable,
            directory=directory,
            scripts=SCRIPTS,
        )
        namespaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        with FaultyServer(runs=3) as server:
            done = subprocess.run(
                ["unshare", *namespaces, "sh", "-ec", script],
                cwd=ROOT,
                env={**os.environ, **server.environment, "PYTHONPATH": str(ROOT)},
                timeout=TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            for log in sorted(directory.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            sys.exit("slurm: FAIL")
    print("slurm: two jobs of a user had a mount by the prolog; the epilog ended both mounts")


def run_jobs() -> None:
    """Run jobs in the namespaces, with daemons of Slurm that have just started."""
    job = ["setpriv", "--reuid=12345", "--regid=12345", "--init-groups", "env", "HOME=/home/ada"]
    submit = [*job, "sh", "-c", "cd / && exec srun --quiet " + shlex.join(["sh", "-c", JOB])]
    for number in (1, 2):
        done = subprocess.run(submit, capture_output=True, text=True, timeout=120, check=False)
        expected = "3\nfuseblk\nada\n", "3\nfuse\nada\n"
        assert done.returncode == 0, done
        assert done.stdout in expected, done
        # A job is complete when its epilog has ended, and the next one waits for that.
        wait = f"while squeue -h -j {number} 2>/dev/null | grep -q .; do sleep 0.1; done"
        subprocess.run(["sh", "-c", wait], timeout=60, check=True)
        mounts = Path("/proc/self/mounts").read_text()
        assert "/run/tinkerfs/" not in mounts, mounts
        assert list(Path("/run/tinkerfs").iterdir()) == []
        # Neither a daemon nor a mount is left, although a process of each job still held its mount.
        assert mount_table.wait_until(lambda: not count_processes("tinkerfs mount --serve"), 20)
        assert count_processes("^sleep 1000") == number
    state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=True)
    assert state.stdout.strip() == "idle", state.stdout


def count_processes(pattern: str) -> int:
    done = subprocess.run(["pgrep", "-fc", pattern], capture_output=True, check=False)
    return int(done.stdout)


if __name__ == "__main__":
    main()
