"""The command `tinkerfs get`."""

import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli.transfers import complete_path, transfer_options

if TYPE_CHECKING:
    from tinkerfs.app import App
    from tinkerfs.cli.progress import Item, Progress
    from tinkerfs.cli.transfers import Failure, Location, OpenCheckpoint
    from tinkerfs.transfer.destination import Destination
    from tinkerfs.transfer.exported_file import ExportedFile
    from tinkerfs.vfs.weights_nodes import WeightsRef

_RESUME_HINT = "partial files are preserved; run the same command again to resume"


@click.command(short_help="Copy a checkpoint's files to a directory; needs no mount.")
@click.argument("path", shell_complete=complete_path)
@click.argument("dest", shell_complete=complete_path)
@click.option("--archive", is_flag=True, help="Copy the stored archive instead of its files.")
@click.option("--force", is_flag=True, help="Replace files in DEST that have other content.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the outcome of each file.")
@transfer_options
def get(
    path: str, dest: str, archive: bool, force: bool, as_json: bool, **flags: str | None
) -> None:
    """Copy the weights at PATH to the directory DEST, which is created if missing.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them. For a
    run, /adapters or /runs, every checkpoint is copied to its own subdirectory of DEST. With
    --archive, or if PATH is an archive.tar, DEST is the name of the tar file, or a directory.

    Each file is written under a temporary name and renamed when it is complete. After an
    interruption, run the same command again: it resumes, unless the server has a new version. If
    DEST has other files of the same names, that checkpoint is not copied unless --force is given.

    \b
        tinkerfs get tinker://79db3d29:train:0/sampler_weights/final adapter
        tinkerfs get --archive ~/tinker/runs/79db3d29:train:0/latest checkpoint.tar
    """  # noqa: D301
    from tinkerfs.cli import transfers
    from tinkerfs.cli.progress import Progress
    from tinkerfs.concurrency import run_in_thread

    failures: list[Failure] = []
    with transfers.exit_on_signal(_RESUME_HINT):
        location = transfers.parse_location(path, flags)
        umask = os.umask(0)
        os.umask(umask)
        with transfers.open_account(location.settings) as app:
            progress = Progress(app.telemetry)
            job = CopyJob(
                app, progress, failures, dest, force=force, archive=archive, mode=0o666 & ~umask
            )
            rows = progress.run(run_in_thread(lambda: job.run(location), "get"))
    if as_json:
        report = {
            "is_complete": not failures,
            "files": rows,
            "errors": transfers.failures_to_json(failures),
        }
        click.echo(json.dumps(report, indent=2))
    if failures:
        transfers.exit_with_failures(failures)


