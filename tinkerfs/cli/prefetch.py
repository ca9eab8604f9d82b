"""`tinkerfs prefetch`."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.transfers import complete_path, transfer_options

if TYPE_CHECKING:
    from tinkerfs.app import App
    from tinkerfs.cli.progress import Progress
    from tinkerfs.cli.transfers import Failure, Location
    from tinkerfs.config import Settings
    from tinkerfs.vfs.weights_nodes import WeightsRef
    from tinkerfs.weights.file import WeightsFile

_HOW_TO_GO_ON = "what came is kept; the same command goes on from there"


@click.command(short_help="Pull weights into the cache, before they are read.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
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
    with transfers.exit_on_signal(_HOW_TO_GO_ON):
        accounts: dict[Settings, list[Location]] = {}
        for path in paths:
            place = transfers.parse_location(path, flags)
            accounts.setdefault(place.settings, []).append(place)
        for settings, places in accounts.items():
            with transfers.open_account(settings) as parts:
                work = _check if check else _fetch
                rows += work(parts, places, failures)
    is_complete = not failures and all(row["kept_bytes"] == row["total_bytes"] for row in rows)
    if as_json:
        totals = [row["total_bytes"] for row in rows]
        told = {
            "is_complete": is_complete,
            "kept_bytes": sum(row["kept_bytes"] for row in rows),
            "total_bytes": None if None in totals else sum(totals),
            "files": rows,
            "errors": transfers.failures_to_json(failures),
        }
        click.echo(json.dumps(told, indent=2))
    elif check:
        for row in rows:
            if row["kept_bytes"] != row["total_bytes"]:
                click.echo(_missing_files(row))
    if failures:
        transfers.exit_with_failures(failures)
    if not is_complete:
        raise SystemExit(1)


def _row(
    holding: "WeightsRef", name: str, kept_bytes: int, total_bytes: int | None
) -> dict[str, Any]:
    from tinkerfs.cli import transfers

    file = "archive.tar" if holding.is_archive else f"files/{name}"
    return {
        "checkpoint": transfers.name_of(holding),
        "file": file,
        "kept_bytes": kept_bytes,
        "total_bytes": total_bytes,
    }


def _missing_files(row: dict[str, Any]) -> str:
    from tinkerfs.cli.formatting import format_size
    from tinkerfs.printable import printable

    name = printable(f"{row['checkpoint']} {row['file']}")
    if row["total_bytes"] is None:
        return f"{name}: nothing is kept of it"
    return f"{name}: {format_size(row['kept_bytes'])} of {format_size(row['total_bytes'])}"


def _check(
    parts: "App", places: "list[Location]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    """Return what is kept, without a request to a store or for an archive."""
    from tinkerfs.cli import transfers
    from tinkerfs.cli.transfers import Failure
    from tinkerfs.context import BACKGROUND_CONTEXT

    rows = []
    holdings, _ = transfers.resolve_weights(parts, places, failures)
    for holding in holdings:
        subject, weights = holding.subject, parts.weights
        try:
            if holding.is_archive:
                if weights.archive_bytes(subject) is None:
                    rows.append(_row(holding, "", 0, None))
                else:
                    with weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
                        rows.append(_row(holding, "", file.kept_bytes(), file.size_bytes))
                continue
            listing = weights.cached_files(subject)
            if listing is None:
                rows.append(_row(holding, holding.member_path, 0, None))
                continue
            for name in transfers.selected(holding, listing):
                with weights.open(subject, name, BACKGROUND_CONTEXT) as file:
                    rows.append(_row(holding, name, file.kept_bytes(), file.size_bytes))
        except OSError as error:
            failures.append(Failure(transfers.name_of(holding), error))
    return rows


def _fetch(
    parts: "App", places: "list[Location]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    """Fetch what is not kept, and return what is then."""
    from tinkerfs.cli import transfers
    from tinkerfs.cli.progress import Progress
    from tinkerfs.concurrency import run_in_thread

    progress = Progress(parts.telemetry)
    rows: list[dict[str, Any]] = []

    def work() -> None:
        holdings, _ = transfers.resolve_weights(parts, places, failures)
        fetching = PrefetchJob(parts, failures, progress)
        changed = fetching.run(holdings, rows, is_retry=False)
        fetching.run(changed, rows, is_retry=True)

    progress.run(run_in_thread(work, "prefetch"))
    return rows


@dataclass(frozen=True, slots=True)
class PrefetchJob:
    """One run of the command, on a thread of its own."""

    parts: "App"
    failures: "list[Failure]"
    progress: "Progress"

    def run(
        self, holdings: "list[WeightsRef]", rows: list[dict[str, Any]], *, is_retry: bool
    ) -> "list[WeightsRef]":
        """Fetch some checkpoints; return those of which the server has another version by now."""
        from tinkerfs import errors
        from tinkerfs.cli import transfers
        from tinkerfs.cli.progress import Item
        from tinkerfs.cli.transfers import Failure
        from tinkerfs.context import BACKGROUND_CONTEXT
        from tinkerfs.weights import prefetch as blocks

        changed: list[WeightsRef] = []
        with ExitStack() as stack:
            planned = transfers.open_checkpoints(
                self.parts, holdings, stack, self.failures, with_urls=True
            )
            opened = [(each.holding, name, file) for each in planned for name, file in each.files]
            files = [file for _, _, file in opened]
            self._check_room(files)
            items = []
            for holding, name, file in opened:
                shown = f"{transfers.name_of(holding)}/{name}".rstrip("/")
                items.append(Item(shown, file.size_bytes, file.kept_bytes()))
            self.progress.start(items)
            for item in items:
                if item.is_whole:
                    self.progress.finish(item)
            for landed in blocks.prefetch(files, BACKGROUND_CONTEXT):
                item, error = items[landed.number], landed.error
                holding = opened[landed.number][0]
                self.progress.advance(item, landed.size_bytes)
                if error is None:
                    if item.is_whole:
                        self.progress.finish(item)
                    continue
                is_stale = isinstance(error, OSError) and errors.is_stale(error)
                if is_stale:
                    self.parts.weights.cached_files(holding.subject)  # which forgets it
                if is_stale and not is_retry:
                    if holding not in changed:
                        changed.append(holding)
                else:
                    self.failures.append(Failure(item.name, error))
                if isinstance(error, OSError) and errors.is_no_space(error):
                    break
            rows += [
                _row(holding, name, file.kept_bytes(), file.size_bytes)
                for holding, name, file in opened
                if holding not in changed
            ]
        return changed

    def _check_room(self, files: "list[WeightsFile]") -> None:
        """Refuse what does not fit: the last would take the room of the first.

        Raises:
            SetupError: the cache may not be so large.
        """
        from tinkerfs.cli.formatting import format_size
        from tinkerfs.errors import StartupError
        from tinkerfs.weights import prefetch as blocks

        wanted_bytes, limit_bytes = (
            blocks.required_cache_bytes(files),
            self.parts.settings.cache_size_bytes,
        )
        if not limit_bytes:
            raise StartupError(
                "nothing is cached on disk, so nothing can be prefetched (hint: name a directory"
                " that can be written with --cache-dir, and a --cache-size above 0)"
            )
        if wanted_bytes > limit_bytes:
            raise StartupError(
                f"these are {format_size(wanted_bytes)}, and the cache takes"
                f" {format_size(limit_bytes)}: name fewer, or raise --cache-size"
            )
