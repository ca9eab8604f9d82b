"""Copy weights to files in an ordinary directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinkerfs import errors, name_encoding
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.transfer.age import SUFFIX, Identities
from tinkerfs.transfer.destination import Destination
from tinkerfs.transfer.exports import TemporaryExports
from tinkerfs.transfer.failure import Failure
from tinkerfs.transfer.job import OpenCheckpoint, TransferJob
from tinkerfs.transfer.progress import Item, TransferProgress
from tinkerfs.transfer.target_file import TargetFile
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.weights_nodes import WeightsRef
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader

RESUME_HINT = "partial files are preserved; run the same command again to resume"


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """One file at its destination.

    Attributes:
        checkpoint: its tinker path.
        outcome: `copied`, `resumed` or `already present`.
    """

    checkpoint: str
    path: str
    total_bytes: int
    outcome: str


class CopyJob(TransferJob[CopiedFile]):
    """Copy weights to an ordinary directory; see `TransferJob`.

    Args:
        filesystem: the file system of the path.
        weights: the weights of its checkpoints.
        progress: is updated during the transfer.
        dest: path of the directory, or of the tar file.
        force: replace files that have other content.
        archive: copy the archives instead of their files.
        mode: permission bits of the files.
        exports: exports checkpoints that have no archive; None to fail for them.
        identities: decrypt the files that end in `.age`; None to copy them as they are.
    """

    _hint = RESUME_HINT

    def __init__(
        self,
        filesystem: FileSystem,
        weights: WeightsReader,
        progress: TransferProgress,
        dest: str,
        *,
        force: bool,
        archive: bool,
        mode: int,
        exports: TemporaryExports | None = None,
        identities: Identities | None = None,
    ) -> None:
        super().__init__(filesystem, weights, progress, exports)
        self._identities = identities
        self._dest = dest
        self._is_forced = force
        self._wants_archive = archive
        self._mode = mode
        self._is_single = False
        #: Path -> destination directory, for one pass over the checkpoints.
        self._destinations: dict[str, Destination] = {}

    def _select(self, refs: list[WeightsRef], *, is_single: bool) -> list[WeightsRef]:
        self._is_single = is_single
        return [_to_archive(ref) for ref in refs] if self._wants_archive else refs

    def _transfer(self, checkpoints: Sequence[OpenCheckpoint]) -> None:
        self._destinations = {}
        work: list[tuple[WeightsRef, list[tuple[TargetFile, Item]]]] = []
        for checkpoint in checkpoints:
            targets = [self._target(checkpoint.ref, *each) for each in checkpoint.files]
            if self._has_conflicts(targets):
                continue
            items = []
            for target in targets:
                size_bytes = target.file.size_bytes
                initial_bytes = size_bytes if target.is_complete() else target.resumable_bytes()
                items.append(Item(target.path, size_bytes, initial_bytes))
            work.append((checkpoint.ref, list(zip(targets, items, strict=True))))
        self._progress.start([item for _, pairs in work for _, item in pairs])
        for ref, pairs in work:
            for target, item in pairs:
                try:
                    outcome = self._copy(target, item)
                except (errors.ApiError, OSError) as error:
                    self._on_error(ref, item, error)
                    break
                path = item.name
                if self._identities is not None and path.endswith(SUFFIX):
                    try:
                        path = self._identities.decrypt(path, self._mode)
                    except (errors.StartupError, OSError) as error:
                        self.failures.append(Failure(path, error))
                        continue
                self.results.append(
                    CopiedFile(ref.checkpoint.tinker_path, path, item.total_bytes, outcome)
                )
            if self._is_disk_full:
                break

    def _copy(self, target: TargetFile, item: Item) -> str:
        outcome = "already present"
        if not target.is_complete():
            outcome = "resumed" if item.initial_bytes else "copied"
            self._progress.advance(item, 0)
            for size_bytes in target.copy(self._mode, BACKGROUND_CONTEXT):
                self._progress.advance(item, size_bytes)
        self._progress.finish(item)
        return outcome

    def _has_conflicts(self, targets: list[TargetFile]) -> bool:
        """Return whether files exist that must not be replaced; add their failures."""
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
            self.failures.append(Failure(targets[0].destination.path, error))
            return True
        self.failures += [Failure(path, errors.exists(path, reason)) for path in conflicts]
        return bool(conflicts)

    def _target(self, ref: WeightsRef, name: str, file: WeightsFile) -> TargetFile:
        checkpoint_name = name_encoding.encode_composite(ref.checkpoint.key)
        if ref.is_archive:
            directory, tar_name = os.path.split(self._dest)
            if not self._is_single or not tar_name or os.path.isdir(self._dest):
                directory, tar_name = self._dest, f"{checkpoint_name}.tar"
            return TargetFile(self._destination(directory), tar_name, file, "archive")
        directory = self._dest if self._is_single else os.path.join(self._dest, checkpoint_name)
        encoded = "/".join(map(name_encoding.encode, name.split("/")))
        prefix = ref.member_path
        if encoded == prefix:
            prefix = os.path.dirname(prefix)
        relative = encoded.removeprefix(f"{prefix}/") if prefix else encoded
        return TargetFile(self._destination(directory), relative, file, name)

    def _destination(self, path: str) -> Destination:
        return self._destinations.setdefault(path, Destination(path))


def _to_archive(ref: WeightsRef) -> WeightsRef:
    """Return the reference to the archive of a whole checkpoint.

    Raises:
        StartupError: the reference selects only some files of the checkpoint.
    """
    if ref.member_path:
        raise errors.StartupError(
            f"--archive needs a whole checkpoint, not {ref.directory}/{ref.member_path}"
        )
    return replace(ref, is_archive=True)
