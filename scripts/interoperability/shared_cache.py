"""Let hosts share a cache directory on a real NFS server: NFS-Ganesha, and Linux's own client.

    python -m scripts.interoperability.shared_cache [HOSTS [MIB]]

Each host is a Linux kernel of its own (User Mode Linux), with its own clock, NFS client and mount.
Network, processes and mounts are in namespaces, which end with this check. Needs root, and Debian's
packages user-mode-linux, nfs-ganesha-vfs, nfs-common and iproute2.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from scripts.interoperability import linux_host
from tests.support.faulty_server import FaultyServer

PROGRAMS = ("linux.uml", "ganesha.nfsd", "mount.nfs4", "ip", "unshare")
SERVER = "10.77.0.1"
TINKERFS = f"{sys.executable} -m tinkerfs"
HOSTS, MIB = 4, 16
#: How long a mount waits for the store, for a claim, and for the file system, seconds.
TIMEOUT_S = 20
DEADLINE_S = 120

GANESHA = """
NFS_CORE_PARAM {{ Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSV4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = {directory}/recovery; }}
EXPORT {{
    Export_Id = 1; Path = {directory}/export; Pseudo = /cache; Access_Type = RW;
    Squash = Root_Squash; SecType = sys; FSAL {{ Name = VFS; }}
}}
"""


def main() -> int:
    """Run all steps, and print one line."""
    if os.geteuid() or not all(map(shutil.which, PROGRAMS)):
        print(f"shared_cache: skipped, needs root and {', '.join(PROGRAMS)}")
        return 0
    if "--in-namespaces" not in sys.argv:
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        module = [sys.executable, "-m", "scripts.interoperability.shared_cache", "--in-namespaces"]
        return subprocess.run([*command, *module, *sys.argv[1:]], check=False).returncode
    numbers = [int(each) for each in sys.argv[1:] if each.isdigit()]
    count, mib = [*numbers, *(HOSTS, MIB)[len(numbers) :]]
    began = time.monotonic()
    run("ip link set lo up; ip link add br0 type bridge; ip link set br0 up")
    run(f"ip address add {SERVER}/16 dev br0")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(
            FaultyServer(host=SERVER, runs=1, checkpoints=6, size_bytes=mib << 20, latency_s=0.02)
        )
        for name in ("memory", "export"):  # in memory, because a busy disk takes long for a flush
            (directory / name).mkdir()
            run(f"mount -t tmpfs none {directory}/{name}")
            stack.callback(run, f"umount --lazy {directory}/{name}")
        nfs = stack.enter_context(nfs_server(directory))
        with ThreadPoolExecutor(count) as pool:
            hosts = list(pool.map(lambda number: Host(directory, number, server), range(count)))
            for host in hosts:
                stack.callback(host.stop)
            each = Fleet(hosts, pool)
            booted_s = time.monotonic() - began
            ratio, seconds = read_together(Checkpoint(server, 0), each, directory)
            read_again(Checkpoint(server, 0), each)
            kill_process(Checkpoint(server, 1), each)
            damage(Checkpoint(server, 2), each, directory)
            clear_while_reading(Checkpoint(server, 3), each)
            hang(Checkpoint(server, 4), each, nfs)
            lost_s = lose_host(Checkpoint(server, 5), each)
    print(
        f"shared_cache: {count} hosts on NFS read {ratio:.4f} of the checkpoint's bytes from the "
        f"store in {seconds:.1f} s, all bytes right; {lost_s:.1f} s after a host was lost, "
        f"{booted_s:.0f} s to boot, {time.monotonic() - began:.0f} s in all"
    )
    return 0


def run(command: str) -> None:
    """Run a command of the shell."""
    subprocess.run(command, shell=True, check=True)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def nfs_server(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Export a directory with root_squash until the block ends; yield the process."""
    (directory / "recovery").mkdir()
    (directory / "export").chmod(0o1777)
    directory.chmod(0o755)
    (directory / "ganesha.conf").write_text(GANESHA.format(directory=directory))
    log = directory / "ganesha.log"
    process = subprocess.Popen(
        ["ganesha.nfsd", "-F", "-L", log, "-f", directory / "ganesha.conf", "-p", directory / "pid"]
    )

    def is_listening() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as connection:
            return connection.connect_ex((SERVER, 2049)) == 0

    try:
        wait_for(is_listening, "no NFS server")
        yield process
    finally:
        process.kill()
        process.wait()


