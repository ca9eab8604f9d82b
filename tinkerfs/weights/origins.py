"""Decide where the bytes of a checkpoint's weights come from: an archive, or external files.

An archive is one file of an object store, which the server builds on request. External weights are
separate files. All other modules read the files of a store and need not know why.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from tinkerfs import errors
from tinkerfs.api.models import SignedUrl
from tinkerfs.cache.blocks import Blocks
from tinkerfs.cache.data_layout import DataLayout, choose_layout
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.weights.archive_index import Index, archive_index, external_index
from tinkerfs.weights.blob_proxy import BlobProxy
from tinkerfs.weights.block_source import BlockSource
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.etags import Sample
from tinkerfs.weights.export_urls import ExportUrlProvider, ExportUrls, without_archive_url
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.gzip_stream import GzipSource
from tinkerfs.weights.probe import has_version, read_archive_version
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.transfer_monitor import STORE_ENDPOINT, TransferMonitor
from tinkerfs.weights.url_cache import CheckpointUrlProvider, SignedUrlCache, UrlProvider
from tinkerfs.weights.version import Version

if TYPE_CHECKING:
    from tinkerfs.weights.http import ObjectStoreClient


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One version of a file of an object store, as it is cached in blocks.

    Attributes:
        kind: distinguishes the files of a checkpoint; see `block_key`.
        size_bytes: length of the file, after decompression.
        source: downloads bytes of the file.
        layout: of its bytes in the cache.
        digests: of each block; empty if unknown.
        on_open: called with a function that returns whether the file is still open.
    """

    kind: str
    version: Version
    size_bytes: int
    source: BlockSource
    layout: DataLayout = field(default_factory=DataLayout)
    digests: tuple[bytes, ...] = ()
    on_open: Callable[[Callable[[], bool]], None] = lambda _is_open: None


class Origins:
    """Returns the origin of each checkpoint's weights. Thread-safe.

    Args:
        exports: knows the exports of checkpoints without an archive.
        cache: caches the blocks that are downloaded to index an archive.
        monitor: counts, bounds and stops all transfers.
        on_stale: called if the store has another version of a checkpoint than the expected one.
        blob_proxy: the caching proxy of the site; None if there is none.
    """

    def __init__(
        self,
        url_cache: SignedUrlCache,
        exports: Exports,
        cache: Blocks,
        monitor: TransferMonitor,
        on_stale: Callable[[CheckpointVersion], None],
        blob_proxy: BlobProxy | None = None,
    ) -> None:
        self.url_cache = url_cache
        self.exports = exports
        self.cache = cache
        self.on_stale = on_stale
        self._monitor = monitor
        self._blob_proxy = blob_proxy
        self._lock = threading.Lock()
        self._client: ObjectStoreClient | None = None  # made under _lock

    def of(self, checkpoint: CheckpointVersion, index: Index | None) -> "Origin":
        """Return where the members of a checkpoint are read from.

        Without an index the archive of a checkpoint is preferred to its export.
        """
        if checkpoint.is_external:
            return ExternalFiles(self, checkpoint)
        if index is not None and index.form == "files":
            return ExportedFiles(self, checkpoint)
        return Archive(self, checkpoint)

    def archive_of(self, checkpoint: CheckpointVersion) -> "Archive":
        """Return the archive of a checkpoint, which is requested from the server in any case."""
        return Archive(self, checkpoint)

    def export_of(
        self, checkpoint: CheckpointVersion, refusal: errors.UnsupportedEndpoint
    ) -> "ExportedFiles":
        """Return the export of a checkpoint without an archive.

        `refusal` is the response to the request for the archive.
        """
        return ExportedFiles(self, checkpoint, refusal)

    def connect(self) -> "ObjectStoreClient":
        """Return the HTTP client; import it at the first call, because that takes 0.08 s.

        Raises:
            ConnectionFailed: tinkerfs was removed or upgraded since the mount.
        """
        try:
            from tinkerfs.weights.http import ObjectStoreClient
        except (OSError, ImportError) as error:
            message = f"HTTP cannot be set up: {errors.redact(str(error))} (hint: mount again)"
            raise errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT) from None
        with self._lock:
            if self._client is None:
                self._client = ObjectStoreClient(self._monitor, self._blob_proxy)
            return self._client

    def prepare_client(self) -> None:
        """Import the HTTP client in the background, while the server returns a URL."""
        if self._client is None:
            run_in_thread(self.connect, "HTTP client of the store")  # a reader gets its error later

    def stop(self) -> None:
        """End all transfers at their next chunk with ConnectionFailed, and start no more."""
        self._monitor.stop()

    def close(self) -> None:
        """Close all connections, those in use after their transfer."""
        with self._lock:
            if self._client is not None:
                self._client.close()


