"""`tinkerfs doctor`."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from tinkerfs.cli.options import resolve, settings_options
from tinkerfs.errors import (
    NotFound,
    TinkerfsError,
    Unauthorized,
    UnsupportedEndpoint,
    UntrustedCertificate,
)
from tinkerfs.printable import printable

if TYPE_CHECKING:
    from tinkerfs.config import Settings


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check came to; `found` names the cure where it is not ok."""

    check: str
    is_ok: bool
    found: str


@click.command(short_help="Check everything that a mount needs.")
@settings_options("base_url", "cache_dir", "timeout_s")
@click.option("--config", metavar="FILE", help="A TOML file of options.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: a list, an object for each check."
)
def doctor(config: str | None, as_json: bool, **flags: str | bool | None) -> None:
    """Check what a mount needs, and name the cure of what is missing.

    /dev/fuse, libfuse, fusermount, the options' file, the key and where it comes from, whether the
    API is there and takes the key, and whether the cache can be written. Makes one call of the API.
    Exits 1 if anything is missing.
    """
    findings = []
    for finding in _run_checks(flags, config):
        findings.append(finding)
        if not as_json:
            mark = (
                click.style("ok  ", fg="green") if finding.is_ok else click.style("FAIL", fg="red")
            )
            click.echo(f"{mark}  {finding.check:<11} {printable(finding.found)}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    if not all(finding.is_ok for finding in findings):
        raise SystemExit(1)


def _run_checks(flags: dict[str, str | bool | None], config: str | None) -> Iterator[CheckResult]:
    yield _finding("/dev/fuse", _device)
    yield _finding("libfuse", _libfuse)
    yield _finding("fusermount", _fusermount)
    try:
        settings = resolve(flags, config=config)
    except TinkerfsError as error:
        yield CheckResult("options", False, str(error))
        return
    yield _finding("cache", lambda: _cache(settings))
    key = _finding("key", lambda: _key(settings))
    yield key
    if key.is_ok:
        yield _finding("API", lambda: _api(settings))


def _finding(check: str, look: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(check, True, look())
    except TinkerfsError as error:
        return CheckResult(check, False, str(error))


def _device() -> str:
    from tinkerfs.fuse import preflight

    preflight.check_device()
    return "opens"


def _libfuse() -> str:
    from tinkerfs.fuse import binding

    return str(binding.load_binding())


def _fusermount() -> str:
    import os

    from tinkerfs.fuse import binding, mount_table, preflight

    preflight.check_fusermount(3 if binding.find_library(3) else 2)
    if os.geteuid() == 0:
        return "not needed by root"
    return str(mount_table.fusermount())


def _cache(settings: "Settings") -> str:
    from tinkerfs.app import cache_directory
    from tinkerfs.cache.directory import can_lock_files, prepare_cache_dir

    folder = prepare_cache_dir(cache_directory(settings))
    bound = "" if can_lock_files(folder) else "; without locks, so mounts may fetch blocks twice"
    return f"{folder} can be written{bound}"


def _key(settings: "Settings") -> str:
    del settings
    from tinkerfs.api.credentials import Credentials

    credentials = Credentials()
    credentials.get()
    return f"found: {credentials.source}"


def _api(settings: "Settings") -> str:
    from tinkerfs.api.client import Client
    from tinkerfs.api.credentials import Credentials
    from tinkerfs.telemetry import Telemetry

    started = time.monotonic()
    with Client(
        settings.base_url, Credentials(), Telemetry(), timeout_s=min(settings.timeout_s, 10.0)
    ) as client:
        try:
            try:
                client.whoami()
            except (UnsupportedEndpoint, NotFound):  # other servers of the contract lack it
                client.list_training_runs(limit=1)
        except Unauthorized as error:
            raise TinkerfsError(
                f"{settings.base_url} does not take the key: {error.message}: set TINKER_API_KEY to"
                " one that is valid, or run `tinker auth login`"
            ) from None
        except UntrustedCertificate as error:  # with a hint of its own: the network is right
            raise TinkerfsError(f"{settings.base_url}: {error.message}") from None
        except TinkerfsError as error:
            raise TinkerfsError(
                f"{settings.base_url}: {error}: check --base-url and the network"
            ) from None
    return f"{settings.base_url} takes the key ({time.monotonic() - started:.2f} s)"
