"""Shared code of `get`, `prefetch` and others: paths, errors, signals."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from tinkerfs.cli.options import resolve, settings_options
from tinkerfs.errors import StartupError, TinkerfsError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from tinkerfs.app import App
    from tinkerfs.config import Settings
    from tinkerfs.fuse.mount_table import Mount
    from tinkerfs.vfs.weights_nodes import WeightsRef
    from tinkerfs.weights.file import WeightsFile
    from tinkerfs.weights.reader import MemberListing

T = TypeVar("T")

_SCHEME = "tinker://"

#: Maximum number of concurrent requests for archives.
_MAX_ARCHIVE_REQUESTS = 8


def complete_path(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete a path.

    `click.Path` would too, but it calls stat() on its argument. Below a mount, that may request an
    archive.
    """
    return [CompletionItem(incomplete, type="file")]


def transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of the settings that a transfer uses to a command."""
    return settings_options(
        "base_url",
        "cache_dir",
        "cache_size_bytes",
        "timeout_s",
        "archive_timeout_s",
        "log_file",
        "log_level",
    )(command)


@dataclass(frozen=True, slots=True)
class Location:
    """An account and a path in its tree.

    Attributes:
        argument: The path as the user gave it.
        path: Path from the root of the tree.
        settings: Settings of the account, merged with those of the mount.
        mountpoint: Mountpoint that the path is below; empty for a tinker path.
    """

    argument: str
    path: str
    settings: "Settings"
    mountpoint: str = ""


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """The open files of one checkpoint.

    Attributes:
        files: Pairs of name and file; the name of an archive is empty.
    """

    ref: "WeightsRef"
    files: "tuple[tuple[str, WeightsFile], ...]"


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure to transfer one file or path.

    Attributes:
        name: File or path to display.
        hint: How to continue; may be empty.
    """

    name: str
    error: Exception
    hint: str = ""

    @property
    def message(self) -> str:
        """The error message, on one line and without secrets.

        Raises:
            Exception: The error itself, if it is a bug and not a TinkerfsError or OSError.
        """
        from tinkerfs import errors

        if isinstance(self.error, OSError):
            message = self.error.strerror or str(self.error)
        elif isinstance(self.error, TinkerfsError):
            message = str(self.error)
        else:
            raise self.error
        return errors.redact(message) + (f" (hint: {self.hint})" if self.hint else "")


def parse_location(argument: str, flags: Mapping[str, str | bool | None]) -> Location:
    """Parse a PATH argument: a tinker path or a path below a mount.

    Only reads the settings of the mount, with a time limit.

    Raises:
        StartupError: The path is neither, or its mount does not respond.
    """
    from tinkerfs.tinker_path import TinkerPath
    from tinkerfs.vfs import entities

    if argument.startswith(_SCHEME):
        run_id = argument.removeprefix(_SCHEME)
        try:
            is_run = run_id and "/" not in run_id
            path = (
                entities.run_path(run_id)
                if is_run
                else entities.path_for_tinker_path(TinkerPath.parse(argument))
            )
        except ValueError as error:
            raise StartupError(str(error)) from None
        return Location(argument, path, resolve(flags))
    mount, path = _split_at_mount(argument)
    given_flags = {field: value for field, value in flags.items() if value is not None}
    settings = resolve({**read_mount_settings(mount), **given_flags})
    return Location(argument, path, settings, mount.mountpoint)


def _split_at_mount(argument: str) -> tuple["Mount", str]:
    """Return the mount that contains a path, and the path within the mount.

    No file below the mountpoint is accessed through the kernel. The mount may hang, and a lookup
    within `files/` would request the archive. Symlinks below the mountpoint stay unresolved.
    """
    from tinkerfs.fuse import mount_table

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


def read_mount_settings(mount: "Mount") -> dict[str, str | bool | None]:
    """Read the settings of the account and the cache of a mount.

    Raises:
        StartupError: The mount does not respond, or runs another version of tinkerfs.
    """
    from tinkerfs.fuse import mount_table

    hint = f"(hint: tinkerfs status {mount.mountpoint})"
    try:
        stats = json.loads(
            mount_table.read_file(f"{mount.mountpoint}/.tinkerfs/stats.json") or b"null"
        )
    except TimeoutError:
        raise StartupError(f"the mount at {mount.mountpoint} does not respond {hint}") from None
    except ValueError:
        stats = None
    names = {"base_url": "base_url", "cache_dir": "cache_dir", "cache_size_bytes": "cache_size"}
    if not isinstance(stats, dict) or not names.keys() <= stats.keys():
        raise StartupError(
            f"the mount at {mount.mountpoint} does not report its cache directory {hint}"
        )
    # A mount that caches in memory has no cache directory: processes cannot share its cache.
    return {field: str(stats[field]) for field in names if stats[field] is not None}


@contextmanager
def open_account(settings: "Settings") -> Iterator["App"]:
    """Open an account in this process; log only to the configured file.

    Raises:
        StartupError: The cache directory or the log file cannot be used.
    """
    from tinkerfs.app import open_app
    from tinkerfs.cli import logs
    from tinkerfs.fuse.malloc import tune_malloc

    tune_malloc()
    logs.set_up(settings.log_level, settings.log_file, to_stderr=False)
    # The limit stops traversals that request archives by accident. Here the user named each one.
    with open_app(replace(settings, archive_build_limit=0), is_one_transfer=True) as app:
        yield app


