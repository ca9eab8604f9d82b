"""The command `tinkerfs umount`."""

from typing import Final

import click

from tinkerfs import errors
from tinkerfs.cli.options import mountpoint_argument
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import MountUser
from tinkerfs.fuse.mounted_fd import parse_fd
from tinkerfs.printable import escape_control_chars

#: Wait at most this long for the daemon to exit after the unmount.
_DAEMON_TIMEOUT_S: Final = 5.0
#: The same if other processes still use the mount: the daemon serves them for an unlimited time.
_IN_USE_TIMEOUT_S: Final = 0.5
#: Maximum number of processes that a message names.
_MAX_NAMED_USERS: Final = 5


@click.command(short_help="Unmount, and wait until the daemon has exited.")
@mountpoint_argument()
@click.option(
    "--force",
    is_flag=True,
    help="Detach a busy mount (as umount -l); processes that use it are served until they exit.",
)
def umount(mountpoint: str, force: bool) -> None:
    """Unmount the tinkerfs mount at MOUNTPOINT, and wait until its daemon has exited.

    If the mount is busy, prints the processes that have a file or their working directory in it,
    and exits 1. Also removes the stale mount of a dead daemon.

    \b
        tinkerfs umount ~/tinker
        tinkerfs umount --force ~/tinker
    """  # noqa: D301
    if parse_fd(mountpoint) is not None:
        raise StartupError(
            f"{mountpoint} is unmounted by the process that mounted it (hint: tinkerfs umount of"
            " the mountpoint, or end the daemon with SIGTERM)"
        )
    path = mount_table.canonical_mountpoint(mountpoint)
    mount = mount_table.find_mount(path)
    if mount is None:
        raise StartupError(f"{mountpoint} is not mounted")
    if mount.fstype != mount_table.FSTYPE:
        raise StartupError(f"{mountpoint} is a mount of {mount.fstype}, not of tinkerfs")
    daemons = mount_table.find_daemon_pids(mount)
    # Search before detaching: afterwards the mount has no path, and its users cannot be found.
    users = _format_users(mount_table.find_mount_users(path)) if force else ""
    try:
        mount_table.unmount(path, lazy=force or mount_table.check_health(path) == "dead")
    except OSError as error:
        if not errors.is_busy(error):
            raise StartupError(f"{mountpoint} cannot be unmounted: {error.strerror}") from None
        users = (
            _format_users(mount_table.find_mount_users(path))
            or "a process that is not visible to this user"
        )
        raise StartupError(
            f"{mountpoint} is busy: in use by {users} (hint: end it, or run tinkerfs umount"
            f" --force {mountpoint})"
        ) from None
    timeout_s = _IN_USE_TIMEOUT_S if users else _DAEMON_TIMEOUT_S
    mount_table.wait_until(lambda: not any(map(mount_table.is_running, daemons)), timeout_s)
    running = " ".join(str(pid) for pid in daemons if mount_table.is_running(pid))
    if not running:
        return
    # The mountpoint is free, so this is not a failure.
    if users:
        reason = f"serves {users} until they exit"
    else:
        # A process that is blocked in open() uses the mount too, but cannot be found.
        reason = (
            "still runs: a process is waiting in the mount, or the daemon hangs"
            f" (hint: kill -9 {running})"
        )
    message = f"tinkerfs: {mountpoint} is detached; its daemon {running} {reason}"
    click.echo(escape_control_chars(message), err=True)


def _format_users(users: list[MountUser]) -> str:
    """Name the first few processes that use a mount; return "" if there are none."""
    names = ", ".join(str(user) for user in users[:_MAX_NAMED_USERS])
    more = len(users) - _MAX_NAMED_USERS
    return f"{names} and {more} more" if more > 0 else names
