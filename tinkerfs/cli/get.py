"""`tinkerfs get`."""

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
    from tinkerfs.vfs.weights_nodes import WeightsRef
    from tinkerfs.weights.destination import Destination
    from tinkerfs.weights.exported_file import ExportedFile

_HOW_TO_GO_ON = "what came is kept beside; the same command goes on from there"


@click.command(short_help="Copy a checkpoint's files out; needs no mount.")
@click.argument("path", shell_complete=complete_path)
@click.argument("dest", shell_complete=complete_path)
@click.option("--archive", is_flag=True, help="Copy the archive as it is stored, not its files.")
@click.option("--force", is_flag=True, help="Replace files in DEST that are others.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what became of each file.")
@transfer_options
def get(
    path: str, dest: str, archive: bool, force: bool, as_json: bool, **flags: str | None
) -> None:
    """Copy the weights at PATH to the folder DEST, which is made where it is not there.

    PATH is a tinker path or a path below a mount: a checkpoint, its files or one of them. Of a
    run, of /adapters or of /runs every checkpoint is copied, each to a folder of its own in DEST.
    With --archive, or where PATH is an archive.tar, DEST is the tar's file name, or a folder.

    Each file is written beside and renamed when it is whole. After an interruption the same command
    goes on where it was, unless the server has another version by then. Other files of the same
    names are left alone, and nothing of that checkpoint is copied, unless --force is given.

    \b
        tinkerfs get tinker://79db3d29:train:0/sampler_weights/final adapter
        tinkerfs get --archive ~/tinker/runs/79db3d29:train:0/latest checkpoint.tar
    """  # noqa: D301
    from tinkerfs.cli import transfers
    from tinkerfs.cli.progress import Progress
    from tinkerfs.concurrency import run_in_thread

    failures: list[Failure] = []
    with transfers.exit_on_signal(_HOW_TO_GO_ON):
        place = transfers.parse_location(path, flags)
        umask = os.umask(0)
        os.umask(umask)
        with transfers.open_account(place.settings) as parts:
            progress = Progress(parts.telemetry)
            copying = CopyJob(
                parts, progress, failures, dest, force=force, archive=archive, mode=0o666 & ~umask
            )
            rows = progress.run(run_in_thread(lambda: copying.run(place), "get"))
    if as_json:
        told = {
            "is_complete": not failures,
            "files": rows,
            "errors": transfers.failures_to_json(failures),
        }
        click.echo(json.dumps(told, indent=2))
    if failures:
        transfers.exit_with_failures(failures)


