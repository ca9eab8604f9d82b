"""A descriptor of /dev/fuse in place of a mountpoint: `/dev/fd/N`, which another process mounted.

A privileged process, such as a CSI driver or mount.fuse3, calls mount(2) and passes the descriptor.
The daemon then needs neither a privilege nor /dev/fuse nor the mountpoint, which may be in another
mount namespace. The other process chooses the mount options, and unmounts. libfuse 3 supports such
a descriptor under this name; libfuse 2 does not.
"""

import fcntl
import os
import re
import select

from tinkerfs.errors import StartupError

_DEVICE = "/dev/fuse"
_HINT = "a privileged process opens /dev/fuse, calls mount(2) with fd=N, and passes the descriptor"


def parse_fd(mountpoint: str) -> int | None:
    """Return the number of a descriptor that is given as `/dev/fd/N`; None for a path."""
    match = re.fullmatch(r"/dev/fd/(\d{1,9})", mountpoint)
    return int(match[1]) if match else None


def check_fd(fd: int) -> None:
    """Check that a descriptor is that of a mount without a daemon.

    Raises:
        StartupError: it is not; the message names it.
    """
    name = f"/dev/fd/{fd}"
    if fd <= 2:
        raise StartupError(
            f"{name} is a standard stream, which is replaced in the background"
            " (hint: pass a descriptor from 3 up)"
        )
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        raise StartupError(f"{name} is closed (hint: {_HINT})") from None
    if target != _DEVICE:
        raise StartupError(f"{name} is {target}, not {_DEVICE} (hint: {_HINT})")
    if mode != os.O_RDWR:
        raise StartupError(f"{name} is not open for reading and writing (hint: {_HINT})")
    # Without a mount the device reports an error. mount(2) queues the request INIT, so a mounted
    # device without a request has, or had, a daemon (kernel: fs/fuse/dev.c, fuse_dev_poll).
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    events = dict(poll.poll(0)).get(fd, 0)
    if events & select.POLLERR:
        raise StartupError(f"{name} is not mounted, or not any more (hint: {_HINT})")
    if not events & select.POLLIN:
        raise StartupError(
            f"{name} is or was served by another process, and a mount serves one daemon"
            " (hint: unmount it, and mount a new descriptor)"
        )


def connection_device(process: str, fd: int | None) -> str | None:
    """Return the device number of the mount that a descriptor of /dev/fuse serves.

    Args:
        process: a directory of /proc.
        fd: number of the descriptor; None for none.

    Returns:
        A number as in `Mount.device`; None if the descriptor is another file, or on old kernels.
    """
    try:
        if os.readlink(f"{process}/fd/{fd}") != _DEVICE:
            return None
        with open(f"{process}/fdinfo/{fd}", encoding="ascii") as file:
            found = re.search(r"^fuse_connection:\s*(\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return f"0:{found[1]}" if found else None  # an anonymous device (proc_pid_mountinfo(5))
