"""The command `tinkerfs get`."""

import os
from dataclasses import asdict
from typing import Any

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
from tinkerfs.transfer.progress import TransferProgress


@click.command(short_help="Copy a checkpoint's files to a directory; needs no mount.")
@click.argument("path", shell_complete=complete_path)
@click.argument("dest", shell_complete=complete_path)
@click.option("--archive", is_flag=True, help="Copy the archive instead of its files.")
@click.option("--force", is_flag=True, help="Replace files in DEST that have other content.")
@export_options
@click.option(
    "--age-identity",
    metavar="FILE",
    help="Decrypt copied files that end in .age, by the age identities in FILE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the outcome of each file.")
@transfer_options
def get(
    path: str,
    dest: str,
    archive: bool,
    force: bool,
    export: bool,
    keep_export: bool,
    age_recipient: tuple[str, ...],
    age_identity: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Copy the weights at PATH to the directory DEST, which is created if missing.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them. For a
    run, /adapters or /runs, every checkpoint is copied to its own subdirectory of DEST. With
    --archive, or if PATH is an archive.tar, DEST is the name of the tar file, or a directory. The
    files of an export or of external weights are copied as a tar then.

    Each file is written under a temporary name and renamed when it is complete. After an
    interruption, run the same command again: it resumes, unless the server has a new version. If
    DEST has other files of the same names, that checkpoint is not copied unless --force is given.

    A service without archives has training checkpoints only as exports. With --export, get exports
    such a checkpoint for an hour, copies the files and deletes the export.

    \b
        tinkerfs get tinker://79db3d29:train:0/sampler_weights/final adapter
        tinkerfs get --archive ~/tinker/runs/79db3d29:train:0/latest checkpoint.tar
    """  # noqa: D301
    from tinkerfs.transfer.age import Identities
    from tinkerfs.transfer.copy import RESUME_HINT, CopyJob  # lazy: imports HTTP and SQLite

    with exit_on_signal(RESUME_HINT):
        location = parse_location(path, Settings(**settings))
        umask = os.umask(0)
        os.umask(umask)
        identities = None if age_identity is None else Identities(age_identity)
        with (
            open_account(location.settings) as app,
            temporary_exports(app, export, keep_export, age_recipient) as exports,
        ):
            progress = TransferProgress(app.telemetry)
            job = CopyJob(
                app.filesystem,
                app.weights,
                progress,
                dest,
                force=force,
                archive=archive,
                mode=0o666 & ~umask,
                exports=exports,
                identities=identities,
            )
            Progress(progress).run(run_in_thread(lambda: job.run({path: location.path}), "get"))
    if as_json:
        files = [asdict(each) for each in job.results]
        print_report({"is_complete": not job.failures, "files": files}, job.failures)
    if job.failures:
        exit_with_failures(job.failures)
