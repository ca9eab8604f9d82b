"""Mounts of the running system: list, check and unmount them, and find the processes involved.

This process never accesses a file below a mountpoint itself. While a mount hangs, a request to it
cannot be interrupted, and its process cannot be killed.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tinkerfs import errors
from tinkerfs.fuse.mounted_fd import connection_device, parse_fd
from tinkerfs.operating_system import CAN_MOUNT

FSTYPE: Final = "fuse.tinkerfs"

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

#: Timeout of a request that needs no server, after which a mount counts as unresponsive.
PROBE_TIMEOUT_S: Final = 2.0
#: Maximum number of bytes that are read of a file: another user's mount may send any number.
_MAX_FILE_BYTES: Final = 16 << 20

Health = Literal["responsive", "dead", "unresponsive"]


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount, from a line of /proc/self/mountinfo.

    Attributes:
        owner_uid: The user that made a FUSE mount, see mount.fuse(8); None for other mounts.
    """

    mountpoint: str
    fstype: str
    source: str
    device: str
    owner_uid: int | None = None

    @property
    def is_trusted(self) -> bool:
        """Whether this process may act on what the mount reports.

        True if this user or root made it. Another user may imitate a mount of tinkerfs. Root can
        read every key anyway, and makes the mounts in /etc/fstab for all users.
        """
        return self.owner_uid is not None and self.owner_uid in (0, os.geteuid())


@dataclass(frozen=True, slots=True)
class FdDaemon:
    """A daemon that serves a descriptor of /dev/fuse, which another process mounted.

    Attributes:
        name: The descriptor in the form `/dev/fd/N`.
        device: Number of the mount as in `Mount.device`; None on kernels that do not show it.
    """

    name: str
    pid: int
    device: str | None


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that keeps a mount busy by an open file, a working directory or a mapping."""

    pid: int
    command: str
    usage: str

    def __str__(self) -> str:
        """Return a name for messages, such as "cat[42] (open: /mnt/file)"."""
        return f"{self.command}[{self.pid}] ({self.usage})"


def list_mounts(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return all mounts in this process's namespace, oldest first (proc(5)); none outside Linux."""
    if not CAN_MOUNT:
        return []
    # The kernel escapes only "\n" in names, so another user's mount may contain other line ends.
    with open(mountinfo, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        lines = file.read().split("\n")
    mounts = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) >= 5 and len(kind) >= 2:
            owner = re.search(r"(?:^|,)user_id=(\d+)(?:,|$)", kind[-1]) if len(kind) == 3 else None
            mounts.append(
                Mount(
                    _unescape(fields[4]),
                    kind[0],
                    _unescape(kind[1]),
                    fields[2],
                    int(owner[1]) if owner and kind[0].startswith("fuse") else None,
                )
            )
    return mounts


