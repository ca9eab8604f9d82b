"""PATH arguments of commands: the account, its settings, and the path in its tree."""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from tinkerfs.cli import logs
from tinkerfs.cli.options import Setting, settings_of
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError
from tinkerfs.fuse import mount_table
from tinkerfs.fuse.mount_table import Mount

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinkerfs.app import App

_SCHEME = "tinker://"


def complete_path(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete a path.

    `click.Path` would too, but it calls stat() on its argument. Below a mount, that may request an
    archive.
    """
    return [CompletionItem(incomplete, type="file")]


@dataclass(frozen=True, slots=True)
class Location:
    """An account and a path in its tree.

    Attributes:
        argument: The path as the user gave it.
        path: Path from the root of the tree.
        settings: Settings of the account, merged with those of the mount.
        mountpoint: Mountpoint that the path is below; empty for a tinker path, and for a path below
            a mount of another user.
    """

    argument: str
    path: str
    settings: Settings
    mountpoint: str = ""


def parse_location(argument: str, settings: Settings) -> Location:
    """Parse a PATH argument of the current command: a tinker path or a path below a mount.

    Only reads the settings of the mount, with a time limit. A flag of the command precedes them.

    A mount of another user than this one and root could name a server that steals the key, and a
    cache directory to be cleared. Its settings are not used. A path below it is a path in the tree
    of this user's account, if the user named the server or both use the same one.

    Raises:
        StartupError: The path is neither, its mount does not respond, or another user made it.
    """
    if argument.startswith(_SCHEME):
        from tinkerfs.transfer.resolve import path_of  # lazy: imports the vfs layer

        return Location(argument, path_of(argument), settings)
    mount, path = _split_at_mount(argument)
    ctx = click.get_current_context()
    options = {option.name: option for option in settings_of(ctx.command).values()}
    if not mount.is_trusted:
        _check_server(mount, settings, options["base_url"], ctx)
        return Location(argument, path, settings)
    changes: dict[str, Any] = {
        field: options[field].convert(text, mount.mountpoint, ctx)
        for field, text in read_mount_settings(mount).items()
        if ctx.get_parameter_source(field) is not ParameterSource.COMMANDLINE
    }
    return Location(argument, path, replace(settings, **changes), mount.mountpoint)


def _check_server(mount: Mount, settings: Settings, option: Setting, ctx: click.Context) -> None:
    """Raise StartupError unless a command may use its own server for another user's mount.

    Commands without the flag use a cache, and the cache of that mount is not this user's.
    """
    if not option.hidden and (
        ctx.get_parameter_source("base_url") is ParameterSource.COMMANDLINE
        or read_mount_settings(mount).get("base_url") == settings.base_url
    ):
        return
    owner = "an unknown user" if mount.owner_uid is None else f"uid {mount.owner_uid}"
    alternative = "" if option.hidden else ", or --base-url URL with a server that you trust"
    raise StartupError(
        f"the mount at {mount.mountpoint} belongs to {owner}, so its settings are not used"
        f" (hint: use a tinker path{alternative})"
    )


def _split_at_mount(argument: str) -> tuple[Mount, str]:
    """Return the mount that contains a path, and the path within the mount.

    No file below the mountpoint is accessed through the kernel. The mount may hang, and a lookup
    within `files/` would request the archive. Symlinks below the mountpoint stay unresolved.
    """
    mounted = {mount.mountpoint: mount for mount in mount_table.list_mounts()}
    done, links = "/", 0
    rest = [part for part in os.path.join(os.getcwd(), argument).split("/") if part]
    while True:
        mount = mounted.get(done)
        if mount is not None and mount.fstype == mount_table.FSTYPE:
            return mount, "/" + "/".join(rest)
        if not rest:
            break
        part = rest.pop(0)
        done = os.path.normpath(os.path.join(done, part))
        if done not in mounted and os.path.islink(done):
            links += 1
            if links > 40:  # the limit of Linux, see path_resolution(7)
                break
            target = os.readlink(done)
            rest = [each for each in target.split("/") if each] + rest
            done = "/" if target.startswith("/") else os.path.dirname(done)
    raise StartupError(
        f"{argument} is neither below a tinkerfs mount nor a tinker path ({_SCHEME}<run>/...)"
    )


def read_mount_settings(mount: Mount) -> dict[str, str]:
    """Read the settings of the account, the cache and the adapters of a mount, as text.

    Raises:
        StartupError: The mount does not respond, or runs another version of tinkerfs.
    """
    hint = f"(hint: tinkerfs status {mount.mountpoint})"
    try:
        stats = json.loads(
            mount_table.read_file(f"{mount.mountpoint}/.tinkerfs/stats.json") or b"null"
        )
    except TimeoutError:
        raise StartupError(f"the mount at {mount.mountpoint} does not respond {hint}") from None
    except (ValueError, RecursionError):
        stats = None
    names = {"base_url", "cache_dir", "cache_size_bytes", "base_models", "moe_layout"}
    if not isinstance(stats, dict) or not names <= stats.keys():
        raise StartupError(
            f"the mount at {mount.mountpoint} does not report its cache directory {hint}"
        )
    # A mount that caches in memory has no cache directory: processes cannot share its cache.
    return {name: str(stats[name]) for name in names if stats[name] is not None}


@contextmanager
def open_account(settings: Settings) -> "Iterator[App]":
    """Open an account in this process; log only to the configured file.

    Raises:
        StartupError: The cache directory or the log file cannot be used.
    """
    from tinkerfs.app import open_app  # lazy: imports HTTP and SQLite
    from tinkerfs.operating_system import tune_malloc

    tune_malloc()
    logs.set_up(
        settings.log_level, settings.log_file, to_stderr=False, log_format=settings.log_format
    )
    # The limit stops traversals that request archives by accident. Here the user named each one.
    with open_app(replace(settings, archive_build_limit=0), is_one_transfer=True) as app:
        yield app
