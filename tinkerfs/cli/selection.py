"""Select a mount of this machine, for commands that read the state of one."""

from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount
from tinkerfs.printable import escape_control_chars


def select_mount(mountpoint: str | None, usage: str = "MOUNTPOINT") -> Mount:
    """Return the mount at `mountpoint`, or the only mount of this user and root.

    Args:
        usage: how the user names a mount, for messages.

    Raises:
        StartupError: there is no such mount, or there are several.
    """
    found = mount_table.tinkerfs_mounts()
    if mountpoint is not None:
        path = mount_table.canonical_mountpoint(mountpoint)
        found = [mount for mount in found if mount.mountpoint == path]
        if not found:
            raise StartupError(
                f"{mountpoint} is not a tinkerfs mount (hint: tinkerfs mount {mountpoint})"
            )
    else:
        found = [mount for mount in found if mount.is_trusted]
    if not found:
        raise StartupError("nothing is mounted (hint: tinkerfs mount MOUNTPOINT)")
    if len({mount.mountpoint for mount in found}) > 1:
        names = ", ".join(mount.mountpoint for mount in found)
        raise StartupError(f"there are several mounts (hint: use {usage} with one of {names})")
    return found[-1]


def explain_lost_mount(mountpoint: str) -> StartupError:
    """Return the error for a mount that has stopped to reply."""
    shown = escape_control_chars(mountpoint)
    if mount_table.find_mount(mountpoint) is None:
        return StartupError(f"{shown} was unmounted")
    if mount_table.check_health(mountpoint) == "dead":
        return StartupError(
            f"{shown}: the daemon has exited (hint: tinkerfs umount {shown}, or mount it again)"
        )
    return StartupError(f"{shown}: its files in .tinkerfs cannot be read by this user")


def explain_silence(mountpoint: str) -> StartupError:
    """Return the error for a mount that does not reply in time."""
    shown = escape_control_chars(mountpoint)
    return StartupError(f"{shown} does not reply (hint: tinkerfs debug bundle shows why)")
