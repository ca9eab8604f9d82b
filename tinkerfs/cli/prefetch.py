"""The command `tinkerfs prefetch`."""

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

_RESUME_HINT = "downloaded blocks are cached; run the same command again to resume"


@click.command(short_help="Download weights into the cache before they are read.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@click.option(
    "--check", is_flag=True, help="Download nothing; exit 0 if all weights are cached, else 1."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the cached bytes of each file.")
@transfer_options
def prefetch(paths: tuple[str, ...], check: bool, as_json: bool, **flags: str | None) -> None:
    """Download the weights at each PATH into the disk cache, where mounts read them.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them, its
    archive.tar, or a directory of /adapters or /checkpoints. For a run or /runs, all checkpoints
    are downloaded. For a path below a mount, the server and the cache of that mount are used. A
    tinker path needs no mount and no FUSE.

    Cached weights are not downloaded again. After an interruption, run the same command again to
    resume. Exits 1 if some weights could not be cached, or if the cache is too small.

    \b
        tinkerfs prefetch ~/tinker/runs/79db3d29:train:0/latest_sampler
        tinkerfs prefetch --cache-size 200G tinker://79db3d29:train:0/sampler_weights/final
        tinkerfs prefetch --check ~/tinker/adapters/* && start-the-job
    """  # noqa: D301
    from tinkerfs.cli import transfers

    failures: list[Failure] = []
    rows: list[dict[str, Any]] = []
    with transfers.exit_on_signal(_RESUME_HINT):
        accounts: dict[Settings, list[Location]] = {}
        for path in paths:
            location = transfers.parse_location(path, flags)
            accounts.setdefault(location.settings, []).append(location)
        for settings, locations in accounts.items():
            with transfers.open_account(settings) as app:
                work = _check if check else _download
                rows += work(app, locations, failures)
    is_complete = not failures and all(row["kept_bytes"] == row["total_bytes"] for row in rows)
    if as_json:
        totals = [row["total_bytes"] for row in rows]
        report = {
            "is_complete": is_complete,
            "kept_bytes": sum(row["kept_bytes"] for row in rows),
            "total_bytes": None if None in totals else sum(totals),
            "files": rows,
            "errors": transfers.failures_to_json(failures),
        }
        click.echo(json.dumps(report, indent=2))
    elif check:
        for row in rows:
            if row["kept_bytes"] != row["total_bytes"]:
                click.echo(_cached_part(row))
    if failures:
        transfers.exit_with_failures(failures)
    if not is_complete:
        raise SystemExit(1)


def _row(
    ref: "WeightsRef", name: str, cached_bytes: int, total_bytes: int | None
) -> dict[str, Any]:
    from tinkerfs.cli import transfers

    file = "archive.tar" if ref.is_archive else f"files/{name}"
    return {
        "checkpoint": transfers.display_name(ref),
        "file": file,
        "kept_bytes": cached_bytes,
        "total_bytes": total_bytes,
    }


def _cached_part(row: dict[str, Any]) -> str:
    from tinkerfs.formatting import format_size
    from tinkerfs.printable import escape_control_chars

    name = escape_control_chars(f"{row['checkpoint']} {row['file']}")
    if row["total_bytes"] is None:
        return f"{name}: not cached"
    return f"{name}: {format_size(row['kept_bytes'])} of {format_size(row['total_bytes'])} cached"


def _check(
    app: "App", locations: "list[Location]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    """Return a row per file, without a request to the store or for an archive."""
    from tinkerfs.cli import transfers
    from tinkerfs.cli.transfers import Failure
    from tinkerfs.context import BACKGROUND_CONTEXT

    rows = []
    refs, _ = transfers.resolve_weights(app, locations, failures)
    for ref in refs:
        subject, weights = ref.version, app.weights
        try:
            if ref.is_archive:
                if weights.archive_bytes(subject) is None:
                    rows.append(_row(ref, "", 0, None))
                else:
                    with weights.open_archive(subject, BACKGROUND_CONTEXT) as file:
                        rows.append(_row(ref, "", file.cached_bytes(), file.size_bytes))
                continue
            listing = weights.cached_files(subject)
            if listing is None:
                rows.append(_row(ref, ref.member_path, 0, None))
                continue
            for name in transfers.select_members(ref, listing):
                with weights.open(subject, name, BACKGROUND_CONTEXT) as file:
                    rows.append(_row(ref, name, file.cached_bytes(), file.size_bytes))
        except OSError as error:
            failures.append(Failure(transfers.display_name(ref), error))
    return rows


def _download(
    app: "App", locations: "list[Location]", failures: "list[Failure]"
) -> list[dict[str, Any]]:
    """Download missing blocks; return a row per file with what is cached afterwards."""
    from tinkerfs.cli import transfers
    from tinkerfs.cli.progress import Progress
    from tinkerfs.concurrency import run_in_thread

    progress = Progress(app.telemetry)
    rows: list[dict[str, Any]] = []

    def work() -> None:
        refs, _ = transfers.resolve_weights(app, locations, failures)
        job = PrefetchJob(app, failures, progress)
        changed = job.run(refs, rows, is_retry=False)
        job.run(changed, rows, is_retry=True)

    progress.run(run_in_thread(work, "prefetch"))
    return rows


@dataclass(frozen=True, slots=True)
class PrefetchJob:
    """The downloads of one `prefetch` command, on a worker thread."""

    app: "App"
    failures: "list[Failure]"
    progress: "Progress"

    def run(
        self, refs: "list[WeightsRef]", rows: list[dict[str, Any]], *, is_retry: bool
    ) -> "list[WeightsRef]":
        """Download some checkpoints; return those with a new version on the server."""
        from tinkerfs import errors
        from tinkerfs.cli import transfers
        from tinkerfs.cli.progress import Item
        from tinkerfs.cli.transfers import Failure
        from tinkerfs.context import BACKGROUND_CONTEXT
        from tinkerfs.weights import prefetch as blocks

        changed: list[WeightsRef] = []
        with ExitStack() as stack:
            checkpoints = transfers.open_checkpoints(
                self.app, refs, stack, self.failures, with_urls=True
            )
            open_files = [
                (each.ref, name, file) for each in checkpoints for name, file in each.files
            ]
            files = [file for _, _, file in open_files]
            self._check_cache_size(files)
            items = []
            for ref, name, file in open_files:
                label = f"{transfers.display_name(ref)}/{name}".rstrip("/")
                items.append(Item(label, file.size_bytes, file.cached_bytes()))
            self.progress.start(items)
            for item in items:
                if item.is_complete:
                    self.progress.finish(item)
            for result in blocks.prefetch(files, BACKGROUND_CONTEXT):
                item, error = items[result.number], result.error
                ref = open_files[result.number][0]
                self.progress.advance(item, result.size_bytes)
                if error is None:
                    if item.is_complete:
                        self.progress.finish(item)
                    continue
                is_stale = isinstance(error, OSError) and errors.is_stale(error)
                if is_stale:
                    # Called for its side effect: it drops the cached file list of the old version.
                    self.app.weights.cached_files(ref.version)
                if is_stale and not is_retry:
                    if ref not in changed:
                        changed.append(ref)
                else:
                    self.failures.append(Failure(item.name, error))
                if isinstance(error, OSError) and errors.is_no_space(error):
                    break
            rows += [
                _row(ref, name, file.cached_bytes(), file.size_bytes)
                for ref, name, file in open_files
                if ref not in changed
            ]
        return changed

    def _check_cache_size(self, files: "list[WeightsFile]") -> None:
        """Fail if the files exceed the cache: the last would evict the first.

        Raises:
            StartupError: The cache is off, or its maximum size is too small.
        """
        from tinkerfs.errors import StartupError
        from tinkerfs.formatting import format_size
        from tinkerfs.weights import prefetch as blocks

        required_bytes = blocks.required_cache_bytes(files)
        max_bytes = self.app.settings.cache_size_bytes
        if not max_bytes:
            raise StartupError(
                "the disk cache is off, so nothing can be prefetched (hint: set --cache-dir to a"
                " writable directory, and --cache-size above 0)"
            )
        if required_bytes > max_bytes:
            raise StartupError(
                f"the weights need {format_size(required_bytes)}, but the cache holds at most"
                f" {format_size(max_bytes)} (hint: name fewer paths, or raise --cache-size)"
            )
