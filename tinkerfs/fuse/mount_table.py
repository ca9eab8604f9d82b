"""Mounts as the running system shows them: which there are, whether they answer, how they go.

Nothing here touches a file below a mountpoint in this process: a request to a mount that hangs
cannot be interrupted, nor its process killed, until it is answered.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from tinkerfs import errors

FSTYPE: Final = "fuse.tinkerfs"

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

#: How long a mount may take to answer what costs it nothing, before it is said to hang.
PROBE_TIMEOUT_S: Final = 2.0

Health = Literal["answers", "dead", "hangs"]


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    fstype: str
    source: str
    device: str


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that keeps a mount from going: by a file, a working directory, or a mapping."""

    pid: int
    command: str
    what: str

    def __str__(self) -> str:
        """Name it as `ps` would, and what it holds."""
        return f"{self.command}[{self.pid}] ({self.what})"


def list_mounts(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return all mounts that this process sees, in the order they were made (proc(5))."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    mounts = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) >= 5 and len(kind) >= 2:
            mounts.append(Mount(_unescape(fields[4]), kind[0], _unescape(kind[1]), fields[2]))
    return mounts


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def tinkerfs_mounts() -> list[Mount]:
    """Return the mounts of tinkerfs."""
    return [mount for mount in list_mounts() if mount.fstype == FSTYPE]


def find_mount(mountpoint: str) -> Mount | None:
    """Return what is mounted at just this path, the uppermost where there are several."""
    found = None
    for mount in list_mounts():
        if mount.mountpoint == mountpoint:
            found = mount
    return found


def canonical_mountpoint(mountpoint: str) -> str:
    """Return a mountpoint's path as the kernel shows it, without asking what is mounted there.

    Its last part is left alone where it is a mount already: the daemon may be dead, or hang.
    """
    path = os.path.abspath(mountpoint)
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    if find_mount(resolved) is not None:
        return resolved
    return os.path.realpath(path)


def check_health(mountpoint: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> Health:
    """Tell whether a mount answers, is dead (its daemon is gone), or hangs."""
    # Not stat: the kernel answers that from its cache for a second after the daemon's death.
    code = (
        "import os, sys\n"
        "try: os.statvfs(sys.argv[1])\n"
        "except OSError as error:\n"
        "    sys.exit(3 if error.errno in map(int, sys.argv[2:]) else 0)\n"
    )
    numbers = [str(number) for number in errors.DISCONNECTED]
    command = [sys.executable, "-I", "-S", "-c", code, mountpoint, *numbers]
    answer = _in_a_process(command, timeout_s)
    if answer is None:
        return "hangs"
    return "dead" if answer[0] == 3 else "answers"


def read_file(path: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> bytes | None:
    """Return a small file of a mount that may hang; None where it cannot be read.

    Raises:
        TimeoutError: no answer in time.
    """
    answer = _in_a_process(["cat", "--", path], timeout_s)
    if answer is None:
        raise TimeoutError(path)
    return answer[1] if answer[0] == 0 else None


def write_file(path: str, text: str, *, timeout_s: float) -> None:
    """Write to a control file of a mount that may hang.

    Args:
        path: of the file.
        text: one whole value.
        timeout_s: the most to wait, seconds.

    Raises:
        OSError: as open(2) and write(2).
        TimeoutError: no response in time; the value may be written later.
    """
    code = (
        "import os, sys\n"
        "try: os.write(os.open(sys.argv[1], os.O_WRONLY), sys.argv[2].encode())\n"
        "except OSError as error: sys.exit(error.errno)\n"
    )
    response = _in_a_process([sys.executable, "-I", "-S", "-c", code, path, text], timeout_s)
    if response is None:
        raise TimeoutError(path)
    if response[0] != 0:
        raise errors.os_error_from_errno(response[0], path)


def _in_a_process(command: list[str], timeout_s: float) -> tuple[int, bytes] | None:
    """Return (exit status, output), or None when it takes too long; then it is left to itself."""
    process = subprocess.Popen(  # noqa: S603  (a list, no shell)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # A process in an unanswered request dies only when that is answered: no wait for it here.
        process.kill()
        if process.stdout:
            process.stdout.close()
        process.returncode = -9
        return None
    return process.returncode, output


def fusermount(major: int | None = None) -> str | None:
    """Return the program that mounts and unmounts for users who are not root.

    Args:
        major: the libfuse that will call it, by a name of its own; None for any.
    """
    names = {2: ("fusermount",), 3: ("fusermount3",)}.get(major or 0, ("fusermount3", "fusermount"))
    for name in names:
        found = shutil.which(name)
        if found and os.path.isabs(found):  # PATH may name the directory that we are started in
            return found
    return None


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount.

    Args:
        mountpoint: an absolute path without links.
        lazy: let it vanish from the tree now, and end when the last user lets go.

    Raises:
        OSError: EBUSY while somebody holds it; EINVAL where nothing is mounted; EPERM.
    """
    program = fusermount()
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if libc.umount2(os.fsencode(mountpoint), flags) == 0:
            return
        failure = errors.os_error_from_errno(ctypes.get_errno(), mountpoint)
        # The root of a user namespace, or of a container, may lack the right. Its fusermount3 may
        # have it: in some containers that is a program which asks the host to unmount.
        if program is None or not errors.is_not_permitted(failure):
            raise failure
    if program is None:
        raise errors.not_permitted(mountpoint, "unmounting needs fusermount3 (package fuse3)")
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
        words = " ".join(done.stderr.split()) or f"{program} failed"
        if "busy" in words.lower():
            raise errors.busy(mountpoint, words)
        raise errors.not_permitted(mountpoint, words)


def find_mount_users(mountpoint: str) -> list[MountUser]:
    """Return the other processes that hold a mount, as far as we may look; one entry each."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            what = next(_held_by(f"/proc/{name}", mountpoint), None)
            if what is not None:
                found.append(MountUser(int(name), _comm(name), what))
    return sorted(found, key=lambda holder: holder.pid)


def _held_by(process: str, mountpoint: str) -> Iterator[str]:
    def is_inside(target: str) -> bool:
        return target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/")

    for link, what in (("cwd", "its working directory"), ("root", "its root")):
        target = _readlink(f"{process}/{link}")
        if target is not None and is_inside(target):
            yield what
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
    """Return the processes that serve a mount, as far as we may look: by what they hold and say.

    The kernel does not tell which process serves a mount, and a mount that hangs cannot be asked.
    """
    numbers = [name for name in os.listdir("/proc") if name.isdigit()]
    return sorted(int(name) for name in numbers if _serves(f"/proc/{name}", mount))


def is_running(pid: int) -> bool:
    """Tell whether a process still runs; one that only waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]  # proc(5): the third field
    except OSError:
        return False
    return state not in (b"Z", b"X")


def _serves(process: str, mount: Mount) -> bool:
    try:
        with open(f"{process}/cmdline", "rb") as file:
            # Each ends in NUL; nothing after the last one, or it would stand for the folder below.
            arguments = [os.fsdecode(each) for each in file.read().split(b"\0") if each]
        if not any("tinkerfs" in argument for argument in arguments):
            return False
        numbers = os.listdir(f"{process}/fd")
        # In a container the same path may be another mount.
        if all(each.device != mount.device for each in list_mounts(f"{process}/mountinfo")):
            return False
    except OSError:
        return False
    if not any(_readlink(f"{process}/fd/{number}") == "/dev/fuse" for number in numbers):
        return False
    folder = _readlink(f"{process}/cwd") or "/"
    return any(
        os.path.normpath(os.path.join(folder, argument)) == mount.mountpoint
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
    """Look every `step_s` whether a condition holds; return whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return condition()
        time.sleep(step_s)
    return True
