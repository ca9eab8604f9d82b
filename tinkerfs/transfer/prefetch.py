"""Download weights into the block cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.errors import StartupError
from tinkerfs.formatting import format_size
from tinkerfs.transfer.exports import TemporaryExports
from tinkerfs.transfer.failure import Failure
from tinkerfs.transfer.job import OpenCheckpoint, TransferJob
from tinkerfs.transfer.progress import Item, TransferProgress
from tinkerfs.transfer.resolve import find_weights, select_members
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.weights_nodes import WeightsRef
from tinkerfs.weights import prefetch as blocks
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.reader import WeightsReader


@dataclass(frozen=True, slots=True)
class PrefetchedFile:
    """What is cached of one file.

    Attributes:
        file: path within the directory of the checkpoint, or within the tree if it begins with
            `adapters/`.
        total_bytes: length of the file; None if it is unknown.
    """

    checkpoint: str
    file: str
    cached_bytes: int
    total_bytes: int | None

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are cached."""
        return self.cached_bytes == self.total_bytes


class PrefetchJob(TransferJob[PrefetchedFile]):
    """Download weights into the block cache; see `TransferJob`.

    Args:
        filesystem: the file system of the paths.
        weights: the weights of its checkpoints.
        progress: is updated during the transfer.
        max_cache_bytes: maximum size of the cache.
        exports: exports checkpoints that have no archive; None to fail for them.
    """

    _requests_archives = True

    def __init__(
        self,
        filesystem: FileSystem,
        weights: WeightsReader,
        progress: TransferProgress,
        max_cache_bytes: int,
        exports: TemporaryExports | None = None,
    ) -> None:
        super().__init__(filesystem, weights, progress, exports)
        self._max_cache_bytes = max_cache_bytes

    def check(self, paths: Mapping[str, str]) -> None:
        """Find out what is cached, without a request to the store or for an archive."""
        refs, _ = find_weights(self._filesystem, paths, self.failures)
        for ref in refs:
            try:
                self._check(ref)
            except OSError as error:
                self.failures.append(Failure(ref.label, error))

    def _check(self, ref: WeightsRef) -> None:
        version, context = ref.version, BACKGROUND_CONTEXT
        if ref.is_archive:
            if self._weights.archive_bytes(version) is None:
                self._add_result(ref, "", None)
                return
            with self._weights.open_archive(version, context) as file:
                self._add_result(ref, "", file)
            return
        source = ref.files(self._weights)
        listing = source.cached_files(version)
        if listing is None:
            self._add_result(ref, ref.member_path, None)
            return
        for name in select_members(ref, listing):
            with source.open(version, name, context) as file:
                self._add_result(ref, name, file)

    def _add_result(self, ref: WeightsRef, name: str, file: WeightsFile | None) -> None:
        shown = "archive.tar" if ref.is_archive else f"{ref.directory}/{name}"
        cached_bytes = file.cached_bytes() if file else 0
        total_bytes = file.size_bytes if file else None
        tinker_path = ref.checkpoint.tinker_path
        self.results.append(PrefetchedFile(tinker_path, shown, cached_bytes, total_bytes))

    def _transfer(self, checkpoints: Sequence[OpenCheckpoint]) -> None:
        entries = [(each.ref, name, file) for each in checkpoints for name, file in each.files]
        files = [file for _, _, file in entries]
        self._require_cache_size(files)
        items = [
            Item(
                f"{ref.label}/{name}".rstrip("/"),
                file.size_bytes,
                file.cached_bytes(),
            )
            for ref, name, file in entries
        ]
        self._progress.start(items)
        for item in items:
            if item.is_complete:
                self._progress.finish(item)
        for result in blocks.prefetch(files, BACKGROUND_CONTEXT):
            item, error = items[result.number], result.error
            self._progress.advance(item, result.size_bytes)
            if error is not None:
                self._on_error(entries[result.number][0], item, error)
            elif item.is_complete:
                self._progress.finish(item)
            if self._is_disk_full:
                break
        for ref, name, file in entries:
            if ref not in self._changed:
                self._add_result(ref, name, file)

    def _require_cache_size(self, files: Sequence[WeightsFile]) -> None:
        """Fail if the files exceed the cache: the last would evict the first.

        Raises:
            StartupError: the cache is off, or its maximum size is too small.
        """
        required_bytes = blocks.required_cache_bytes(files)
        if not self._max_cache_bytes:
            raise StartupError(
                "the disk cache is off, so nothing can be prefetched (hint: set --cache-dir to a"
                " writable directory, and --cache-size above 0)"
            )
        if required_bytes > self._max_cache_bytes:
            raise StartupError(
                f"the weights need {format_size(required_bytes)}, but the cache holds at most"
                f" {format_size(self._max_cache_bytes)} (hint: name fewer paths, or raise"
                " --cache-size)"
            )