class Host:
    """A running host, with the exported directory at /mnt/cache and tinkerfs at /mnt/tinker.

    Attributes:
        number: from 0 on.
    """

    def __init__(self, directory: Path, number: int, server: FaultyServer) -> None:
        self.number = number
        self._server = server
        self._connections: set[socket.socket] = set()
        self._address = f"10.77.1.{number + 1}"
        self._console = directory / f"console-{number}"
        tap = f"tap{number}"
        run(f"ip tuntap add {tap} mode tap; ip link set {tap} master br0; ip link set {tap} up")
        mac = f"52:54:00:77:01:{number + 1:02x}"
        kernel = ["linux.uml", "mem=512M", "root=/dev/root", "rootfstype=hostfs", "ro", "quiet"]
        kernel += ["con=null", "con0=null,fd:1", f"umid=tinkerfs-{os.getpid()}-{number}"]
        kernel += [f"vec0:transport=tap,ifname={tap},depth=128,gro=1,mac={mac}"]
        # The hosts' clocks differ by hours.
        init = [sys.executable, linux_host.__file__, self._address, str((number - 1) * 5000)]
        environment = os.environ | {"TMPDIR": str(directory / "memory")}
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                [*kernel, f"init={init[0]}", "--", *init[1:]],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=environment,
                start_new_session=True,
            )
        wait_for(self._is_up, f"host {number} does not boot")
        self.run(f"mount -t nfs4 -o hard {SERVER}:/cache /mnt/cache")
        self.mount()

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._console.read_text(errors="replace")
        with socket.socket() as connection:
            return connection.connect_ex((self._address, linux_host.PORT)) == 0

    def stop(self) -> None:
        """End the host as a loss of its power does."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def run(self, command: str, *, may_fail: bool = False) -> str:
        """Run a command of the shell in the host, and return its output."""
        values = self._server.environment | {"PYTHONDONTWRITEBYTECODE": "1"}
        exports = "".join(f"export {name}='{value}'; " for name, value in values.items())
        with socket.create_connection((self._address, linux_host.PORT), DEADLINE_S) as connection:
            self._connections.add(connection)
            line = json.dumps(f"cd {Path.cwd()}; {exports} {command}")
            connection.sendall(f"{line}\n".encode())
            with connection.makefile("rb") as file:
                status, output, errors = json.loads(file.read())
            self._connections.discard(connection)
        assert may_fail or status == 0, (command, status, output, errors)
        return str(output)

    def mount(self) -> None:
        """Mount the account."""
        options = f"--cache-dir=/mnt/cache/tinkerfs --timeout={TIMEOUT_S} --ttl=3600"
        self.run(f"{TINKERFS} mount {options} /mnt/tinker")

    def digests(self, checkpoint: "Checkpoint") -> dict[str, str]:
        """Read all files of a checkpoint."""
        output = self.run(f"cd {checkpoint.files} && sha256sum *")
        return {name: digest for digest, name in (line.split("  ") for line in output.splitlines())}

    def errors(self) -> list[str]:
        """Return the errors of the mount."""
        return self.run("cat /mnt/tinker/.tinkerfs/errors").splitlines()

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the mount."""
        values: dict[str, Any] = json.loads(self.run("cat /mnt/tinker/.tinkerfs/stats.json"))
        return values


class Fleet:
    """All hosts, which do the same at the same time."""

    def __init__(self, hosts: list[Host], pool: ThreadPoolExecutor) -> None:
        self.hosts = hosts
        self._pool = pool

    def run(self, command: str) -> list[str]:
        """Run a command in each host."""
        return list(self._pool.map(lambda host: host.run(command), self.hosts))

    def mount(self) -> None:
        """Mount the account in each host."""
        list(self._pool.map(Host.mount, self.hosts))

    def begin_reading(self, checkpoint: "Checkpoint") -> list[Any]:
        """Let each host read all files; return the futures of the digests."""
        return [self._pool.submit(host.digests, checkpoint) for host in self.hosts]

    def read(self, checkpoint: "Checkpoint") -> list[dict[str, str]]:
        """Let each host read all files at the same time."""
        return [each.result() for each in self.begin_reading(checkpoint)]


class Checkpoint:
    """One checkpoint of the account, which one step reads."""

    def __init__(self, server: FaultyServer, number: int) -> None:
        (tinker_run,) = server.account.runs()
        self._run_id, self._id = tinker_run.id, tinker_run.checkpoints[number].id
        self._server = server
        self.files = f"/mnt/tinker/runs/{self._run_id}/checkpoints/{self._id}/files"
        server.journal.clear()

    def expected(self) -> dict[str, str]:
        """Return the digests of the files as the server has them."""
        return {
            name: hashlib.sha256(content.read(0, content.size_bytes)).hexdigest()
            for name, content in self._server.files(self._run_id, self._id).items()
        }

    def ratio(self) -> float:
        """Return the bytes that the store has sent, divided by those of the archive."""
        sent_bytes = sum(each.sent_bytes for each in self._server.journal.entries("store"))
        return sent_bytes / self._server.archive(self._run_id, self._id).size_bytes

    def begin(self, each: Fleet) -> list[Any]:
        """Let all hosts read, and wait until a third has been downloaded; return the futures."""
        reads = each.begin_reading(self)
        wait_for(lambda: self.ratio() > 1 / 3, "nothing is downloaded")
        return reads


