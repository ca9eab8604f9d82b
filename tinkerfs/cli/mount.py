"""The command `tinkerfs mount`."""

from functools import partial
from typing import Any

import click

from tinkerfs.cli.daemon import serve_option, start_in_background
from tinkerfs.cli.mount_options import MountCommand
from tinkerfs.cli.options import mountpoint_argument, reload_settings, settings_options
from tinkerfs.config import Settings


@click.command(cls=MountCommand, short_help="Mount the account on a directory.")
@mountpoint_argument()
@click.option("--foreground", is_flag=True, help="Do not detach; log to standard error.")
@serve_option
@click.option("--source", default="tinkerfs", hidden=True)  # as /proc/mounts shows it
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
def mount(
    mountpoint: str, foreground: bool, serve: str | None, source: str, **settings: Any
) -> None:
    """Mount the account on the empty directory MOUNTPOINT.

    Returns when the mount is ready, or exits with a one-line error. To unmount, run `tinkerfs
    umount` or umount(8), or send SIGTERM or SIGINT to the serving process.

    MOUNTPOINT may also be /dev/fd/N, a descriptor that a privileged process mounted and passes on,
    as in an unprivileged container. No privilege is needed then; the other process unmounts.

    The API key is never passed on the command line. The first one of these is used: the file of
    --api-key-file, TINKER_API_KEY, the output of TINKER_CREDENTIAL_CMD, the credential
    tinker-api-key of a systemd service, and the login that `tinker auth login` stored.

    SIGHUP opens the log file and reads the key again, and adopts changed values of --ttl, --stale
    and --log-level in a configuration file. On a terminal it unmounts.
    Times are seconds, or have a unit: 30s, 15m, 24h, 7d.

    \b
        tinkerfs mount ~/tinker
        tinkerfs mount --read-only --ttl 5m ~/tinker
        tinkerfs mount --foreground --log-level debug ~/tinker
        mount -t fuse.tinkerfs tinker /mnt/tinker -o ro,allow_other
    """  # noqa: D301
    from tinkerfs.fuse import preflight  # lazy: not needed for --help

    preflight.check_system()
    if not foreground and serve is None:
        start_in_background(mountpoint)
        return
    from tinkerfs.cli import mount_process  # lazy: imports the FUSE adapter

    reload = partial(reload_settings, click.get_current_context())
    mount_process.run_foreground(
        Settings(**settings), serve or mountpoint, source=source, reload=reload
    )
