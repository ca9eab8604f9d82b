"""What `get`, `prefetch` and others share: flags, reports of failures, signals."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from tinkerfs.cli.options import settings_options
from tinkerfs.printable import escape_control_chars
from tinkerfs.transfer.failure import Failure


def transfer_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of the settings that a transfer uses to a command."""
    return settings_options(
        "base_url",
        "cache_dir",
        "base_models",
        "cache_size_bytes",
        "timeout_s",
        "archive_timeout_s",
        "log_file",
        "log_level",
    )(command)


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
