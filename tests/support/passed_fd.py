"""Mounts of a privileged process, and daemons without privileges that get their descriptors."""

import ctypes
import os
import socket
import sys
from pathlib import Path

from tests.support.mount import ROOT

_MS_NOSUID, _MS_NODEV = 2, 4

#: A user without a name, home or group, as in a pod.
UID = 12345


def mount_fd(mountpoint: Path | str, *, fstype: str = "fuse.tinkerfs") -> int:
    """Mount as CSI drivers do; return the descriptor, without a daemon."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = b"tinkerfs", os.fsencode(mountpoint), fstype.encode()
    if libc.mount(*arguments, _MS_NOSUID | _MS_NODEV, options.encode()) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number), str(mountpoint))
    return fd


def send_fd(connection: socket.socket, message: bytes, fd: int) -> None:
    """Pass a descriptor over a Unix socket (unix(7), SCM_RIGHTS)."""
    socket.send_fds(connection, [message], [fd])


#: Receives a descriptor from a socket, and runs a command with it as number 3.
RECEIVE_FD = ROOT / "scripts/container/receive-fd"


def in_pod(directory: Path, *command: str | Path, devices: str = "") -> list[str]:
    """Return the command that runs `command` as in an unprivileged container.

    It has its own mount namespace, a user id without a passwd entry, no capability and no way to
    get one. `/dev` has no other device than `devices`, which a script makes there, and a mount at
    `mnt` is not visible. The environment is that of the caller.

    Args:
        directory: the parent of `mnt`, for temporary mountpoints.
        command: the command.
        devices: lines of a shell script.
    """
    script = f"""
        mkdir -p {directory}/exposed
        {expose(directory / "exposed")}
        mount -t tmpfs -o mode=755 none /dev
        mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9
        {devices}
        ! grep -q " {directory}/mnt " /proc/self/mounts || umount -l {directory}/mnt
        exec setpriv --reuid {UID} --regid {UID} --clear-groups --no-new-privs \\
            --inh-caps=-all --bounding-set=-all "$@"
    """
    return ["unshare", "-m", "sh", "-ec", script, "sh", *map(str, command)]


def expose(directory: Path) -> str:
    """Return the script that lets every user read this Python, wherever it is installed.

    It runs in a mount namespace of its own, where `directory` exists.
    """
    lines = []
    for number, path in enumerate(
        dict.fromkeys(map(os.path.realpath, (sys.base_prefix, sys.prefix, ROOT)))
    ):
        parents = [*reversed(Path(path).parents), Path(path)]
        private = next((each for each in parents if not each.stat().st_mode & 0o001), None)
        if private is None:
            continue
        copy = directory / str(number)
        lines.append(f"mkdir {copy}; mount --bind {path} {copy}")
        lines.append(f"mount -t tmpfs -o mode=755 none {private}")
        lines.append(f"mkdir -p {path}; mount --bind {copy} {path}")
    return "\n".join(lines)