class CopyJob:
    """One run of the command, on a thread of its own."""

    def __init__(
        self,
        parts: "App",
        progress: "Progress",
        failures: "list[Failure]",
        dest: str,
        *,
        force: bool,
        archive: bool,
        mode: int,
    ) -> None:
        self._parts = parts
        self._progress = progress
        self._failures = failures
        self._dest = dest
        self._is_forced = force
        self._wants_archive = archive
        self._mode = mode
        self._is_disk_full = False
        #: By path, of one pass over the checkpoints.
        self._destinations: dict[str, Destination] = {}

    def run(self, place: "Location") -> list[dict[str, Any]]:
        """Copy all of it; return a row for each file."""
        from tinkerfs.cli import transfers

        holdings, is_one = transfers.resolve_weights(self._parts, [place], self._failures)
        if self._wants_archive:
            holdings = [_whole_archive(holding) for holding in holdings]
        rows: list[dict[str, Any]] = []
        changed = self._copy(holdings, rows, is_one=is_one, is_retry=False)
        self._copy(changed, rows, is_one=is_one, is_retry=True)
        return rows

    def _copy(
        self,
        holdings: "list[WeightsRef]",
        rows: list[dict[str, Any]],
        *,
        is_one: bool,
        is_retry: bool,
    ) -> "list[WeightsRef]":
        """Copy some checkpoints; return those of which the server has another version by now."""
        from tinkerfs.cli import transfers
        from tinkerfs.cli.progress import Item

        changed = []
        self._destinations = {}
        with ExitStack() as stack:
            planned = transfers.open_checkpoints(
                self._parts, holdings, stack, self._failures, with_urls=False
            )
            work: list[tuple[OpenCheckpoint, list[tuple[ExportedFile, Item]]]] = []
            for each in planned:
                targets = [self._target(each, name, is_one) for name, _ in each.files]
                if self._has_others(targets):
                    continue
                items = []
                for target in targets:
                    size_bytes = target.file.size_bytes
                    had_bytes = size_bytes if target.is_complete() else target.resumable_bytes()
                    items.append(Item(target.path, size_bytes, had_bytes))
                work.append((each, list(zip(targets, items, strict=True))))
            self._progress.start([item for _, pairs in work for _, item in pairs])
            for each, pairs in work:
                if self._is_disk_full:
                    break
                if not self._copy_one(each, pairs, rows, is_retry=is_retry):
                    changed.append(each.holding)
        return changed

    def _copy_one(
        self,
        planned: "OpenCheckpoint",
        pairs: "list[tuple[ExportedFile, Item]]",
        rows: list[dict[str, Any]],
        *,
        is_retry: bool,
    ) -> bool:
        """Copy a checkpoint; return False where the server has another version by now."""
        from tinkerfs import errors
        from tinkerfs.cli.transfers import Failure

        for target, item in pairs:
            try:
                outcome = self._copy_file(target, item)
            except (errors.ApiError, OSError) as error:
                if isinstance(error, OSError) and errors.is_stale(error):
                    self._parts.weights.cached_files(planned.holding.subject)  # which forgets it
                    if not is_retry:
                        return False
                self._is_disk_full = isinstance(error, OSError) and errors.is_no_space(error)
                self._failures.append(Failure(item.name, error, _HOW_TO_GO_ON))
                return True
            rows.append(
                {
                    "checkpoint": planned.holding.checkpoint.tinker_path,
                    "path": item.name,
                    "total_bytes": item.total_bytes,
                    "outcome": outcome,
                }
            )
        return True

    def _copy_file(self, target: "ExportedFile", item: "Item") -> str:
        from tinkerfs.context import BACKGROUND_CONTEXT

        outcome = "there already"
        if not target.is_complete():
            outcome = "resumed" if item.initial_bytes else "copied"
            self._progress.advance(item, 0)
            for size_bytes in target.copy(self._mode, BACKGROUND_CONTEXT):
                self._progress.advance(item, size_bytes)
        self._progress.finish(item)
        return outcome

    def _has_others(self, targets: "list[ExportedFile]") -> bool:
        """Refuse to replace what is not what we would write."""
        from tinkerfs import errors
        from tinkerfs.cli.transfers import Failure

        try:
            if self._is_forced:
                others = [each.path for each in targets if each.is_directory()]
                why = "it is a directory, and would have to be a file"
            else:
                others = [each.path for each in targets if each.exists() and not each.is_complete()]
                why = "it is there, and not known to be this one: --force replaces it"
        except OSError as error:
            self._failures.append(Failure(targets[0].destination.path, error))
            return True
        self._failures += [Failure(path, errors.exists(path, why)) for path in others]
        return bool(others)

    def _target(self, planned: "OpenCheckpoint", name: str, is_one: bool) -> "ExportedFile":
        from tinkerfs import name_encoding
        from tinkerfs.weights.exported_file import ExportedFile

        holding, file = planned.holding, dict(planned.files)[name]
        whose = name_encoding.encode_composite(holding.checkpoint.key)
        if holding.is_archive:
            folder, tar = os.path.split(self._dest)
            if not is_one or not tar or os.path.isdir(self._dest):
                folder, tar = self._dest, f"{whose}.tar"
            return ExportedFile(self._destination(folder), tar, file, "archive")
        folder = self._dest if is_one else os.path.join(self._dest, whose)
        shown = "/".join(map(name_encoding.encode, name.split("/")))
        inside = holding.member_path
        if shown == inside:
            inside = os.path.dirname(inside)
        inner = shown.removeprefix(f"{inside}/") if inside else shown
        return ExportedFile(self._destination(folder), inner, file, name)

    def _destination(self, path: str) -> "Destination":
        from tinkerfs.weights.destination import Destination

        return self._destinations.setdefault(path, Destination(path))


def _whole_archive(holding: "WeightsRef") -> "WeightsRef":
    """Return the archive of the checkpoint that is meant.

    Raises:
        SetupError: a part of it is meant.
    """
    from dataclasses import replace

    from tinkerfs.errors import StartupError

    if holding.member_path:
        raise StartupError(
            f"--archive is of a whole checkpoint, not of files/{holding.member_path}"
        )
    return replace(holding, is_archive=True)
