"""`tinkerfs path` and `tinkerfs url`: a tinker path to its file path, and back."""

import os
from typing import TYPE_CHECKING

import click

from tinkerfs.errors import StartupError

if TYPE_CHECKING:
    from tinkerfs.fuse.mount_table import Mount

_SCHEME = "tinker://"


@click.command(short_help="Print the file path of a tinker path.")
@click.argument("tinker_path")
@click.option("--mount", "mountpoint", metavar="MOUNTPOINT", help="Which mount, where several are.")
def path(tinker_path: str, mountpoint: str | None) -> None:
    """Print where TINKER_PATH, tinker://<run>/<kind>/<name> or tinker://<run>, is below the mount.

    Asks nobody whether it exists: looking at it does.

    \b
        cd "$(tinkerfs path tinker://79db3d29:train:0/weights/0001)"
    """  # noqa: D301
    from tinkerfs.tinker_path import TinkerPath
    from tinkerfs.vfs import entities

    run_id = tinker_path.removeprefix(_SCHEME)
    try:
        if tinker_path.startswith(_SCHEME) and run_id and "/" not in run_id:
            place = entities.run_path(run_id)
        else:
            place = entities.path_for_tinker_path(TinkerPath.parse(tinker_path))
    except ValueError as error:
        raise StartupError(str(error)) from None
    click.echo(os.fsencode(_chosen(mountpoint).mountpoint.rstrip("/") + place))


@click.command(short_help="Print the tinker path of a file path.")
@click.argument("file_path", metavar="PATH")
def url(file_path: str) -> None:
    """Print the tinker:// path of the checkpoint that PATH, below a mount, is or belongs to.

    \b
        tinkerfs url ~/tinker/runs/79db3d29:train:0/latest
    """  # noqa: D301
    from tinkerfs import name_encoding

    real = _real(file_path)
    mount = _holding(real)
    if mount is None:
        raise StartupError(f"{file_path} is not below a mount of tinkerfs")
    parts = os.path.relpath(real, mount.mountpoint).split("/")
    if parts[:2] == ["adapters", ".content"]:
        parts = parts[1:]
    if parts[0] == ".content":  # .content/<run>/<kind>/<name>/<version>/...
        parts = ["runs", parts[1], "checkpoints", *parts[2:4]] if len(parts) > 3 else []
    if len(parts) == 2 and parts[0] == "runs":
        click.echo(os.fsencode(_SCHEME + name_encoding.decode(parts[1])))
        return
    # A checkpoint is runs/<run>/checkpoints/<kind>/<name>, or .tinkerfs/trash/<what names it>.
    depth = 3 if parts[:2] == [".tinkerfs", "trash"] else 5
    place = os.path.join(mount.mountpoint, *parts[:depth], "tinker_path")
    if parts[0] in ("runs", ".tinkerfs") and len(parts) >= depth and os.path.isfile(place):
        with open(place, "rb") as file:
            click.echo(file.read(), nl=False)
        return
    raise StartupError(f"{file_path} is no checkpoint, nor in one")


def _chosen(mountpoint: str | None) -> "Mount":
    """Return the mount that is meant."""
    from tinkerfs.fuse import mount_table

    found = mount_table.tinkerfs_mounts()
    if mountpoint is not None:
        wanted = mount_table.canonical_mountpoint(mountpoint)
        found = [mount for mount in found if mount.mountpoint == wanted]
        if not found:
            raise StartupError(f"{mountpoint} is no mount of tinkerfs: tinkerfs mount {mountpoint}")
    if not found:
        raise StartupError("nothing is mounted: tinkerfs mount MOUNTPOINT")
    if len({mount.mountpoint for mount in found}) > 1:
        names = ", ".join(mount.mountpoint for mount in found)
        raise StartupError(f"several are mounted: say --mount MOUNTPOINT, one of {names}")
    return found[-1]


def _real(file_path: str) -> str:
    """Return a path without links, which the views and `latest` are."""
    try:
        return os.path.realpath(file_path, strict=True)
    except OSError as error:
        raise StartupError(f"{file_path}: {error.strerror}") from None


def _holding(real: str) -> "Mount | None":
    """Return the mount that a path is below, or is."""
    from tinkerfs.fuse import mount_table

    holding = [
        m
        for m in mount_table.list_mounts()
        if os.path.commonpath((m.mountpoint, real)) == m.mountpoint
    ]
    innermost = max(holding, key=lambda mount: len(mount.mountpoint), default=None)
    return innermost if innermost is not None and innermost.fstype == mount_table.FSTYPE else None
