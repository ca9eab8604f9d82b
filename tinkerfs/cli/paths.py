"""The commands `tinkerfs path` and `tinkerfs url`: convert paths."""

import os

import click

from tinkerfs import name_encoding
from tinkerfs.cli.selection import select_mount
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount
from tinkerfs.printable import escape_control_chars

_SCHEME = "tinker://"


@click.command(short_help="Print the file path for a tinker path.")
@click.argument("tinker_path")
@click.option(
    "--mount", "mountpoint", metavar="MOUNTPOINT", help="The mount to use, if there are several."
)
def path(tinker_path: str, mountpoint: str | None) -> None:
    """Print the path below the mount for TINKER_PATH.

    TINKER_PATH is tinker://<run>/<kind>/<name> or tinker://<run>. The command sends no request and
    does not check that the run or checkpoint exists.

    \b
        cd "$(tinkerfs path tinker://79db3d29:train:0/weights/0001)"
    """  # noqa: D301
    from tinkerfs.transfer.resolve import path_of  # lazy: imports the vfs layer

    tree_path = path_of(tinker_path)
    click.echo(
        os.fsencode(
            select_mount(mountpoint, "--mount MOUNTPOINT").mountpoint.rstrip("/") + tree_path
        )
    )


@click.command(short_help="Print the tinker path for a file path.")
@click.argument("file_path", metavar="PATH")
def url(file_path: str) -> None:
    """Print the tinker:// path of the run or checkpoint at PATH, below a mount.

    \b
        tinkerfs url ~/tinker/runs/79db3d29:train:0/latest
    """  # noqa: D301
    real_path = _resolve_symlinks(file_path)
    mount = _find_mount_of(real_path)
    if mount is None:
        raise StartupError(f"{file_path} is not below a tinkerfs mount")
    parts = os.path.relpath(real_path, mount.mountpoint).split("/")
    if parts[:2] == ["adapters", ".content"]:
        parts = parts[1:]
    if parts[0] == ".content":  # .content/<run>/<kind>/<name>/<version>/...
        parts = ["runs", parts[1], "checkpoints", *parts[2:4]] if len(parts) > 3 else []
    if len(parts) == 2 and parts[0] == "runs":
        click.echo(os.fsencode(_SCHEME + name_encoding.decode(parts[1])))
        return
    # A checkpoint is runs/<run>/checkpoints/<kind>/<name>, or .tinkerfs/trash/<name>.
    depth = 3 if parts[:2] == [".tinkerfs", "trash"] else 5
    tinker_path_file = os.path.join(mount.mountpoint, *parts[:depth], "tinker_path")
    if (
        parts[0] in ("runs", ".tinkerfs")
        and len(parts) >= depth
        and os.path.isfile(tinker_path_file)
    ):
        content = mount_table.read_file(tinker_path_file) or b""
        # A script passes the line to other commands: another user's mount must not send options.
        if content.startswith(_SCHEME.encode()):
            if not mount.is_trusted:
                line = os.fsdecode(content.removesuffix(b"\n"))
                content = os.fsencode(escape_control_chars(line)) + b"\n"
            click.echo(content, nl=False)
            return
    raise StartupError(f"{file_path} is not a checkpoint, nor in one")


def _resolve_symlinks(file_path: str) -> str:
    """Return a path with all symlinks resolved, such as `latest` and the views."""
    try:
        return os.path.realpath(file_path, strict=True)
    except OSError as error:
        raise StartupError(f"{file_path}: {error.strerror}") from None


def _find_mount_of(real_path: str) -> Mount | None:
    """Return the tinkerfs mount that contains a path; None if there is none."""
    containing = [
        m
        for m in mount_table.list_mounts()
        if os.path.commonpath((m.mountpoint, real_path)) == m.mountpoint
    ]
    innermost = max(containing, key=lambda mount: len(mount.mountpoint), default=None)
    return innermost if innermost is not None and innermost.fstype == mount_table.FSTYPE else None