class CopyJob:
    """The copying of one `get` command, on a worker thread."""

    def __init__(
        self,
        app: "App",
        progress: "Progress",
        failures: "list[Failure]",
        dest: str,
        *,
        force: bool,
        archive: bool,
        mode: int,
    ) -> None:
        self._app = app
        self._progress = progress
        self._failures = failures
        self._dest = dest
        self._is_forced = force
        self._wants_archive = archive
        self._mode = mode
        self._is_disk_full = False
        #: Path -> destination directory, for one pass over the checkpoints.
        self._destinations: dict[str, Destination] = {}

    def run(self, location: "Location") -> list[dict[str, Any]]:
        """Copy all weights at a location; return a row per file for JSON output."""
        from tinkerfs.cli import transfers

        refs, is_single = transfers.resolve_weights(self._app, [location], self._failures)
        if self._wants_archive:
            refs = [_to_archive(ref) for ref in refs]
        rows: list[dict[str, Any]] = []
        changed = self._copy(refs, rows, is_single=is_single, is_retry=False)
        self._copy(changed, rows, is_single=is_single, is_retry=True)
        return rows

    def _copy(
        self,
        refs: "list[WeightsRef]",
        rows: list[dict[str, Any]],
        *,
        is_single: bool,
        is_retry: bool,
    ) -> "list[WeightsRef]":
        """Copy some checkpoints; return those with a new version on the server."""
        from tinkerfs.cli import transfers
        from tinkerfs.cli.progress import Item

        changed = []
        self._destinations = {}
        with ExitStack() as stack:
            checkpoints = transfers.open_checkpoints(
                self._app, refs, stack, self._failures, with_urls=False
            )
            work: list[tuple[OpenCheckpoint, list[tuple[ExportedFile, Item]]]] = []
            for checkpoint in checkpoints:
                targets = [
                    self._target(checkpoint, name, is_single) for name, _ in checkpoint.files
                ]
                if self._has_conflicts(targets):
                    continue
                items = []
                for target in targets:
                    size_bytes = target.file.size_bytes
                    initial_bytes = size_bytes if target.is_complete() else target.resumable_bytes()
                    items.append(Item(target.path, size_bytes, initial_bytes))
                work.append((checkpoint, list(zip(targets, items, strict=True))))
            self._progress.start([item for _, pairs in work for _, item in pairs])
            for checkpoint, pairs in work:
                if self._is_disk_full:
                    break
                if not self._copy_one(checkpoint, pairs, rows, is_retry=is_retry):
                    changed.append(checkpoint.ref)
        return changed

    def _copy_one(
        self,
        checkpoint: "OpenCheckpoint",
        pairs: "list[tuple[ExportedFile, Item]]",
        rows: list[dict[str, Any]],
        *,
        is_retry: bool,
    ) -> bool:
        """Copy a checkpoint; return False if the server has a new version of it."""
        from tinkerfs import errors
        from tinkerfs.cli.transfers import Failure

        for target, item in pairs:
            try:
                outcome = self._copy_file(target, item)
            except (errors.ApiError, OSError) as error:
                if isinstance(error, OSError) and errors.is_stale(error):
                    # Called for its side effect: it drops the cached file list of the old version.
                    self._app.weights.cached_files(checkpoint.ref.version)
                    if not is_retry:
                        return False
                self._is_disk_full = isinstance(error, OSError) and errors.is_no_space(error)
                self._failures.append(Failure(item.name, error, _RESUME_HINT))
                return True
            rows.append(
                {
                    "checkpoint": checkpoint.ref.checkpoint.tinker_path,
                    "path": item.name,
                    "total_bytes": item.total_bytes,
                    "outcome": outcome,
                }
            )
        return True

    def _copy_file(self, target: "ExportedFile", item: "Item") -> str:
        from tinkerfs.context import BACKGROUND_CONTEXT

        outcome = "already present"
        if not target.is_complete():
            outcome = "resumed" if item.initial_bytes else "copied"
            self._progress.advance(item, 0)
            for size_bytes in target.copy(self._mode, BACKGROUND_CONTEXT):
                self._progress.advance(item, size_bytes)
        self._progress.finish(item)
        return outcome

    def _has_conflicts(self, targets: "list[ExportedFile]") -> bool:
        """Return whether files exist that must not be replaced; add their failures."""
        from tinkerfs import errors
        from tinkerfs.cli.transfers import Failure

        try:
            if self._is_forced:
                conflicts = [each.path for each in targets if each.is_directory()]
                reason = "a directory of this name exists, and cannot be replaced by a file"
            else:
                conflicts = [
                    each.path for each in targets if each.exists() and not each.is_complete()
                ]
                reason = "already exists, and may have other content (hint: --force replaces it)"
        except OSError as error:
            self._failures.append(Failure(targets[0].destination.path, error))
            return True
        self._failures += [Failure(path, errors.exists(path, reason)) for path in conflicts]
        return bool(conflicts)

    def _target(self, checkpoint: "OpenCheckpoint", name: str, is_single: bool) -> "ExportedFile":
        from tinkerfs import name_encoding
        from tinkerfs.transfer.exported_file import ExportedFile

        ref, file = checkpoint.ref, dict(checkpoint.files)[name]
        checkpoint_name = name_encoding.encode_composite(ref.checkpoint.key)
        if ref.is_archive:
            directory, tar_name = os.path.split(self._dest)
            if not is_single or not tar_name or os.path.isdir(self._dest):
                directory, tar_name = self._dest, f"{checkpoint_name}.tar"
            return ExportedFile(self._destination(directory), tar_name, file, "archive")
        directory = self._dest if is_single else os.path.join(self._dest, checkpoint_name)
        encoded = "/".join(map(name_encoding.encode, name.split("/")))
        prefix = ref.member_path
        if encoded == prefix:
            prefix = os.path.dirname(prefix)
        relative = encoded.removeprefix(f"{prefix}/") if prefix else encoded
        return ExportedFile(self._destination(directory), relative, file, name)

    def _destination(self, path: str) -> "Destination":
        from tinkerfs.transfer.destination import Destination

        return self._destinations.setdefault(path, Destination(path))


def _to_archive(ref: "WeightsRef") -> "WeightsRef":
    """Return the reference to the archive of a whole checkpoint.

    Raises:
        StartupError: The reference selects only some files of the checkpoint.
    """
    from dataclasses import replace

    from tinkerfs.errors import StartupError

    if ref.member_path:
        raise StartupError(f"--archive needs a whole checkpoint, not files/{ref.member_path}")
    return replace(ref, is_archive=True)
