"""The command `tinkerfs prefetch`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.locations import complete_path, open_account, parse_location
from tinkerfs.cli.progress import Progress
from tinkerfs.cli.transfers import (
    exit_on_signal,
    exit_with_failures,
    export_options,
    print_report,
    temporary_exports,
    transfer_options,
)
from tinkerfs.concurrency import run_in_thread
from tinkerfs.config import Settings
from tinkerfs.formatting import format_size
from tinkerfs.printable import escape_control_chars
from tinkerfs.transfer.failure import Failure
from tinkerfs.transfer.progress import TransferProgress

if TYPE_CHECKING:
    from tinkerfs.transfer.prefetch import PrefetchedFile

_RESUME_HINT = "downloaded blocks are cached; run the same command again to resume"


@click.command(short_help="Download weights into the cache before they are read.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, shell_complete=complete_path)
@click.option(
    "--check", is_flag=True, help="Download nothing; exit 0 if all weights are cached, else 1."
)
@export_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the cached bytes of each file.")
@transfer_options
def prefetch(
    paths: tuple[str, ...],
    check: bool,
    export: bool,
    keep_export: bool,
    age_recipient: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Download the weights at each PATH into the disk cache, where mounts read them.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them, its
    archive.tar, or a directory of /adapters or /checkpoints. For a run or /runs, all checkpoints
    are downloaded. For a path below a mount of yours or root's, the server and the cache of that
    mount are used. A tinker path needs no mount and no FUSE.

    Cached weights are not downloaded again. After an interruption, run the same command again to
    resume. With --export, training checkpoints without an archive are exported for an hour, and the
    exports deleted after they were read. Exits 1 if some weights could not be cached, or if the
    cache is too small.

    \b
        tinkerfs prefetch ~/tinker/runs/79db3d29:train:0/latest_sampler
        tinkerfs prefetch --cache-size 200G tinker://79db3d29:train:0/sampler_weights/final
        tinkerfs prefetch --check ~/tinker/adapters/* && start-the-job
    """  # noqa: D301
    files: list[PrefetchedFile] = []
    failures: list[Failure] = []
    with exit_on_signal(_RESUME_HINT):
        accounts: dict[Settings, dict[str, str]] = {}
        for path in paths:
            location = parse_location(path, Settings(**settings))
            accounts.setdefault(location.settings, {})[path] = location.path
        for account, tree_paths in accounts.items():
            options = (export, keep_export, age_recipient)
            _prefetch(account, tree_paths, files, failures, options, check=check)
    is_complete = not failures and all(file.is_complete for file in files)
    if as_json:
        totals = [file.total_bytes for file in files]
        known = [total for total in totals if total is not None]
        report = {
            "is_complete": is_complete,
            "cached_bytes": sum(file.cached_bytes for file in files),
            "total_bytes": sum(known) if len(known) == len(totals) else None,
            "files": [asdict(file) for file in files],
        }
        print_report(report, failures)
    elif check:
        for file in files:
            if not file.is_complete:
                click.echo(escape_control_chars(_cached_part(file)))
    if failures:
        exit_with_failures(failures)
    if not is_complete:
        raise SystemExit(1)


def _prefetch(
    settings: Settings,
    paths: dict[str, str],
    files: "list[PrefetchedFile]",
    failures: list[Failure],
    export_flags: tuple[bool, bool, tuple[str, ...]],
    *,
    check: bool,
) -> None:
    """Download or check the weights of one account; add to `files` and `failures`."""
    from tinkerfs.transfer.prefetch import PrefetchJob  # lazy: imports HTTP and SQLite

    with open_account(settings) as app, temporary_exports(app, *export_flags) as exports:
        progress = TransferProgress(app.telemetry)
        job = PrefetchJob(
            app.filesystem, app.weights, progress, app.settings.cache_size_bytes, exports
        )
        if check:
            job.check(paths)
        else:
            Progress(progress).run(run_in_thread(lambda: job.run(paths), "prefetch"))
    files += job.results
    failures += job.failures


def _cached_part(file: "PrefetchedFile") -> str:
    name = f"{file.checkpoint} {file.file}"
    if file.total_bytes is None:
        return f"{name}: not cached"
    return f"{name}: {format_size(file.cached_bytes)} of {format_size(file.total_bytes)} cached"