def resolve_weights(
    app: "App", locations: list[Location], failures: list[Failure]
) -> "tuple[list[WeightsRef], bool]":
    """Return the weights at some locations, without duplicates.

    A location without weights is appended to `failures`. The second result is whether the last
    location is that of a single checkpoint, archive or file.
    """
    from tinkerfs.context import BACKGROUND_CONTEXT
    from tinkerfs.transfer.resolve import iter_weights, resolve_weights

    found: dict[object, WeightsRef] = {}
    one = None
    for location in locations:
        try:
            one = resolve_weights(app.filesystem, location.path, BACKGROUND_CONTEXT)
            below = (
                [one] if one else iter_weights(app.filesystem, location.path, BACKGROUND_CONTEXT)
            )
        except OSError as error:
            failures.append(Failure(location.argument, error))
            continue
        if not below:
            failures.append(Failure(location.argument, StartupError("contains no checkpoints")))
        for each in below:
            key = (each.checkpoint.key, each.is_archive, each.member_path)
            found.setdefault(key, each)
    return list(found.values()), one is not None


def display_name(ref: "WeightsRef") -> str:
    """Return the name of a checkpoint for messages, its tinker path."""
    return ref.checkpoint.tinker_path


def select_members(ref: "WeightsRef", listing: "MemberListing") -> list[str]:
    """Return the names of the archive members that a reference selects.

    Raises:
        OSError: ENOENT if it selects none.
    """
    from tinkerfs import errors, name_encoding

    def is_selected(name: str) -> bool:
        encoded = "/".join(map(name_encoding.encode, name.split("/")))
        return not ref.member_path or f"{encoded}/".startswith(f"{ref.member_path}/")

    found = [name for name in listing.members if is_selected(name)]
    if not found and ref.member_path:
        raise errors.not_found(ref.member_path)
    return found


def open_checkpoints(
    app: "App",
    refs: "list[WeightsRef]",
    stack: ExitStack,
    failures: list[Failure],
    *,
    with_urls: bool,
) -> list[OpenCheckpoint]:
    """Open the files of some checkpoints concurrently; wait for archive builds.

    The files are closed by `stack`. Checkpoints that cannot be opened are appended to `failures`.
    With `with_urls`, also request the archive if the file list is cached but a file is not.
    """
    from tinkerfs.concurrency import run_concurrently
    from tinkerfs.context import BACKGROUND_CONTEXT

    weights = app.weights

    def open_one(ref: "WeightsRef") -> OpenCheckpoint:
        files: list[tuple[str, WeightsFile]] = []
        subject = ref.version
        if ref.is_archive:
            files.append(
                ("", stack.enter_context(weights.open_archive(subject, BACKGROUND_CONTEXT)))
            )
        else:
            for name in select_members(ref, weights.files(subject, BACKGROUND_CONTEXT)):
                file = stack.enter_context(weights.open(subject, name, BACKGROUND_CONTEXT))
                files.append((name, file))
        missing = None
        if with_urls:
            missing = next((f for _, f in files if f.cached_bytes() < f.size_bytes), None)
        if missing is not None:
            missing.prepare(BACKGROUND_CONTEXT)
        return OpenCheckpoint(ref, tuple(files))

    tasks = [lambda ref=ref: open_one(ref) for ref in refs]
    checkpoints = []
    futures: list[Future[OpenCheckpoint]] = run_concurrently(tasks, _MAX_ARCHIVE_REQUESTS, "open")
    for ref, future in zip(refs, futures, strict=True):
        error = future.exception()
        if error is None:
            checkpoints.append(future.result())
        else:
            assert isinstance(error, Exception)
            failures.append(Failure(display_name(ref), error))
    return checkpoints


def failures_to_json(failures: list[Failure]) -> list[dict[str, str]]:
    """Convert failures to values for JSON output."""
    return [{"path": each.name, "error": each.message} for each in failures]


def exit_with_failures(failures: list[Failure]) -> NoReturn:
    """Print each failure on one line of standard error, and exit with status 1."""
    from tinkerfs.printable import escape_control_chars

    for failure in failures:
        click.echo(escape_control_chars(f"tinkerfs: {failure.name}: {failure.message}"), err=True)
    raise SystemExit(1)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which interrupts a transfer as Ctrl-C does."""


@contextmanager
def exit_on_signal(hint: str) -> Iterator[None]:
    """Exit at once on Ctrl-C and SIGTERM, with a message and status 130 or 143.

    Args:
        hint: How to continue, for the message.
    """

    def terminate(number: int, frame: object) -> None:
        del number, frame
        raise _Terminated

    previous = signal.getsignal(signal.SIGTERM)
    if previous != signal.SIG_IGN:  # a signal ignored by the caller stays ignored
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        click.echo(f"tinkerfs: interrupted (hint: {hint})", err=True)
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
