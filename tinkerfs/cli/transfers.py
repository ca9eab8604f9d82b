"""What `get`, `prefetch` and others share: flags, reports of failures, signals."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tinkerfs.cli.options import settings_options
from tinkerfs.printable import escape_control_chars
from tinkerfs.transfer.failure import Failure

if TYPE_CHECKING:
    from tinkerfs.app import App
    from tinkerfs.transfer.exports import TemporaryExports


def transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of the settings that a transfer uses to a command."""
    return settings_options(
        "base_url",
        "api_key_file",
        "cache_dir",
        "base_models",
        "moe_layout",
        "cache_size_bytes",
        "blob_proxy",
        "shared_cache",
        "timeout_s",
        "archive_timeout_s",
        "log_file",
        "log_level",
    )(command)


def export_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that export checkpoints without an archive to a command."""
    options = [
        click.option(
            "--export", is_flag=True, help="Export training checkpoints that have no archive."
        ),
        click.option(
            "--keep-export", is_flag=True, help="Keep the exports until they expire, after 1 h."
        ),
        click.option(
            "--age-recipient",
            metavar="KEY",
            multiple=True,
            help="Let the server encrypt the files of an export for this age recipient.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def temporary_exports(
    app: "App", export: bool, keep_export: bool, age_recipient: tuple[str, ...]
) -> "Iterator[TemporaryExports | None]":
    """Return the exports of a transfer by its flags; None without --export."""
    if not export:
        if keep_export or age_recipient:
            raise click.UsageError("--keep-export and --age-recipient need --export")
        yield None
        return
    from tinkerfs.transfer.exports import TemporaryExports  # lazy: imports HTTP and SQLite

    def announce(text: str) -> None:
        click.echo(escape_control_chars(f"tinkerfs: {text}"), err=True)

    with TemporaryExports(
        app.exports,
        app.mutations.check_current,
        announce,
        recipients=age_recipient,
        keeps=keep_export,
    ) as exports:
        yield exports


def print_report(report: dict[str, Any], failures: list[Failure]) -> None:
    """Print the report of a transfer as JSON, with its failures."""
    rows = [{"path": each.name, "error": each.message} for each in failures]
    click.echo(json.dumps({**report, "errors": rows}, indent=2))


def exit_with_failures(failures: list[Failure]) -> NoReturn:
    """Print each failure on one line of standard error, and exit with status 1."""
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
