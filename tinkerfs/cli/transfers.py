"""What `prefetch` and `get` share: which weights are meant, where they are, how it ends."""

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

#: Archives that are asked for at a time.
_ARCHIVES_AT_ONCE = 8


def complete_path(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete a path.

    `click.Path` does as well, and stats what it is given: below a mount, that may ask for an
    archive.
    """
    return [CompletionItem(incomplete, type="file")]


def transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of the settings that a transfer heeds."""
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
    """Where in an account a PATH leads.

    Attributes:
        shown: as it was given.
        path: from the root of the tree.
        settings: of the account, and of the mount that shows it.
        mountpoint: of that mount, empty for a tinker path.
    """

    shown: str
    path: str
    settings: "Settings"
    mountpoint: str = ""


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """One checkpoint whose files are known and open.

    Attributes:
        holding: which one.
        files: name and file; the archive's name is empty.
    """

    holding: "WeightsRef"
    files: "tuple[tuple[str, WeightsFile], ...]"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something is not there.

    Attributes:
        name: what.
        error: what happened.
        advice: what to do then.
    """

    name: str
    error: Exception
    advice: str = ""

    @property
    def words(self) -> str:
        """Why, for people, in one line without secrets.

        Raises:
            Exception: what is no failure of the account, the network or the disk.
        """
        from tinkerfs import errors

        if isinstance(self.error, OSError):
            words = self.error.strerror or str(self.error)
        elif isinstance(self.error, TinkerfsError):
            words = str(self.error)
        else:
            raise self.error
        return errors.redact(words) + (f"; {self.advice}" if self.advice else "")


def parse_location(given: str, flags: Mapping[str, str | bool | None]) -> Location:
    """Return where a PATH leads: a tinker path, or a file below a mount.

    Asks no mount but for its settings, and that with a bound on the wait.

    Raises:
        SetupError: it is neither, or its mount does not answer.
    """
    from tinkerfs.tinker_path import TinkerPath
    from tinkerfs.vfs import entities

    if given.startswith(_SCHEME):
        run_id = given.removeprefix(_SCHEME)
        try:
            is_run = run_id and "/" not in run_id
            path = (
                entities.run_path(run_id)
                if is_run
                else entities.path_for_tinker_path(TinkerPath.parse(given))
            )
        except ValueError as error:
            raise StartupError(str(error)) from None
        return Location(given, path, resolve(flags))
    mount, path = _below_mount(given)
    settings = resolve({**settings_of(mount), **_said(flags)})
    return Location(given, path, settings, mount.mountpoint)


def _said(flags: Mapping[str, str | bool | None]) -> dict[str, str | bool | None]:
    return {field: value for field, value in flags.items() if value is not None}


def _below_mount(given: str) -> tuple["Mount", str]:
    """Return the mount that a path comes to, and the rest of it, left to us to follow.

    Nothing below the mount is looked at through the kernel: it may hang, and a name within `files/`
    would have it ask for the archive.
    """
    from tinkerfs.fuse import mount_table

    mounted = {mount.mountpoint: mount for mount in mount_table.list_mounts()}
    done, links = "/", 0
    rest = [part for part in os.path.join(os.getcwd(), given).split("/") if part]
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
            if links > 40:  # as Linux (path_resolution(7))
                break
            target = os.readlink(done)
            rest = [each for each in target.split("/") if each] + rest
            done = "/" if target.startswith("/") else os.path.dirname(done)
    raise StartupError(
        f"{given} is neither below a mount of tinkerfs nor a tinker path, {_SCHEME}<run>/..."
    )


def settings_of(mount: "Mount") -> dict[str, str | bool | None]:
    """Return what a mount says of its account and its cache.

    Raises:
        SetupError: it does not respond, or is of another version.
    """
    from tinkerfs.fuse import mount_table

    cure = f"tinkerfs status {mount.mountpoint}"
    try:
        told = json.loads(
            mount_table.read_file(f"{mount.mountpoint}/.tinkerfs/stats.json") or b"null"
        )
    except TimeoutError:
        raise StartupError(f"the mount at {mount.mountpoint} does not answer: {cure}") from None
    except ValueError:
        told = None
    names = {"base_url": "base_url", "cache_dir": "cache_dir", "cache_size_bytes": "cache_size"}
    if not isinstance(told, dict) or not names.keys() <= told.keys():
        raise StartupError(
            f"the mount at {mount.mountpoint} does not tell where its cache is: {cure}"
        )
    # None where the mount caches in memory alone, which another process has no part in.
    return {field: str(told[field]) for field in names if told[field] is not None}


@contextmanager
def open_account(settings: "Settings") -> Iterator["App"]:
    """Open an account in this process; its log goes to the file that is set, or nowhere.

    Raises:
        SetupError: the cache folder or the log cannot be used.
    """
    from tinkerfs.app import open_app
    from tinkerfs.cli import logs
    from tinkerfs.fuse.malloc import tune_malloc

    tune_malloc()
    logs.set_up(settings.log_level, settings.log_file, to_stderr=False)
    # The bound is on walks that ask for archives by accident: here each was asked for by name.
    with open_app(replace(settings, archive_build_limit=0), is_one_transfer=True) as parts:
        yield parts


def resolve_weights(
    parts: "App", places: list[Location], failures: list[Failure]
) -> "tuple[list[WeightsRef], bool]":
    """Return the weights that some places name, each once; and whether the last names just one.

    Args:
        parts: of the account of all of them.
        places: where to look.
        failures: gets those where nothing is.
    """
    from tinkerfs.context import BACKGROUND_CONTEXT
    from tinkerfs.vfs.weights_lookup import iter_weights, resolve_weights

    found: dict[object, WeightsRef] = {}
    one = None
    for place in places:
        try:
            one = resolve_weights(parts.filesystem, place.path, BACKGROUND_CONTEXT)
            below = [one] if one else iter_weights(parts.filesystem, place.path, BACKGROUND_CONTEXT)
        except OSError as error:
            failures.append(Failure(place.shown, error))
            continue
        if not below:
            failures.append(Failure(place.shown, StartupError("there are no checkpoints in it")))
        for each in below:
            key = (each.checkpoint.key, each.is_archive, each.member_path)
            found.setdefault(key, each)
    return list(found.values()), one is not None


def name_of(holding: "WeightsRef") -> str:
    """Return what a checkpoint is called in messages."""
    return holding.checkpoint.tinker_path


def selected(holding: "WeightsRef", listing: "MemberListing") -> list[str]:
    """Return the names of the members that are meant.

    Raises:
        OSError: ENOENT where there is none such.
    """
    from tinkerfs import errors, name_encoding

    def is_meant(name: str) -> bool:
        shown = "/".join(map(name_encoding.encode, name.split("/")))
        return not holding.member_path or f"{shown}/".startswith(f"{holding.member_path}/")

    found = [name for name in listing.members if is_meant(name)]
    if not found and holding.member_path:
        raise errors.not_found(holding.member_path)
    return found


def open_checkpoints(
    parts: "App",
    holdings: "list[WeightsRef]",
    stack: ExitStack,
    failures: list[Failure],
    *,
    with_urls: bool,
) -> list[OpenCheckpoint]:
    """Open all files of some checkpoints, side by side; archives are waited for.

    Args:
        parts: of the account.
        holdings: which ones.
        stack: closes the files.
        failures: gets what cannot be opened.
        with_urls: wait for the archives of what is not kept, also where its files are known.
    """
    from tinkerfs.concurrency import run_concurrently
    from tinkerfs.context import BACKGROUND_CONTEXT

    weights = parts.weights

    def open_one(holding: "WeightsRef") -> OpenCheckpoint:
        files: list[tuple[str, WeightsFile]] = []
        subject = holding.subject
        if holding.is_archive:
            files.append(
                ("", stack.enter_context(weights.open_archive(subject, BACKGROUND_CONTEXT)))
            )
        else:
            for name in selected(holding, weights.files(subject, BACKGROUND_CONTEXT)):
                file = stack.enter_context(weights.open(subject, name, BACKGROUND_CONTEXT))
                files.append((name, file))
        missing = None
        if with_urls:
            missing = next((f for _, f in files if f.kept_bytes() < f.size_bytes), None)
        if missing is not None:
            missing.prepare(BACKGROUND_CONTEXT)
        return OpenCheckpoint(holding, tuple(files))

    works = [lambda holding=holding: open_one(holding) for holding in holdings]
    planned = []
    flights: list[Future[OpenCheckpoint]] = run_concurrently(works, _ARCHIVES_AT_ONCE, "open")
    for holding, flight in zip(holdings, flights, strict=True):
        error = flight.exception()
        if error is None:
            planned.append(flight.result())
        else:
            assert isinstance(error, Exception)
            failures.append(Failure(name_of(holding), error))
    return planned


def failures_to_json(failures: list[Failure]) -> list[dict[str, str]]:
    """Return failures as JSON values."""
    return [{"path": each.name, "error": each.words} for each in failures]


def exit_with_failures(failures: list[Failure]) -> NoReturn:
    """Tell each failure in one line on standard error, and exit 1."""
    from tinkerfs.printable import printable

    for failure in failures:
        click.echo(printable(f"tinkerfs: {failure.name}: {failure.words}"), err=True)
    raise SystemExit(1)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a transfer as Ctrl-C does."""


@contextmanager
def exit_on_signal(how_to_go_on: str) -> Iterator[None]:
    """End at once on Ctrl-C and SIGTERM, with one line; exit 130, or 143 for SIGTERM.

    Args:
        how_to_go_on: what the line says.
    """

    def terminate(number: int, frame: object) -> None:
        del number, frame
        raise _Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_IGN:  # what was ignored when we started stays ignored
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        click.echo(f"tinkerfs: interrupted: {how_to_go_on}", err=True)
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)