class Origin(ABC):
    """Where the weights of one version of a checkpoint come from. Thread-safe."""

    #: Which URLs of `SignedUrlCache` the origin uses.
    _is_external: ClassVar[bool]

    def __init__(self, origins: Origins, checkpoint: CheckpointVersion) -> None:
        self._origins = origins
        self._checkpoint = checkpoint

    @abstractmethod
    def index_loader(self, ctx: RequestContext) -> Callable[[], Index]:
        """Get the URLs on the calling thread; return the function that loads the index.

        Raises:
            ApiError: the request fails. The returned function raises it too.
            OSError: as `SignedUrlCache.url`. The function: EIO if the archive is corrupt.
        """

    @abstractmethod
    def stored_file(self, index: Index, name: str) -> StoredFile:
        """Return the file of the store that contains a member."""

    def expire_urls(self, age_s: float) -> None:
        """Drop URLs older than `age_s`, which may lead to a previous version."""
        key = self._checkpoint.key
        self._origins.url_cache.expire(key, age_s, is_external=self._is_external)

    def version_check(self, version: Version, name: str, ctx: RequestContext) -> Callable[[], bool]:
        """Get the URL on the calling thread; return the function that requests the version.

        The function returns whether the store has `version`, and raises ApiError. `name` is a file
        of external weights; empty for an archive.

        Raises:
            ApiError, OSError: as `SignedUrlCache.url`.
        """
        url_provider = self._url_provider(name)
        url_provider.url(ctx)
        return lambda: has_version(self._origins.connect, url_provider, version)

    def _url_provider(self, name: str = "") -> UrlProvider:
        checkpoint = self._checkpoint
        return CheckpointUrlProvider(
            self._origins.url_cache, checkpoint.key, checkpoint.ref, checkpoint.path, name
        )

    def _source(
        self, version: Version, name: str = "", sample: Sample | None = None
    ) -> RangeSource:
        return RangeSource(
            self._origins.connect,
            self._url_provider(name),
            version,
            sample,
            # The index of an archive is derived from its content, and must be of the same version.
            # External files have no such index.
            is_plain=bool(name),
            on_stale=lambda: self._origins.on_stale(self._checkpoint),
        )


