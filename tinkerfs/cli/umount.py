"""`tinkerfs umount`."""

from typing import TYPE_CHECKING, Final

import click

from tinkerfs import errors
from tinkerfs.errors import SetupError

if TYPE_CHECKING:
    from tinkerfs.adapters.mounts import Holder

__all__ = ["umount"]

#: After the mount is gone from the tree: how long its daemon has to end. With --force it may go on
#: serving who still holds it, for as long as they like.
_DAEMON_TIMEOUT_S: Final = 5.0
_FORCED_TIMEOUT_S: Final = 0.5
#: More than these are not named.
_MAX_HOLDERS: Final = 5


@click.command(short_help="Unmount, and wait until it is gone.")
@click.argument("mountpoint")
@click.option(
    "--force",
    is_flag=True,
    help="Detach it now, whoever holds it; who does gets errors until they let go.",
)
def umount(mountpoint: str, force: bool) -> None:
    """Unmount the tinkerfs at MOUNTPOINT, and wait until its daemon is gone too.

    Where somebody holds the mount, by a file or a working directory, says who, and exits 1. Cleans
    up what a dead daemon has left.

    \b
        tinkerfs umount ~/tinker
        tinkerfs umount --force ~/tinker
    """  # noqa: D301
    from tinkerfs.adapters import mounts

    path = mounts.absolute(mountpoint)
    mount = mounts.find_mount(path)
    if mount is None:
        raise SetupError(f"{mountpoint} is not mounted")
    if mount.fstype != mounts.FSTYPE:
        raise SetupError(f"{mountpoint} is a mount of {mount.fstype}, not of tinkerfs")
    daemons = mounts.daemons(mount)
    try:
        mounts.unmount(path, lazy=force or mounts.probe(path) == "dead")
    except OSError as error:
        if not errors.is_busy(error):
            raise SetupError(f"{mountpoint} cannot be unmounted: {error.strerror}") from None
        raise SetupError(_busy(mountpoint, mounts.holders(path))) from None
    timeout_s = _FORCED_TIMEOUT_S if force else _DAEMON_TIMEOUT_S
    if not mounts.wait_until(lambda: not any(mounts.is_running(pid) for pid in daemons), timeout_s):
        # The tree is free already, so this is no failure.
        click.echo(
            f"tinkerfs: {mountpoint} is gone; its process"
            f" {', '.join(map(str, daemons))} serves those who still hold it",
            err=True,
        )


def _busy(mountpoint: str, holders: "list[Holder]") -> str:
    if not holders:
        who = "by a process that cannot be seen from here"
    else:
        who = "by " + ", ".join(str(holder) for holder in holders[:_MAX_HOLDERS])
        if len(holders) > _MAX_HOLDERS:
            who += f" and {len(holders) - _MAX_HOLDERS} more"
    return f"{mountpoint} is busy: held {who}: end that, or tinkerfs umount --force {mountpoint}"
