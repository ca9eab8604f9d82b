"""`tinkerfs mount`."""

import click

from tinkerfs.cli.options import as_arguments, mountpoint_argument, resolve, settings_options


@click.command(short_help="Mount the account on a folder.")
@mountpoint_argument()
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
@settings_options()
@click.option(
    "-o",
    "mount_options",
    metavar="OPT[,OPT]...",
    multiple=True,
    help="Any of the above as NAME=VALUE, as mount(8) gives them; ro and rw; what else fstab holds"
    " is taken quietly.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="A TOML file of these options, by their names; else ~/.config/tinkerfs/config.toml over"
    " /etc/tinkerfs.toml.  [env: TINKERFS_CONFIG]",
)
def mount(
    mountpoint: str,
    foreground: bool,
    mount_options: tuple[str, ...],
    config: str | None,
    **flags: str | bool | None,
) -> None:
    """Mount the account on the empty folder MOUNTPOINT.

    Returns when the mount answers, or says in one line why it will not. SIGTERM and SIGINT to the
    serving process unmount; so do `tinkerfs umount` and umount(8).

    The key is TINKER_API_KEY, else what TINKER_CREDENTIAL_CMD prints, else what `tinker auth login`
    stored; it is never on the command line. Times are seconds, or have a unit: 30s, 15m, 24h, 7d.

    \b
        tinkerfs mount ~/tinker
        tinkerfs mount --read-only --ttl 5m ~/tinker
        tinkerfs mount --foreground --log-level debug ~/tinker
        mount -t fuse.tinkerfs tinker /mnt/tinker -o ro,allow_other
    """  # noqa: D301
    settings = resolve(flags, mount_options, config=config)

    from tinkerfs.cli import mount_process

    if foreground:
        mount_process.run_foreground(settings, mountpoint)
    else:
        arguments = as_arguments(flags, mount_options, config)
        mount_process.start_in_background("mount", mountpoint, arguments)
