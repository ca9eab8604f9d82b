"""`tinkerfs undelete`."""

from typing import TYPE_CHECKING, TypeVar

import click

from tinkerfs.cli.options import settings_options
from tinkerfs.cli.transfers import complete_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinkerfs.cli.transfers import Location

T = TypeVar("T")

#: The longest wait for a mount, seconds: it may list the run, then make the call.
_TIMEOUT_S = 120.0


@click.command(short_help="Restore what was removed with --trash.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@settings_options("base_url", "cache_dir", "timeout_s", "log_file", "log_level")
def undelete(paths: tuple[str, ...], **flags: str | None) -> None:
    """Restore checkpoints from the trash, each with the expiry that it had before.

    PATH is a link in .tinkerfs/trash, the path that was removed, or a tinker path. Where a mount
    of the account is up it makes the change, else this command does. Prints the tinker path of
    each; exits 1 if one could not be restored.

    \b
        tinkerfs undelete ~/tinker/runs/79db3d29:train:0/checkpoints/weights/0001
        tinkerfs undelete ~/tinker/.tinkerfs/trash/*
        tinkerfs undelete tinker://79db3d29:train:0/weights/0001
    """  # noqa: D301
    from tinkerfs.cli import transfers
    from tinkerfs.errors import TinkerfsError
    from tinkerfs.printable import printable

    failures: list[transfers.Failure] = []
    for given in paths:
        try:
            place = transfers.parse_location(given, flags)
            restored = _through_a_mount(place) or _in_this_process(place)
        except (OSError, TinkerfsError) as error:
            failures.append(transfers.Failure(given, error))
        else:
            click.echo(printable(restored))
    if failures:
        transfers.exit_with_failures(failures)


def _through_a_mount(place: "Location") -> str | None:
    """Restore a checkpoint through a mount that has it in its trash.

    Returns:
        its tinker path; None if no mount has it.

    Raises:
        OSError: ENOENT if the mount that PATH is below does not have it; as the write.
        SetupError: a mount does not respond.
    """
    from tinkerfs import errors

    for mountpoint in _mountpoints(place):
        restored = None
        try:
            restored = _at(mountpoint, place)
        except TimeoutError:
            raise errors.StartupError(
                f"the mount at {mountpoint} does not respond; whether it restores the checkpoint"
                f" is in {mountpoint}/.tinkerfs/changes"
            ) from None
        except OSError as error:
            if place.mountpoint or not errors.is_read_only(error):
                raise
        if restored is not None:
            return restored
    if place.mountpoint:
        raise errors.not_in_trash(place.shown)
    return None


def _at(mountpoint: str, place: "Location") -> str | None:
    from tinkerfs.fuse import mount_table

    found: list[tuple[str, bytes]] = []
    for link in _links(place):
        read = mount_table.read_file(f"{mountpoint}{link}/tinker_path", timeout_s=_TIMEOUT_S)
        if read is not None:
            found.append((f"{mountpoint}{link}/expires_at", read))
    if not found:
        return None
    control, tinker_path = _only(found)
    mount_table.write_file(control, "never", timeout_s=_TIMEOUT_S)
    return tinker_path.decode("utf-8", "surrogateescape").strip()


def _mountpoints(place: "Location") -> "Iterator[str]":
    """Yield the mounts that may have a checkpoint in their trash."""
    from tinkerfs.cli import transfers
    from tinkerfs.errors import StartupError
    from tinkerfs.fuse import mount_table

    if place.mountpoint:
        yield place.mountpoint
        return
    for mount in mount_table.tinkerfs_mounts():
        try:
            of_mount = transfers.settings_of(mount)
        except StartupError:  # it hangs, or is dead
            continue
        if of_mount["base_url"] == place.settings.base_url:
            yield mount.mountpoint


def _in_this_process(place: "Location") -> str:
    """Restore a checkpoint without a mount; return its tinker path."""
    import os

    from tinkerfs import errors
    from tinkerfs.cli import transfers
    from tinkerfs.context import BACKGROUND_CONTEXT

    found: list[str] = []
    with transfers.open_account(place.settings) as parts:
        for link in _links(place):
            try:
                found.append(parts.filesystem.realpath(link, BACKGROUND_CONTEXT))
            except OSError as error:
                if not errors.is_missing(error):
                    raise
        if not found:
            raise errors.not_in_trash(place.shown)
        directory = _only(found)
        handle = parts.filesystem.open(f"{directory}/tinker_path", os.O_RDONLY, BACKGROUND_CONTEXT)
        tinker_path = (
            handle.read(1 << 20, 0, BACKGROUND_CONTEXT).decode("utf-8", "surrogateescape").strip()
        )
        control = parts.filesystem.open(f"{directory}/expires_at", os.O_WRONLY, BACKGROUND_CONTEXT)
        control.write(b"never", BACKGROUND_CONTEXT)
    return tinker_path


def _links(place: "Location") -> list[str]:
    from tinkerfs.errors import StartupError
    from tinkerfs.vfs.trash import trash_paths

    try:
        return trash_paths(place.path)
    except ValueError as error:
        raise StartupError(f"{error} (hint: name its link in .tinkerfs/trash)") from None


def _only(found: list[T]) -> T:
    from tinkerfs.errors import StartupError

    if len(found) > 1:
        raise StartupError("checkpoints of several kinds have this name (hint: say which kind)")
    return found[0]