class Archive(Origin):
    """The archive of a checkpoint, which the server builds on request."""

    _is_external = False

    def index_loader(self, ctx: RequestContext) -> Callable[[], Index]:
        """See `Origin.index_loader`; waits until the archive is built.

        If the server has no archive, an export is indexed.

        Raises:
            ApiError: the request fails.
            OSError: EOPNOTSUPP if there is neither; see also `SignedUrlCache.url`.
        """
        checkpoint, origins, url_provider = self._checkpoint, self._origins, self._url_provider()
        origins.prepare_client()
        try:
            url_provider.url(ctx)
        except errors.UnsupportedEndpoint as refusal:
            return origins.export_of(checkpoint, refusal).index_loader(ctx)
        return lambda: archive_index(
            origins.connect, url_provider, origins.cache, checkpoint.cache_key, checkpoint.about
        )

    def stored_file(self, index: Index, name: str) -> StoredFile:
        """Return the archive, decompressed if it is a gzip archive."""
        del name
        if index.form == "tar":
            return self.whole(index.version, index)
        source = GzipSource(
            self._source(index.version, sample=index.sample),
            index.version.size_bytes,
            index.uncompressed_bytes,
            self._checkpoint.path,
        )
        return StoredFile(
            kind="unpacked",
            version=index.version,
            size_bytes=index.uncompressed_bytes,
            source=source,
            digests=index.digests,
        )

    def whole(self, version: Version, index: Index | None) -> StoredFile:
        """Return the archive with the bytes that the store has, and what an index adds."""
        tar_index = index if index is not None and index.form == "tar" else None
        return StoredFile(
            kind="archive",
            version=version,
            size_bytes=version.size_bytes,
            source=self._source(version, sample=None if index is None else index.sample),
            layout=DataLayout() if tar_index is None else choose_layout(_ranges(tar_index)),
            digests=() if tar_index is None else tar_index.digests,
        )

    def version_loader(self, ctx: RequestContext) -> Callable[[], Version]:
        """Get the URL on the calling thread; return the function that requests the version.

        Raises:
            ApiError: the request fails; UnsupportedEndpoint if the server has no archive. The
                function raises it too.
            OSError: see `SignedUrlCache.url`.
        """
        url_provider = self._url_provider()
        url_provider.url(ctx)
        return lambda: read_archive_version(self._origins.connect, url_provider)

    def url(self, ctx: RequestContext) -> SignedUrl:
        """Return a valid URL of the archive.

        Raises:
            ApiError: the request fails.
            OSError: EOPNOTSUPP if the server has no archive; see also `SignedUrlCache.url`.
        """
        try:
            return self._url_provider().url(ctx)
        except errors.UnsupportedEndpoint as refusal:
            raise without_archive_url(self._checkpoint, refusal) from refusal

    def cached_url(self) -> SignedUrl | None:
        """Return a valid cached URL of the archive, None if absent; send no request."""
        return self._origins.url_cache.cached_url(self._checkpoint.key)


class ExternalFiles(Origin):
    """The files of external weights."""

    _is_external = True

    def index_loader(self, ctx: RequestContext) -> Callable[[], Index]:
        """See `Origin.index_loader`."""
        names = tuple(self._urls(ctx))
        return lambda: external_index(
            self._origins.connect, names, self._url_provider, self._checkpoint.mtime_ns
        )

    def stored_file(self, index: Index, name: str) -> StoredFile:
        """Return the file itself."""
        version = index.versions[name]
        return StoredFile(
            kind=f"/{name}",
            version=version,
            size_bytes=version.size_bytes,
            source=self._source(version, name),
        )

    def _urls(self, ctx: RequestContext) -> Mapping[str, SignedUrl]:
        checkpoint = self._checkpoint
        return self._origins.url_cache.external_urls(
            checkpoint.key, checkpoint.ref, checkpoint.path, ctx
        )


class ExportedFiles(ExternalFiles):
    """The files of a checkpoint's export.

    They are cached as files of the checkpoint itself, so that what was read remains readable after
    the export has expired.

    Args:
        refusal: the response to the request for the checkpoint's archive, None if unknown.
    """

    def __init__(
        self,
        origins: Origins,
        checkpoint: CheckpointVersion,
        refusal: errors.UnsupportedEndpoint | None = None,
    ) -> None:
        super().__init__(origins, checkpoint)
        self._export = ExportUrls(origins.url_cache, origins.exports, checkpoint, refusal)

    def stored_file(self, index: Index, name: str) -> StoredFile:
        """Return the file itself; its export is renewed while it is open."""
        on_open = partial(self._origins.exports.renewal.add_use, self._checkpoint)
        return replace(super().stored_file(index, name), on_open=on_open)

    def expire_urls(self, age_s: float) -> None:
        """See `Origin.expire_urls`."""
        key = self._export.key()
        if key is not None:
            self._origins.url_cache.expire(key, age_s, is_external=True)

    def _url_provider(self, name: str = "") -> UrlProvider:
        return ExportUrlProvider(self._export, name)

    def _urls(self, ctx: RequestContext) -> Mapping[str, SignedUrl]:
        return self._export.get(ctx)


def _ranges(index: Index) -> Iterator[tuple[int, int]]:
    """Yield the range of each member that has one."""
    return (each.archive_range for each in index.members if each.archive_range is not None)
