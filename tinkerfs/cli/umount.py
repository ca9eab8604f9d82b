"""`tinkerfs umount`."""

from typing import TYPE_CHECKING, Final

import click

from tinkerfs import errors
from tinkerfs.cli.options import mountpoint_argument
from tinkerfs.errors import StartupError
from tinkerfs.printable import printable

if TYPE_CHECKING:
    from tinkerfs.fuse.mount_table import MountUser

#: After the mount is gone from the tree: how long its daemon has to end.
_DAEMON_TIMEOUT_S: Final = 5.0
#: With --force it goes on for who held the mount, for as long as they like: no use waiting long.
_HELD_TIMEOUT_S: Final = 0.5
#: More than these are not named.
_MAX_HOLDERS: Final = 5


@click.command(short_help="Unmount, and wait until it is gone.")
@mountpoint_argument()
@click.option(
    "--force",
    is_flag=True,
    help="Detach it now, whoever holds it; who does is served until they let go.",
)
def umount(mountpoint: str, force: bool) -> None:
    """Unmount the tinkerfs at MOUNTPOINT, and wait until its daemon is gone too.

    Where somebody holds the mount, by a file or a working directory, says who, and exits 1. Cleans
    up what a dead daemon has left.

    \b
        tinkerfs umount ~/tinker
        tinkerfs umount --force ~/tinker
    """  # noqa: D301
    from tinkerfs.fuse import mount_table

    path = mount_table.canonical_mountpoint(mountpoint)
    mount = mount_table.find_mount(path)
    if mount is None:
        raise StartupError(f"{mountpoint} is not mounted")
    if mount.fstype != mount_table.FSTYPE:
        raise StartupError(f"{mountpoint} is a mount of {mount.fstype}, not of tinkerfs")
    daemons = mount_table.find_daemon_pids(mount)
    # Before it is detached: nobody can be seen to hold what has no place in the tree any more.
    held_by = _format_users(mount_table.find_mount_users(path)) if force else ""
    try:
        mount_table.unmount(path, lazy=force or mount_table.check_health(path) == "dead")
    except OSError as error:
        if not errors.is_busy(error):
            raise StartupError(f"{mountpoint} cannot be unmounted: {error.strerror}") from None
        held_by = (
            _format_users(mount_table.find_mount_users(path))
            or "a process that cannot be seen from here"
        )
        raise StartupError(
            f"{mountpoint} is busy: held by {held_by}: end that, or tinkerfs umount --force"
            f" {mountpoint}"
        ) from None
    timeout_s = _HELD_TIMEOUT_S if held_by else _DAEMON_TIMEOUT_S
    mount_table.wait_until(lambda: not any(map(mount_table.is_running, daemons)), timeout_s)
    left = " ".join(str(pid) for pid in daemons if mount_table.is_running(pid))
    if not left:
        return
    # The tree is free already, so this is no failure.
    if held_by:
        end = f"its process {left} goes on until it is let go by {held_by}"
    else:
        # Who waits in open() holds it too, and is not seen to.
        why = "for who waits in it or because it hangs"
        end = f"its process {left} still runs, {why}: kill -9 {left}"
    click.echo(printable(f"tinkerfs: {mountpoint} is detached; {end}"), err=True)


def _format_users(holders: "list[MountUser]") -> str:
    """Name who holds a mount, the first few; nobody is the empty string."""
    who = ", ".join(str(holder) for holder in holders[:_MAX_HOLDERS])
    more = len(holders) - _MAX_HOLDERS
    return f"{who} and {more} more" if more > 0 else who