def _unescape(text: str) -> str:
    """Replace the kernel's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def tinkerfs_mounts() -> list[Mount]:
    """Return all mounts of tinkerfs."""
    return [mount for mount in list_mounts() if mount.fstype == FSTYPE]


def find_mount(mountpoint: str) -> Mount | None:
    """Return the mount on exactly this path, the topmost of several; None if there is none."""
    mounts = reversed(list_mounts())
    return next((mount for mount in mounts if mount.mountpoint == mountpoint), None)


def canonical_mountpoint(mountpoint: str) -> str:
    """Return a mountpoint's path as the kernel shows it, without a request to its mount.

    The last component is not resolved if it is already a mount, which may be dead or hang.
    """
    path = os.path.abspath(mountpoint)
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    if find_mount(resolved) is not None:
        return resolved
    return os.path.realpath(path)


def check_health(mountpoint: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    """Return whether a mount is responsive, dead (without a daemon), or unresponsive."""
    # Not stat, which the kernel serves from its cache for a second after the daemon's death.
    code = (
        "import os, sys\n"
        "try: os.statvfs(sys.argv[1])\n"
        "except OSError as error:\n"
        "    sys.exit(3 if error.errno in map(int, sys.argv[2:]) else 0)\n"
    )
    numbers = [str(number) for number in errors.DISCONNECTED]
    command = [sys.executable, "-I", "-S", "-c", code, mountpoint, *numbers]
    result = run_bounded(command, timeout_s)
    if result is None:
        return "unresponsive"
    return "dead" if result[0] == 3 else "responsive"


def read_file(path: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> bytes | None:
    """Return the content of a small file of a mount that may hang; None if it cannot be read.

    Content after the first 16 MiB is discarded.

    Raises:
        TimeoutError: the mount did not reply in time.
    """
    result = run_bounded(["head", "-c", str(_MAX_FILE_BYTES), "--", path], timeout_s)
    if result is None:
        raise TimeoutError(path)
    return result[1] if result[0] == 0 else None


def write_file(path: str, text: str, *, timeout_s: float) -> None:
    """Write one whole value to a control of a mount that may hang.

    Raises:
        OSError: the error of open(2) or write(2).
        TimeoutError: the mount did not reply in time; the value may still be written later.
    """
    code = (
        "import os, sys\n"
        "try: os.write(os.open(sys.argv[1], os.O_WRONLY), sys.argv[2].encode())\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )
    result = run_bounded([sys.executable, "-I", "-S", "-c", code, path, text], timeout_s)
    if result is None:
        raise TimeoutError(path)
    if result[0] != 0:
        raise errors.os_error_from_errno(result[0], path)


def read_tail(path: str, max_bytes: int, *, timeout_s: float = PROBE_TIMEOUT_S) -> bytes | None:
    """Return the end of a file that may be on a file system that hangs; None if unreadable.

    Raises:
        TimeoutError: the file was not read in time.
    """
    result = run_bounded(["tail", "-c", str(max_bytes), "--", path], timeout_s)
    if result is None:
        raise TimeoutError(path)
    return result[1] if result[0] == 0 else None


def run_bounded(
    command: list[str], timeout_s: float, *, env: Mapping[str, str] | None = None
) -> tuple[int, bytes] | None:
    """Run a command; return (exit status, output), or None after a timeout without waiting."""
    process = subprocess.Popen(  # noqa: S603  (a list, no shell)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=env,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The process ends only when the mount replies to its request, so do not wait for it.
        process.kill()
        if process.stdout:
            process.stdout.close()
        process.returncode = -9
        return None
    return process.returncode, output


def fusermount(major: int | None = None) -> str | None:
    """Return the path of fusermount, which mounts for users other than root; None if missing.

    `major` is the major version of the libfuse that will call it, which determines the program's
    name; None for any version.
    """
    names = {2: ("fusermount",), 3: ("fusermount3",)}.get(major or 0, ("fusermount3", "fusermount"))
    for name in names:
        found = shutil.which(name)
        if found and os.path.isabs(found):  # PATH may contain relative directories
            return found
    return None


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount a file system.

    `mountpoint` is an absolute path without symbolic links. A lazy unmount detaches the mount at
    once, and it ends when no process uses it any more.

    Raises:
        OSError: EBUSY while a process uses the mount; EINVAL if nothing is mounted; EPERM.
    """
    program = fusermount()
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if libc.umount2(os.fsencode(mountpoint), flags) == 0:
            return
        failure = errors.os_error_from_errno(ctypes.get_errno(), mountpoint)
        # In a user namespace or container, root may lack the privilege. fusermount3 may have it: in
        # some containers it is a program that requests the unmount from the host.
        if program is None or not errors.is_not_permitted(failure):
            raise failure
    if program is None:
        raise errors.not_permitted(mountpoint, "fusermount3 not found (hint: install fuse3)")
    arguments = ["-u", "-z"] if lazy else ["-u"]
    done = subprocess.run(  # noqa: S603  (a list, no shell)
        [program, *arguments, "--", mountpoint],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        message = " ".join(done.stderr.split()) or f"{program} failed"
        if "busy" in message.lower():
            raise errors.busy(mountpoint, message)
        raise errors.not_permitted(mountpoint, message)


def find_mount_users(mountpoint: str) -> list[MountUser]:
    """Return the other processes that use a mount, as far as /proc may be read."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            usage = next(_usages(f"/proc/{name}", mountpoint), None)
            if usage is not None:
                found.append(MountUser(int(name), _comm(name), usage))
    return sorted(found, key=lambda user: user.pid)


def _usages(process: str, mountpoint: str) -> Iterator[str]:
    def is_inside(target: str) -> bool:
        return target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/")

    for link, usage in (("cwd", "its working directory"), ("root", "its root")):
        target = _readlink(f"{process}/{link}")
        if target is not None and is_inside(target):
            yield usage
    try:
        numbers = os.listdir(f"{process}/fd")
    except OSError:
        numbers = []
    for number in numbers:
        target = _readlink(f"{process}/fd/{number}")
        if target is not None and is_inside(target):
            yield f"open: {target}"
    try:
        with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                path = line.rstrip("\n").split(" ", 5)[-1].lstrip()
                if is_inside(path):
                    yield f"mapped: {path}"
    except OSError:
        return


def find_daemon_pids(mount: Mount) -> list[int]:
    """Return the processes that serve a mount, as far as /proc may be read.

    The kernel does not report which process serves a mount, and a mount that hangs cannot either.
    So daemons are found by their arguments, open files and mount namespace.
    """
    numbers = [name for name in os.listdir("/proc") if name.isdigit()]
    return sorted(int(name) for name in numbers if _serves(f"/proc/{name}", mount))


def find_fd_daemons() -> list[FdDaemon]:
    """Return the daemons that serve a descriptor of another process's mount."""
    found = []
    for name in os.listdir("/proc") if CAN_MOUNT else ():
        arguments = _arguments(f"/proc/{name}") if name.isdigit() else []
        for fd in {parse_fd(argument) for argument in arguments} - {None}:
            if _readlink(f"/proc/{name}/fd/{fd}") == "/dev/fuse":
                device = connection_device(f"/proc/{name}", fd)
                found.append(FdDaemon(f"/dev/fd/{fd}", int(name), device))
    return sorted(found, key=lambda daemon: daemon.pid)


def _arguments(process: str) -> list[str]:
    """Return the command line of a process of tinkerfs; empty for other processes."""
    try:
        with open(f"{process}/cmdline", "rb") as file:
            # Drop the empty string after the last NUL: joined to a directory it would match that.
            arguments = [os.fsdecode(each) for each in file.read().split(b"\0") if each]
    except OSError:
        return []
    return arguments if any("tinkerfs" in argument for argument in arguments) else []


def is_running(pid: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]  # proc(5): the third field
    except OSError:
        return False
    return state not in (b"Z", b"X")


def _serves(process: str, mount: Mount) -> bool:
    arguments = _arguments(process)
    if not arguments:
        return False
    passed = {parse_fd(argument) for argument in arguments} - {None}
    if any(connection_device(process, fd) == mount.device for fd in passed):
        return True
    try:
        numbers = os.listdir(f"{process}/fd")
        # In another mount namespace the same path may be a different mount.
        if all(each.device != mount.device for each in list_mounts(f"{process}/mountinfo")):
            return False
    except OSError:
        return False
    if not any(_readlink(f"{process}/fd/{number}") == "/dev/fuse" for number in numbers):
        return False
    directory = _readlink(f"{process}/cwd") or "/"
    return any(
        os.path.normpath(os.path.join(directory, argument)) == mount.mountpoint
        for argument in arguments
    )


def _readlink(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _comm(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip() or "?"
    except OSError:
        return "?"


def wait_until(condition: Callable[[], bool], timeout_s: float, *, step_s: float = 0.02) -> bool:
    """Poll a condition every `step_s` seconds; return whether it became true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return condition()
        time.sleep(step_s)
    return True
