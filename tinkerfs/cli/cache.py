"""`tinkerfs cache`: what is kept of weights on disk, whether it is sound, and away with it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.formatting import format_duration, format_size
from tinkerfs.cli.options import resolve, settings_options
from tinkerfs.cli.transfers import complete_path
from tinkerfs.errors import StartupError
from tinkerfs.printable import printable

if TYPE_CHECKING:
    from tinkerfs.cache.maintenance import CachedFile
    from tinkerfs.cli.transfers import Location
    from tinkerfs.config import Settings

_PATH_HELP = (
    "PATH is a tinker path, tinker://<run>/<kind>/<name> or tinker://<run>, or a path below a"
    " mount, whose cache is used then; without it all is meant. A file of a checkpoint means all"
    " of it, the mountpoint all of that cache."
)

#: As Linux (path_resolution(7)).
_MAX_LINKS = 40

#: What stands behind a tinker path where the cache says what it keeps.
_PARTS = (" archive", " unpacked")


@dataclass(frozen=True, slots=True)
class _Selection:
    """Part of a cache: where it is, and what of it is meant.

    Attributes:
        settings: with the bound of the cache.
        folder: of all that is kept.
        blocks: of the weights.
        is_meant: tells it of what the cache says it keeps.
    """

    settings: "Settings"
    folder: Path
    blocks: Path
    is_meant: Callable[[str], bool]


def _options(command: Callable[..., None]) -> Callable[..., None]:
    command = settings_options("cache_dir", "cache_size_bytes")(command)
    return click.argument("path", required=False, shell_complete=complete_path)(command)


@click.group(short_help="Look at the weights kept on disk, check or clear them.")
def cache() -> None:
    """Look at the weights that are kept on disk, check or clear them.

    Mounts may go on using them meanwhile: what is removed is fetched again. Weights infos and what
    is in which archive, a few KiB a checkpoint, are kept apart and stay.
    """


@cache.command(epilog=_PATH_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes in bytes.")
@_options
def info(path: str | None, as_json: bool, **flags: str | None) -> None:
    """Show what is kept of each checkpoint, the latest used first.

    KEPT counts bytes of weights, OF is the length of the archive or files they belong to, where it
    is known; the sum of all is what they take on disk. Exits 0, also where nothing is kept.
    """
    from tinkerfs.cache.maintenance import cached_files

    with _selected(path, flags) as selection:
        kept = [
            each for each in cached_files(selection.blocks) if selection.is_meant(each.description)
        ]
        rows = _rows(kept)
        other_bytes = _metadata_bytes(selection.folder)
    report: dict[str, Any] = {
        "cache_dir": str(selection.folder),
        "limit_bytes": selection.settings.cache_size_bytes,
        "kept_bytes": sum(row["kept_bytes"] for row in rows),
        "metadata_bytes": other_bytes,
        "checkpoints": rows,
    }
    click.echo(json.dumps(report, indent=2) if as_json else _text(report))


@cache.command(epilog=_PATH_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_options
def verify(path: str | None, as_json: bool, **flags: str | None) -> None:
    """Check every block against its checksum, and remove those that are bad.

    Reads check what they read in any case, and fetch a bad block again: this finds out before.
    Exits 0 where all are sound, 1 where any was bad (each is told) or the cache cannot be read.
    """
    from tinkerfs.cache import maintenance

    with _selected(path, flags) as selection:
        sound, bad = maintenance.verify(selection.blocks, selection.is_meant)
    if as_json:
        rows = [
            {"checkpoint": _checkpoint_of(each.description), "file": _file_of(each.description)}
            | {"block": each.index}
            for each in bad
        ]
        told = {"sound_blocks": sound, "bad_blocks": len(bad), "bad": rows}
        click.echo(json.dumps(told, indent=2))
    else:
        for each in bad:
            click.echo(f"bad: {printable(each.description)}, block {each.index}")
        removed = f", {len(bad)} bad and removed: they are fetched again when they are read"
        click.echo(f"{_counted(sound)} sound{removed if bad else ''}")
    if bad:
        raise SystemExit(1)


@cache.command(epilog=_PATH_HELP)
@_options
def clear(path: str | None, **flags: str | None) -> None:
    """Remove what is kept, also of files that are open: their next reads fetch it again.

    Exits 0, also where nothing was kept.
    """
    from tinkerfs.cache import maintenance

    with _selected(path, flags) as selection:
        freed_bytes = maintenance.clear(selection.blocks, selection.is_meant)
    click.echo(f"{format_size(freed_bytes)} freed in {printable(str(selection.blocks))}")


@contextmanager
def _selected(path: str | None, flags: dict[str, str | None]) -> Iterator[_Selection]:
    """Find out which part of which cache is meant; tell what goes wrong with it in one line.

    Raises:
        SetupError: PATH leads nowhere, or the cache cannot be read or changed.
    """
    from tinkerfs.app import BLOCKS, cache_directory

    settings, is_meant = _resolve_selection(path, flags)
    folder = cache_directory(settings)
    try:
        yield _Selection(settings, folder, folder / BLOCKS, is_meant)
    except OSError as error:
        where = error.filename or folder
        raise StartupError(f"the cache {where}: {error.strerror or error}") from None


def _resolve_selection(
    path: str | None, flags: dict[str, str | None]
) -> "tuple[Settings, Callable[[str], bool]]":
    """Return the settings of a cache, and what tells whether something in it belongs to PATH.

    Of a tinker path nobody is asked. Below a mount that mount says what a name stands for, so that
    no key is needed; of a folder of links, say `/published`, the account is asked what they are.

    Raises:
        SetupError: PATH leads nowhere.
    """
    from tinkerfs.cli import transfers

    if path is None:
        return resolve(flags), lambda _about: True
    place = transfers.parse_location(path, flags)
    meant = path if not place.mountpoint else _resolve_below(place)
    if meant == "":
        return place.settings, lambda _about: True
    if meant is not None:
        return place.settings, lambda about: f"{_checkpoint_of(about)}/".startswith(f"{meant}/")
    failures: list[transfers.Failure] = []
    with transfers.open_account(place.settings) as parts:
        holdings, _ = transfers.resolve_weights(parts, [place], failures)
    if failures:
        transfers.exit_with_failures(failures)
    wanted = {holding.subject.about for holding in holdings}
    return place.settings, lambda about: _checkpoint_of(about) in wanted


def _resolve_below(place: "Location") -> str | None:
    """Return how the tinker paths of what a path below a mount stands for begin.

    Empty for all of it; None for a folder that only links to some. Goes no deeper than a
    checkpoint: a name within `files/` would have the mount ask for the archive.

    Raises:
        SetupError: there is no such name.
    """
    from tinkerfs import name_encoding
    from tinkerfs.fuse import mount_table
    from tinkerfs.tinker_path import KINDS

    done: list[str] = []
    rest, links = place.path.split("/"), 0
    while True:
        if done[:2] == ["adapters", ".content"]:
            del done[0]
        if done[:1] == [".content"] and len(done) == 4:
            done = ["runs", done[1], "checkpoints", *done[2:]]
        shown = "/".join((place.mountpoint.rstrip("/"), *done))
        if done[:1] == ["runs"] and len(done) in (4, 5):
            told = mount_table.read_file(f"{shown}/tinker_path")
            if told:
                return os.fsdecode(told).removesuffix("\n")
        if done and links < _MAX_LINKS and os.path.islink(shown):
            links += 1
            rest = os.readlink(shown).split("/") + rest
            done.pop()
        elif not rest:
            break
        elif (part := rest.pop(0)) == "..":
            del done[-1:]
        elif part not in ("", "."):
            done.append(part)
    if not done:
        return ""
    if not os.path.lexists(shown):
        raise StartupError(f"{place.shown}: there is no such file")
    run_id = name_encoding.decode(done[1]) if done[0] == "runs" and len(done) > 1 else ""
    if not run_id or "%~" in done[1]:  # a name that was cut does not say what it was
        return None
    if done[2:] in ([], ["checkpoints"]):
        return f"tinker://{run_id}"
    is_kind = done[2] == "checkpoints" and len(done) == 4 and done[3] in KINDS
    return f"tinker://{run_id}/{done[3]}" if is_kind else None


def _checkpoint_of(about: str) -> str:
    """Return the tinker path in what the cache says it keeps: that and an archive, or a file."""
    for part in _PARTS:
        if about.endswith(part):
            return about.removesuffix(part)
    return about.partition(" /")[0]


def _file_of(about: str) -> str:
    """Return which of a checkpoint's files the cache says it keeps."""
    return about.removeprefix(_checkpoint_of(about)).removeprefix(" ").removeprefix("/")


