"""The commands `tinkerfs cache`: show, verify and clear cached weights."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tinkerfs import name_encoding
from tinkerfs.cache import maintenance
from tinkerfs.cache.directory import CachePaths
from tinkerfs.cache.maintenance import CachedFile
from tinkerfs.cli.locations import Location, complete_path, open_account, parse_location
from tinkerfs.cli.options import settings_options
from tinkerfs.cli.transfers import exit_with_failures
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError
from tinkerfs.formatting import format_duration, format_size
from tinkerfs.fuse import mount_table
from tinkerfs.printable import escape_control_chars
from tinkerfs.tinker_path import KINDS
from tinkerfs.transfer.failure import Failure

_PATH_HELP = (
    "PATH is a tinker path, tinker://<run>/<kind>/<name> or tinker://<run>, or a path below a"
    " mount of yours or root's, which selects the cache of that mount. Without PATH, the whole"
    " cache is selected. A file of a checkpoint selects the checkpoint, a mountpoint the whole"
    " cache of the mount."
)

#: The limit of Linux, see path_resolution(7).
_MAX_LINKS = 40

#: Suffix of a list of members that hosts share; it is not counted as weights.
_INDEX_SUFFIX = " index"

#: Suffixes after the tinker path or the session in the description of a cached file.
_DESCRIPTION_SUFFIXES = (" archive", " unpacked", " trace", _INDEX_SUFFIX)


@dataclass(frozen=True, slots=True)
class _Selection:
    """A cache, and the files in it that PATH selects.

    Attributes:
        settings: The settings with the maximum size of the cache.
        paths: Where its parts are.
        matches: Returns whether a file with this description is selected.
    """

    settings: Settings
    paths: CachePaths
    matches: Callable[[str], bool]


def _options(command: Callable[..., None]) -> Callable[..., None]:
    command = settings_options("cache_dir", "cache_size_bytes")(command)
    return click.argument("path", required=False, shell_complete=complete_path)(command)


@click.group(short_help="Show, verify or clear the weights cached on disk.")
def cache() -> None:
    """Show, verify or clear the weights cached on disk.

    Mounts may use the cache at the same time; they download removed blocks again.
    """


@cache.command(epilog=_PATH_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes.")
@_options
def info(path: str | None, as_json: bool, **settings: Any) -> None:
    """Show the cached bytes of each checkpoint, most recently used first.

    CACHED is the number of cached bytes of weights. OF is the length of their archive or files, if
    it is known. The line `weights` has the disk usage. Exits 0, also if nothing is cached.
    """
    with _select(path, Settings(**settings)) as selection:
        cached = maintenance.cached_files(selection.paths.blocks)
        files = [each for each in cached if selection.matches(each.description)]
        rows = _rows(files)
        metadata_bytes = _metadata_bytes(selection.paths.metadata)
    report: dict[str, Any] = {
        "cache_dir": str(selection.paths.root),
        "metadata_dir": str(selection.paths.metadata),
        "is_shared": selection.paths.is_shared,
        "max_bytes": selection.settings.cache_size_bytes,
        "disk_bytes": sum(row["disk_bytes"] for row in rows),
        "metadata_bytes": metadata_bytes,
        "checkpoints": rows,
    }
    click.echo(json.dumps(report, indent=2) if as_json else _text(report))


@cache.command(epilog=_PATH_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_options
def verify(path: str | None, as_json: bool, **settings: Any) -> None:
    """Check all cached weights against their checksums, and remove corrupt parts.

    Mounts verify weights when they read them, and download corrupt parts again; this command finds
    them earlier. Exits 0 if all weights are intact. Exits 1 if a part was corrupt, which is
    printed, or if the cache cannot be read.
    """
    with _select(path, Settings(**settings)) as selection:
        intact_bytes, corrupt = maintenance.verify(selection.paths.blocks, selection.matches)
    if as_json:
        rows = [
            {"checkpoint": _checkpoint_of(each.description), "file": _file_of(each.description)}
            | {"start": each.start, "stop": each.stop}
            for each in corrupt
        ]
        report = {"intact_bytes": intact_bytes, "corrupt": rows}
        click.echo(json.dumps(report, indent=2))
    else:
        for each in corrupt:
            name = escape_control_chars(each.description)
            click.echo(f"corrupt: {name}, bytes {each.start} to {each.stop}")
        corrupt_bytes = sum(each.stop - each.start for each in corrupt)
        removed = f"; {format_size(corrupt_bytes)} removed, to be downloaded again by the next read"
        click.echo(f"{format_size(intact_bytes)} intact{removed if corrupt else ''}")
    if corrupt:
        raise SystemExit(1)


@cache.command(epilog=_PATH_HELP)
@_options
def clear(path: str | None, **settings: Any) -> None:
    """Remove cached weights, also of open files; the next read downloads them.

    The lists of their files and tensors are removed too. Exits 0, also if nothing was cached.
    """
    with _select(path, Settings(**settings)) as selection:
        freed_bytes = maintenance.clear(selection.paths.blocks, selection.matches)
        _clear_indexes(selection)
    directory = escape_control_chars(str(selection.paths.blocks))
    click.echo(f"{format_size(freed_bytes)} freed in {directory}")


def _clear_indexes(selection: _Selection) -> None:
    from tinkerfs.cache.store import FILE_NAME, MetadataStore
    from tinkerfs.weights.checkpoint_version import NAMESPACE_PREFIX, tinker_path_of

    directory = selection.paths.metadata
    if not (directory / FILE_NAME).exists():
        return  # a store would create the file
    with MetadataStore(directory) as store:
        store.delete_matching(NAMESPACE_PREFIX, lambda key: selection.matches(tinker_path_of(key)))


@contextmanager
def _select(path: str | None, settings: Settings) -> Iterator[_Selection]:
    """Resolve PATH to a selection; report its I/O errors in one line.

    Raises:
        StartupError: PATH is invalid, or the cache cannot be read or changed.
    """
    from tinkerfs.app import cache_paths  # lazy: imports HTTP and SQLite

    settings, matches = _resolve_selection(path, settings)
    paths = cache_paths(settings)
    try:
        yield _Selection(settings, paths, matches)
    except OSError as error:
        where = error.filename or paths.root
        raise StartupError(f"the cache {where}: {error.strerror or error}") from None


def _resolve_selection(
    path: str | None, settings: Settings
) -> tuple[Settings, Callable[[str], bool]]:
    """Return the settings of a cache, and a predicate on file descriptions.

    A tinker path is resolved without a request. A path below a mount is resolved by the mount, so
    that no key is needed. Only a directory of symlinks, such as `/published`, is resolved by a
    request to the API.

    Raises:
        StartupError: PATH is invalid.
    """
    if path is None:
        return settings, lambda _description: True
    location = parse_location(path, settings)
    prefix = path if not location.mountpoint else _tinker_path_prefix(location)
    if prefix == "":
        return location.settings, lambda _description: True
    if prefix is not None:
        return location.settings, lambda description: f"{_checkpoint_of(description)}/".startswith(
            f"{prefix}/"
        )
    from tinkerfs.transfer.resolve import find_weights  # lazy: imports the vfs layer

    failures = list[Failure]()
    with open_account(location.settings) as app:
        refs, _ = find_weights(app.filesystem, {path: location.path}, failures)
    if failures:
        exit_with_failures(failures)
    selected = {ref.version.about for ref in refs}
    return location.settings, lambda description: _checkpoint_of(description) in selected


def _tinker_path_prefix(location: Location) -> str | None:
    """Return the common prefix of the tinker paths below a location of a mount.

    It is empty for the whole account, and None for a directory of symlinks to checkpoints. No name
    below a checkpoint is looked up: within `files/`, the mount would request the archive.

    Raises:
        StartupError: The path does not exist.
    """
    done: list[str] = []
    rest, links = location.path.split("/"), 0
    while True:
        if done[:2] == ["adapters", ".content"]:
            del done[0]
        if done[:1] == [".content"] and len(done) == 4:
            done = ["runs", done[1], "checkpoints", *done[2:]]
        path = "/".join((location.mountpoint.rstrip("/"), *done))
        if done[:1] == ["runs"] and len(done) in (4, 5):
            content = mount_table.read_file(f"{path}/tinker_path")
            if content:
                return os.fsdecode(content).removesuffix("\n")
        if done and links < _MAX_LINKS and os.path.islink(path):
            links += 1
            rest = os.readlink(path).split("/") + rest
            done.pop()
        elif not rest:
            break
        elif (part := rest.pop(0)) == "..":
            del done[-1:]
        elif part not in ("", "."):
            done.append(part)
    if not done:
        return ""
    if not os.path.lexists(path):
        raise StartupError(f"{location.argument}: no such file")
    run_id = name_encoding.decode(done[1]) if done[0] == "runs" and len(done) > 1 else ""
    if not run_id or "%~" in done[1]:  # a truncated name cannot be decoded
        return None
    if done[2:] in ([], ["checkpoints"]):
        return f"tinker://{run_id}"
    is_kind = done[2] == "checkpoints" and len(done) == 4 and done[3] in KINDS
    return f"tinker://{run_id}/{done[3]}" if is_kind else None


def _checkpoint_of(description: str) -> str:
    """Return the tinker path or the session in the description of a cached file."""
    for suffix in _DESCRIPTION_SUFFIXES:
        if description.endswith(suffix):
            return description.removesuffix(suffix)
    return description.partition(" /")[0]


def _file_of(description: str) -> str:
    """Return the part after the tinker path in the description of a cached file."""
    return description.removeprefix(_checkpoint_of(description)).removeprefix(" ").removeprefix("/")


def _rows(files: list[CachedFile]) -> list[dict[str, Any]]:
    """Add up the cached files of each checkpoint."""
    by_checkpoint: dict[str, list[CachedFile]] = {}
    for file in files:
        by_checkpoint.setdefault(_checkpoint_of(file.description), []).append(file)
    return [
        {
            "checkpoint": checkpoint,
            "disk_bytes": sum(file.size_bytes for file in cached),
            "cached_bytes": sum(file.data_bytes for file in _weights(cached)),
            "total_bytes": _sum_known([file.length_bytes for file in _weights(cached)]),
            "accessed_s_ago": _age_s(max(file.last_access_ns for file in cached)),
            "downloaded_s_ago": _age_s(min(file.fetched_ns for file in cached)),
            "is_open": any(file.is_open for file in cached),
        }
        for checkpoint, cached in by_checkpoint.items()
    ]


def _weights(files: list[CachedFile]) -> list[CachedFile]:
    return [file for file in files if not file.description.endswith(_INDEX_SUFFIX)]


def _age_s(time_ns: int) -> int:
    return max(round(time.time() - time_ns / 1e9), 0)


def _sum_known(sizes: list[int | None]) -> int | None:
    """Return the sum of sizes; None if one of them is unknown."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _metadata_bytes(directory: Path) -> int:
    """Return the disk usage of the metadata in a cache directory."""
    try:
        return sum(each.stat().st_size for each in directory.iterdir() if each.is_file())
    except FileNotFoundError:
        return 0