def read_together(checkpoint: Checkpoint, each: Fleet, directory: Path) -> tuple[float, float]:
    """Read in all hosts; return the ratio of bytes from the store, and the time."""
    began = time.monotonic()
    assert each.read(checkpoint) == [checkpoint.expected()] * len(each.hosts)
    seconds, ratio = time.monotonic() - began, checkpoint.ratio()
    assert ratio < 1.1, ratio
    assert [host.errors() for host in each.hosts] == [[]] * len(each.hosts)
    assert not list((directory / "export").rglob("*sqlite*"))
    assert 0 not in {path.stat().st_uid for path in (directory / "export").rglob("*")}
    assert all(host.stats()["is_cache_shared"] for host in each.hosts)
    return ratio, seconds


def read_again(checkpoint: Checkpoint, each: Fleet) -> None:
    """Read by mounts that have nothing in memory."""
    each.run(f"{TINKERFS} umount /mnt/tinker; echo 3 >/proc/sys/vm/drop_caches")
    each.mount()
    assert each.read(checkpoint) == [checkpoint.expected()] * len(each.hosts)
    assert not checkpoint.ratio()


def kill_process(checkpoint: Checkpoint, each: Fleet) -> None:
    """Kill a mount that holds claims."""
    host = each.hosts[0]
    pid = host.stats()["pid"]
    reads = checkpoint.begin(each)
    host.run(f"kill -9 {pid}")
    assert [read.result() for read in reads[1:]] == [checkpoint.expected()] * (len(reads) - 1)
    reads[0].exception()
    host.run(f"{TINKERFS} umount --force /mnt/tinker")
    host.mount()
    assert host.digests(checkpoint) == checkpoint.expected()


def clear_while_reading(checkpoint: Checkpoint, each: Fleet) -> None:
    """Remove the cache while hosts read it."""
    reads = checkpoint.begin(each)
    each.hosts[-1].run(f"{TINKERFS} cache clear --cache-dir=/mnt/cache/tinkerfs")
    assert [read.result() for read in reads] == [checkpoint.expected()] * len(reads)


def damage(checkpoint: Checkpoint, each: Fleet, directory: Path) -> None:
    """Alter a file on the server before other hosts read it."""
    assert each.hosts[0].digests(checkpoint) == checkpoint.expected()
    newest = max(directory.glob("export/*/*/shared/*"), key=lambda path: path.stat().st_mtime_ns)
    with max(newest.glob("*-*"), key=lambda path: path.stat().st_size).open("r+b") as file:
        file.seek(12345)
        file.write(b"altered")
    assert each.read(checkpoint) == [checkpoint.expected()] * len(each.hosts)
    lines = [line for host in each.hosts for line in host.errors()]
    assert lines
    assert all("a block on disk was altered" in line for line in lines), lines


def hang(checkpoint: Checkpoint, each: Fleet, nfs: subprocess.Popen[bytes]) -> None:
    """Stop the NFS server while hosts read, and let it continue."""
    reads = checkpoint.begin(each)
    nfs.send_signal(signal.SIGSTOP)
    assert [read.result() for read in reads] == [checkpoint.expected()] * len(reads)
    for host in each.hosts[:2]:
        assert host.stats()["gauges"]["shared_cache_hangs"] == 1, host.number
        assert "does not respond" in host.run(f"{TINKERFS} status /mnt/tinker")
        assert "no response within" in host.errors()[-1]
    each.hosts[0].run(f"{TINKERFS} umount /mnt/tinker")
    nfs.send_signal(signal.SIGCONT)
    each.hosts[0].mount()
    other = each.hosts[1]
    wait_for(lambda: not other.stats()["gauges"]["shared_cache_hangs"], "the outage does not end")


def lose_host(checkpoint: Checkpoint, each: Fleet) -> float:
    """End a host that holds claims; return the time until the last host has read all."""
    reads = checkpoint.begin(each)
    each.hosts[0].stop()
    began = time.monotonic()
    assert [read.result() for read in reads[1:]] == [checkpoint.expected()] * (len(reads) - 1)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