def _counted(blocks: int) -> str:
    return "1 block is" if blocks == 1 else f"{blocks} blocks are"


def _rows(files: "list[CachedFile]") -> list[dict[str, Any]]:
    """Add up what is kept by checkpoint."""
    by_checkpoint: dict[str, list[CachedFile]] = {}
    for file in files:
        by_checkpoint.setdefault(_checkpoint_of(file.description), []).append(file)
    now = time.time()
    return [
        {
            "checkpoint": checkpoint,
            "kept_bytes": sum(file.size_bytes for file in kept),
            "data_bytes": sum(file.data_bytes for file in kept),
            "length_bytes": _sum_known([file.length_bytes for file in kept]),
            "used_s_ago": round(max(now - max(file.last_access_ns for file in kept) / 1e9, 0)),
            "fetched_s_ago": round(max(now - min(file.fetched_ns for file in kept) / 1e9, 0)),
            "is_open": any(file.is_open for file in kept),
        }
        for checkpoint, kept in by_checkpoint.items()
    ]


def _sum_known(sizes: "list[int | None]") -> int | None:
    """Return a sum, None where a part of it is not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _metadata_bytes(folder: Path) -> int:
    """Return what is kept beside the blocks."""
    try:
        return sum(each.stat().st_size for each in folder.iterdir() if each.is_file())
    except FileNotFoundError:
        return 0


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{printable(report['cache_dir'])}",
        f"  weights   {format_size(report['kept_bytes'])} of at most"
        f" {format_size(report['limit_bytes'])}",
        f"  metadata  {format_size(report['metadata_bytes'])}",
    ]
    if report["checkpoints"]:
        lines.append(f"{'KEPT':>10}  {'OF':>10}  {'USED':>9}  {'FETCHED':>9}  CHECKPOINT")
    for row in report["checkpoints"]:
        used, fetched = format_duration(row["used_s_ago"]), format_duration(row["fetched_s_ago"])
        is_open = "  (open)" if row["is_open"] else ""
        kept, length = format_size(row["data_bytes"]), row["length_bytes"]
        whole = "?" if length is None else format_size(length)
        name = f"{printable(row['checkpoint'])}{is_open}"
        lines.append(f"{kept:>10}  {whole:>10}  {used:>9}  {fetched:>9}  {name}")
    return "\n".join(lines)