def _text(report: dict[str, Any]) -> str:
    shared = metadata_dir = ""
    if report["is_shared"]:
        shared = " (shared with other hosts)"
        metadata_dir = f" in {escape_control_chars(report['metadata_dir'])}"
    lines = [
        f"{escape_control_chars(report['cache_dir'])}{shared}",
        f"  weights   {format_size(report['disk_bytes'])} of at most"
        f" {format_size(report['max_bytes'])}",
        f"  metadata  {format_size(report['metadata_bytes'])}{metadata_dir}",
    ]
    if report["checkpoints"]:
        lines.append(f"{'CACHED':>10}  {'OF':>10}  {'USED':>9}  {'DOWNLOADED':>10}  CHECKPOINT")
    for row in report["checkpoints"]:
        used = format_duration(row["accessed_s_ago"])
        downloaded = format_duration(row["downloaded_s_ago"])
        is_open = "  (open)" if row["is_open"] else ""
        cached, total_bytes = format_size(row["cached_bytes"]), row["total_bytes"]
        length = "?" if total_bytes is None else format_size(total_bytes)
        name = f"{escape_control_chars(row['checkpoint'])}{is_open}"
        lines.append(f"{cached:>10}  {length:>10}  {used:>9}  {downloaded:>10}  {name}")
    return "\n".join(lines)
