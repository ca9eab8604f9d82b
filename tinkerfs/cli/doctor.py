"""The command `tinkerfs doctor`."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from tinkerfs.cli.options import settings_options
from tinkerfs.config import Settings
from tinkerfs.errors import (
    NotFound,
    TinkerfsError,
    Unauthorized,
    UnsupportedEndpoint,
    UntrustedCertificate,
)
from tinkerfs.printable import escape_control_chars


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one check; `found` includes a hint if the check failed."""

    check: str
    is_ok: bool
    found: str


@click.command(short_help="Check the requirements of a mount.")
@settings_options("base_url", "api_key_file", "cache_dir", "timeout_s", "config")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: a list with an object per check."
)
def doctor(as_json: bool, **settings: Any) -> None:
    """Check the requirements of a mount, and print a hint for each that is not met.

    Checks /dev/fuse, libfuse, fusermount, the key and its source, the API, and the cache directory.
    Sends one API request, or two to a server without a key check. Exits 1 if a check fails, and 2
    if an option is invalid, such as one in a configuration file.
    """
    results = []
    for result in _run_checks(Settings(**settings)):
        results.append(result)
        if not as_json:
            mark = (
                click.style("ok  ", fg="green") if result.is_ok else click.style("FAIL", fg="red")
            )
            click.echo(f"{mark}  {result.check:<11} {escape_control_chars(result.found)}")
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    if not all(result.is_ok for result in results):
        raise SystemExit(1)


def _run_checks(settings: Settings) -> Iterator[CheckResult]:
    yield _run_check("/dev/fuse", _device)
    yield _run_check("libfuse", _libfuse)
    yield _run_check("fusermount", _fusermount)
    yield _run_check("cache", lambda: _cache(settings))
    key = _run_check("key", lambda: _key(settings))
    yield key
    if key.is_ok:
        yield _run_check("API", lambda: _api(settings))


def _run_check(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except TinkerfsError as error:
        return CheckResult(name, False, str(error))


# The imports below are lazy for the help: they load the FUSE adapter, HTTP and SQLite.


def _device() -> str:
    from tinkerfs.fuse import preflight

    preflight.check_device()
    return "can be opened"


def _libfuse() -> str:
    from tinkerfs.fuse import binding, passthrough

    loaded = binding.load_binding()
    reason = passthrough.missing_requirement(loaded.library.version)
    return f"{loaded}; {f'no passthrough: {reason}' if reason else 'with passthrough'}"


def _fusermount() -> str:
    from tinkerfs.fuse import binding, mount_table, preflight

    preflight.check_fusermount(3 if binding.find_library(3) else 2)
    if os.geteuid() == 0:
        return "not needed for root"
    return str(mount_table.fusermount())


def _cache(settings: Settings) -> str:
    from tinkerfs.app import prepare_cache_paths
    from tinkerfs.cache.directory import can_lock_files

    paths = prepare_cache_paths(settings)
    shared = f", shared with other hosts; metadata in {paths.metadata}" if paths.is_shared else ""
    has_locks = can_lock_files(paths.root)
    caveat = "" if has_locks else "; no file locks: blocks may be downloaded twice"
    return f"{paths.root} is writable{shared}{caveat}"


def _key(settings: Settings) -> str:
    from tinkerfs.api.credentials import Credentials

    credentials = Credentials(key_file=settings.api_key_file)
    credentials.get()
    return f"found: {credentials.source}"


def _api(settings: Settings) -> str:
    from tinkerfs.api.client import Client
    from tinkerfs.api.credentials import Credentials
    from tinkerfs.telemetry import Telemetry

    started = time.monotonic()
    with Client(
        settings.base_url,
        Credentials(key_file=settings.api_key_file),
        Telemetry(),
        timeout_s=min(settings.timeout_s, 10.0),
    ) as client:
        try:
            try:
                client.whoami()
            except (UnsupportedEndpoint, NotFound):  # compatible servers may lack it
                client.list_training_runs(limit=1)
        except Unauthorized as error:
            raise TinkerfsError(
                f"{settings.base_url} rejects the key: {error.message} (hint: set TINKER_API_KEY"
                " to a valid key, or run `tinker auth login`)"
            ) from None
        except UntrustedCertificate as error:  # has its own hint: the network works
            raise TinkerfsError(f"{settings.base_url}: {error.message}") from None
        except TinkerfsError as error:
            raise TinkerfsError(
                f"{settings.base_url}: {error} (hint: check --base-url and the network)"
            ) from None
    return f"{settings.base_url} accepts the key ({time.monotonic() - started:.2f} s)"
