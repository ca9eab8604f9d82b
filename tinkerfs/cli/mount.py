"""The command `tinkerfs mount`."""

from typing import Any

import click

from tinkerfs.cli.daemon import serve_option, start_in_background
from tinkerfs.cli.mount_options import MountCommand
from tinkerfs.cli.options import mountpoint_argument, settings_options
from tinkerfs.config import Settings


@click.command(cls=MountCommand, short_help="Mount the account on a directory.")
@mountpoint_argument()
@click.option("--foreground", is_flag=True, help="Do not detach; log to standard error.")
@serve_option
@settings_options()
@click.option(
    "-o",
    "mount_options",
    metavar="OPT[,OPT]...",
    multiple=True,
    expose_value=False,
    help="Options in the form of mount(8): any of the above as NAME=VALUE, ro, rw. Generic options"
    " of mount(8), fstab and FUSE are ignored.",
)
def mount(mountpoint: str, foreground: bool, serve: str | None, **settings: Any) -> None:
    """Mount the account on the empty directory MOUNTPOINT.

    Returns when the mount is ready, or exits with a one-line error. To unmount, run `tinkerfs
    umount` or umount(8), or send SIGTERM or SIGINT to the serving process.

    MOUNTPOINT may also be /dev/fd/N, a descriptor that a privileged process mounted and passes on,
    as in an unprivileged container. No privilege is needed then; the other process unmounts.

    The API key is read from TINKER_API_KEY, from the output of TINKER_CREDENTIAL_CMD, or from the
    login that `tinker auth login` stored, in this order. It is never passed on the command line.
    Times are seconds, or have a unit: 30s, 15m, 24h, 7d.

    \b
        tinkerfs mount ~/tinker
        tinkerfs mount --read-only --ttl 5m ~/tinker
        tinkerfs mount --foreground --log-level debug ~/tinker
        mount -t fuse.tinkerfs tinker /mnt/tinker -o ro,allow_other
    """  # noqa: D301
    if not foreground and serve is None:
        start_in_background(mountpoint)
        return
    from tinkerfs.cli import mount_process  # lazy: imports the FUSE adapter

    mount_process.run_foreground(Settings(**settings), serve or mountpoint)
