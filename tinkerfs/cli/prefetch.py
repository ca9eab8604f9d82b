"""`tinkerfs prefetch`."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.transfers import transfer_options

if TYPE_CHECKING:
    from tinkerfs.adapters.compose import Parts
    from tinkerfs.cli.progress import Progress
    from tinkerfs.cli.transfers import Failure, Place
    from tinkerfs.settings import Settings
    from tinkerfs.tree.content import Holding

__all__ = ["prefetch"]

_HOW_TO_GO_ON = "what came is kept; the same command goes on from there"


@click.command(short_help="Pull weights into the cache, before they are read.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option(
    "--check", is_flag=True, help="Fetch nothing: exit 0 if all is there already, else 1."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what is there of each file.")
@transfer_options
def prefetch(paths: tuple[str, ...], check: bool, as_json: bool, **flags: str | None) -> None:
    """Pull the weights at each PATH into the cache on disk, where mounts read them.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them, its
    archive.tar, a folder of /adapters or /checkpoints; of a run or of /runs all checkpoints are
    fetched. Below a mount its own server and cache are used, and no FUSE is needed otherwise.

    What is there already is not fetched again, so that the same command goes on after an
    interruption. Exits 1 where something is not there in the end, or where the cache is too small.

    \b
        tinkerfs prefetch ~/tinker/runs/79db3d29:train:0/latest_sampler
        tinkerfs prefetch --cache-size 200G tinker://79db3d29:train:0/sampler_weights/final
        tinkerfs prefetch --check ~/tinker/adapters/* && start-the-job
    """  # noqa: D301
    from tinkerfs.cli import transfers

    failures: list[Failure] = []
    rows: list[dict[str, Any]] = []
    with transfers.signals_interrupt(_HOW_TO_GO_ON):
        accounts: dict[Settings, list[Place]] = {}
        for path in paths:
            place = transfers.place_of(path, flags)
            accounts.setdefault(place.settings, []).append(place)
        for settings, places in accounts.items():
            with transfers.opened(settings) as parts:
                work = _check if check else _fetch
                rows += work(parts, settings, places, failures)
    is_complete = not failures and all(row["kept_bytes"] == row["total_bytes"] for row in rows)
    if as_json:
        totals = [row["total_bytes"] for row in rows]
        told = {
            "is_complete": is_complete,
            "kept_bytes": sum(row["kept_bytes"] for row in rows),
            "total_bytes": None if None in totals else sum(totals),
            "files": rows,
            "errors": [
                {"path": each.name, "error": transfers.words_of(each.error)} for each in failures
            ],
        }
        click.echo(json.dumps(told, indent=2))
    elif check:
        for row in rows:
            if row["kept_bytes"] != row["total_bytes"]:
                click.echo(_lacking(row))
    if failures:
        transfers.fail_with(failures)
    if not is_complete:
        raise SystemExit(1)


def _row(holding: "Holding", name: str, kept_bytes: int, total_bytes: int | None) -> dict[str, Any]:
    from tinkerfs.cli import transfers

    file = "archive.tar" if holding.is_archive else f"files/{name}"
    return {
        "checkpoint": transfers.name_of(holding),
        "file": file,
        "kept_bytes": kept_bytes,
        "total_bytes": total_bytes,
    }


def _lacking(row: dict[str, Any]) -> str:
    from tinkerfs.cli.progress import size_text

    name = f"{row['checkpoint']} {row['file']}"
    if row["total_bytes"] is None:
        return f"{name}: nothing is kept of it"
    return f"{name}: {size_text(row['kept_bytes'])} of {size_text(row['total_bytes'])}"


def _check(
    parts: "Parts", settings: "Settings", places: "list[Place]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    """Return what is kept, without a request to a store or for an archive."""
    from tinkerfs.call import IN_PROCESS
    from tinkerfs.cli import transfers
    from tinkerfs.cli.transfers import Failure

    del settings
    rows = []
    for _place, holding in transfers.find_holdings(parts, places, failures):
        subject, weights = holding.subject, parts.weights
        try:
            if holding.is_archive:
                if weights.archive_bytes(subject) is None:
                    rows.append(_row(holding, "", 0, None))
                else:
                    with weights.open_archive(subject, IN_PROCESS) as file:
                        rows.append(_row(holding, "", file.kept_bytes(), file.size_bytes))
                continue
            listing = weights.known_files(subject)
            if listing is None:
                rows.append(_row(holding, holding.inside, 0, None))
                continue
            for name in transfers.selected(holding, listing):
                with weights.open(subject, name, IN_PROCESS) as file:
                    rows.append(_row(holding, name, file.kept_bytes(), file.size_bytes))
        except OSError as error:
            failures.append(Failure(transfers.name_of(holding), error))
    return rows


def _fetch(
    parts: "Parts", settings: "Settings", places: "list[Place]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    from tinkerfs.cache.flight import in_thread
    from tinkerfs.cli.progress import Progress

    progress = Progress(parts.telemetry)
    work = in_thread(lambda: _fetch_behind(parts, settings, places, failures, progress), "prefetch")
    return progress.run(work)


def _fetch_behind(
    parts: "Parts",
    settings: "Settings",
    places: "list[Place]",
    failures: "list[Failure]",
    progress: "Progress",
) -> list[dict[str, Any]]:
    from tinkerfs.call import IN_PROCESS
    from tinkerfs.cli import transfers
    from tinkerfs.cli.progress import Item, size_text
    from tinkerfs.cli.transfers import Failure
    from tinkerfs.errors import SetupError
    from tinkerfs.weights.prefetch import prefetch as fetch
    from tinkerfs.weights.prefetch import room_bytes

    with ExitStack() as stack:
        holdings = [holding for _, holding in transfers.find_holdings(parts, places, failures)]
        planned = transfers.open_planned(parts, holdings, stack, failures)
        opened = [(each.holding, name, file) for each in planned for name, file in each.files]
        files = [file for _, _, file in opened]
        items = [
            Item(
                f"{transfers.name_of(holding)}/{name}".rstrip("/"),
                file.size_bytes,
                file.kept_bytes(),
            )
            for holding, name, file in opened
        ]
        wanted_bytes = room_bytes(files)
        if wanted_bytes > settings.cache_size_bytes:
            raise SetupError(
                f"these are {size_text(wanted_bytes)}, and the cache takes"
                f" {size_text(settings.cache_size_bytes)}: name fewer, or raise --cache-size"
            )
        progress.start(items)
        for item in items:
            if item.is_whole:
                progress.ended(item)
        for landed in fetch(files, IN_PROCESS):
            item = items[landed.number]
            progress.gained(item, landed.size_bytes)
            if landed.error is not None:
                failures.append(Failure(item.name, landed.error))
            elif item.is_whole:
                progress.ended(item)
        return [
            _row(holding, name, file.kept_bytes(), file.size_bytes)
            for holding, name, file in opened
        ]
