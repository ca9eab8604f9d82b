"""A transfer of weights: open the files, transfer them, retry new versions once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Generic, TypeVar

from tinkerfs import errors
from tinkerfs.concurrency import run_concurrently
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.transfer.exports import TemporaryExports
from tinkerfs.transfer.failure import Failure
from tinkerfs.transfer.progress import Item, TransferProgress
from tinkerfs.transfer.resolve import find_weights, select_members
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.weights_nodes import WeightsRef
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader

R = TypeVar("R")

#: Maximum number of concurrent requests for archives.
_MAX_ARCHIVE_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """The open files of one checkpoint.

    Attributes:
        files: pairs of name and file; the name of an archive is empty.
    """

    ref: WeightsRef
    files: tuple[tuple[str, WeightsFile], ...]


class TransferJob(ABC, Generic[R]):
    """One transfer of some checkpoints, on a worker thread.

    A checkpoint that was saved again meanwhile has a new version; it is transferred once more.

    Attributes:
        results: a value for each transferred file.
        failures: what could not be transferred.

    Args:
        exports: exports checkpoints that have no archive; None to fail for them.
    """

    #: Whether to request the archive if the file list is cached but a file is not.
    _requests_archives: ClassVar[bool] = False

    #: Hint for files that could not be transferred.
    _hint: ClassVar[str] = ""

    def __init__(
        self,
        filesystem: FileSystem,
        weights: WeightsReader,
        progress: TransferProgress,
        exports: TemporaryExports | None = None,
    ) -> None:
        self.results: list[R] = []
        self.failures: list[Failure] = []
        self._filesystem = filesystem
        self._weights = weights
        self._progress = progress
        self._exports = exports
        self._changed: list[WeightsRef] = []
        self._is_retry = False
        self._is_disk_full = False

    def run(self, paths: Mapping[str, str]) -> None:
        """Transfer all weights below some paths.

        Args:
            paths: name to display -> path from the root of the tree.
        """
        refs, is_single = find_weights(self._filesystem, paths, self.failures)
        self._open_and_transfer(self._select(refs, is_single=is_single))
        if self._changed:
            changed, self._changed, self._is_retry = self._changed, [], True
            self._open_and_transfer(changed)
        if self._exports is not None and not self.failures:
            self._exports.delete_all()

    def _select(self, refs: list[WeightsRef], *, is_single: bool) -> list[WeightsRef]:
        """Return the references to transfer.

        With `is_single`, the path is that of one checkpoint, archive or file.
        """
        del is_single
        return refs

    @abstractmethod
    def _transfer(self, checkpoints: Sequence[OpenCheckpoint]) -> None:
        """Transfer open checkpoints; add to `results`, and report errors to `_on_error`."""

    def _on_error(self, ref: WeightsRef, item: Item, error: Exception) -> None:
        """Record that a file was not transferred, or that its checkpoint has a new version."""
        if isinstance(error, OSError) and errors.is_stale(error) and not self._is_retry:
            if ref not in self._changed:
                self._changed.append(ref)
            return
        self._is_disk_full |= isinstance(error, OSError) and errors.is_no_space(error)
        self.failures.append(Failure(item.name, error, self._hint))

    def _open_and_transfer(self, refs: list[WeightsRef]) -> None:
        """Open checkpoints concurrently, wait for archive builds, and transfer them."""
        with ExitStack() as stack:
            tasks = [partial(self._open, ref, stack) for ref in refs]
            futures = run_concurrently(tasks, _MAX_ARCHIVE_REQUESTS, "open")
            checkpoints = []
            for ref, future in zip(refs, futures, strict=True):
                error = future.exception()
                if error is None:
                    checkpoints.append(future.result())
                else:
                    assert isinstance(error, Exception)
                    self.failures.append(Failure(ref.label, error))
            self._transfer(checkpoints)

    def _open(self, ref: WeightsRef, stack: ExitStack) -> OpenCheckpoint:
        """Open the files of a checkpoint; export it first if that is permitted and needed."""
        try:
            return self._open_files(ref, stack)
        except errors.NotExported:
            if self._exports is None or ref.checkpoint.kind != "weights":
                raise
        self._exports.export(ref)
        return self._open_files(ref, stack)

    def _open_files(self, ref: WeightsRef, stack: ExitStack) -> OpenCheckpoint:
        version, context = ref.version, BACKGROUND_CONTEXT
        if ref.is_archive:
            names = [""]
            files = [stack.enter_context(self._weights.open_archive(version, context))]
        else:
            source = ref.files(self._weights)
            names = select_members(ref, source.files(version, context))
            files = [stack.enter_context(source.open(version, name, context)) for name in names]
        if self._requests_archives or self._exports is not None:
            missing = next((file for file in files if file.cached_bytes() < file.size_bytes), None)
            if missing is not None:
                missing.prepare(context)
        return OpenCheckpoint(ref, tuple(zip(names, files, strict=True)))
