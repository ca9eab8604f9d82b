"""The command `tinkerfs undelete`."""

import os
from collections.abc import Iterator
from typing import Any, TypeVar

import click

from tinkerfs import errors
from tinkerfs.cli.locations import (
    Location,
    complete_path,
    open_account,
    parse_location,
    read_mount_settings,
)
from tinkerfs.cli.options import settings_options
from tinkerfs.cli.transfers import exit_with_failures
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError, TinkerfsError
from tinkerfs.fuse import mount_table
from tinkerfs.printable import escape_control_chars
from tinkerfs.transfer.failure import Failure

T = TypeVar("T")

#: Wait at most this long for a mount, seconds: it may list the run and then change it.
_TIMEOUT_S = 120.0


@click.command(short_help="Restore checkpoints that were removed under --trash.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@settings_options("base_url", "api_key_file", "cache_dir", "timeout_s", "log_file", "log_level")
def undelete(paths: tuple[str, ...], **settings: Any) -> None:
    """Restore checkpoints from the trash, with their expiry from before the removal.

    PATH is a link in .tinkerfs/trash, the path of a removed checkpoint, or a tinker path. The
    request is sent by a mount of the account if there is one, otherwise by this command. Prints
    the tinker path of each restored checkpoint. Exits 1 if one could not be restored.

    \b
        tinkerfs undelete ~/tinker/runs/79db3d29:train:0/checkpoints/weights/0001
        tinkerfs undelete ~/tinker/.tinkerfs/trash/*
        tinkerfs undelete tinker://79db3d29:train:0/weights/0001
    """  # noqa: D301
    failures = list[Failure]()
    for path in paths:
        try:
            location = parse_location(path, Settings(**settings))
            restored = _restore_through_mount(location) or _restore_in_process(location)
        except (OSError, TinkerfsError) as error:
            failures.append(Failure(path, error))
        else:
            click.echo(escape_control_chars(restored))
    if failures:
        exit_with_failures(failures)


def _restore_through_mount(location: Location) -> str | None:
    """Restore a checkpoint through a mount that has it in its trash.

    Returns:
        The tinker path of the checkpoint; None if no mount has it in its trash.

    Raises:
        OSError: The write failed. ENOENT if the mount that contains the path does not have it.
        StartupError: A mount does not respond.
    """
    for mountpoint in _candidate_mountpoints(location):
        restored = None
        try:
            restored = _restore_at(mountpoint, location)
        except TimeoutError:
            raise StartupError(
                f"the mount at {mountpoint} does not respond, but may still restore the checkpoint"
                f" (hint: see {mountpoint}/.tinkerfs/changes)"
            ) from None
        except OSError as error:
            if location.mountpoint or not errors.is_read_only(error):
                raise
        if restored is not None:
            return restored
    if location.mountpoint:
        raise errors.not_in_trash(location.argument)
    return None


def _restore_at(mountpoint: str, location: Location) -> str | None:
    found: list[tuple[str, bytes]] = []
    for link in _trash_links(location):
        content = mount_table.read_file(f"{mountpoint}{link}/tinker_path", timeout_s=_TIMEOUT_S)
        if content is not None:
            found.append((f"{mountpoint}{link}/expires_at", content))
    if not found:
        return None
    control, tinker_path = _single(found)
    mount_table.write_file(control, "never", timeout_s=_TIMEOUT_S)
    return tinker_path.decode("utf-8", "surrogateescape").strip()


def _candidate_mountpoints(location: Location) -> Iterator[str]:
    """Yield the mountpoints of mounts that may have a checkpoint in their trash."""
    if location.mountpoint:
        yield location.mountpoint
        return
    for mount in mount_table.tinkerfs_mounts():
        if not mount.is_trusted:  # it may report a success without restoring anything
            continue
        try:
            settings = read_mount_settings(mount)
        except StartupError:  # the mount is dead or unresponsive
            continue
        if settings["base_url"] == location.settings.base_url:
            yield mount.mountpoint


def _restore_in_process(location: Location) -> str:
    """Restore a checkpoint without a mount; return its tinker path."""
    from tinkerfs.context import BACKGROUND_CONTEXT  # lazy: imports msgspec

    found: list[str] = []
    with open_account(location.settings) as app:
        for link in _trash_links(location):
            try:
                found.append(app.filesystem.realpath(link, BACKGROUND_CONTEXT))
            except OSError as error:
                if not errors.is_missing(error):
                    raise
        if not found:
            raise errors.not_in_trash(location.argument)
        directory = _single(found)
        handle = app.filesystem.open(f"{directory}/tinker_path", os.O_RDONLY, BACKGROUND_CONTEXT)
        tinker_path = (
            handle.read(1 << 20, 0, BACKGROUND_CONTEXT).decode("utf-8", "surrogateescape").strip()
        )
        control = app.filesystem.open(f"{directory}/expires_at", os.O_WRONLY, BACKGROUND_CONTEXT)
        control.write(b"never", BACKGROUND_CONTEXT)
    return tinker_path


def _trash_links(location: Location) -> list[str]:
    from tinkerfs.vfs.trash import trash_paths  # lazy: imports the vfs layer

    try:
        return trash_paths(location.path)
    except ValueError as error:
        raise StartupError(f"{error} (hint: use its link in .tinkerfs/trash)") from None


def _single(found: list[T]) -> T:
    if len(found) > 1:
        raise StartupError("checkpoints of several kinds have this name (hint: include the kind)")
    return found[0]
