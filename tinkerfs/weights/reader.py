"""Read the weights of checkpoints: list and open members, describe tensors.

The filesystem tree and the commands use it for everything below `files/`, `archive.tar` and
`tensors.json`. Nothing is downloaded before a read needs it. Indexes, versions and blocks are
cached on disk, so a later mount lists a checkpoint without a request. Requests run on other
threads. The calling thread itself waits for an archive build, so that the build counts against
the rate limit of its process group and the wait can be interrupted. Thread-safe.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

import msgspec

from tinkerfs import errors
from tinkerfs.cache.blocks import Blocks
from tinkerfs.cache.memory_limit import DEFAULT_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.adapters import AdapterCache, AdapterSource, find_stored_files
from tinkerfs.weights.archive_index import PROBE_BYTES, Index, block_key, find_member
from tinkerfs.weights.base_models import BaseModels
from tinkerfs.weights.blob_proxy import BlobProxy
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.exports import Exports
from tinkerfs.weights.file import MemberFile, WeightsFile
from tinkerfs.weights.index_cache import IndexCache
from tinkerfs.weights.joined_file import JoinedFile, JoinedPart
from tinkerfs.weights.origins import Origin, Origins, StoredFile
from tinkerfs.weights.probe import read_range
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.remote_file_pool import RemoteFilePool
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, tensors_json
from tinkerfs.weights.tar_index import Member, Segment
from tinkerfs.weights.tar_layout import tar_layout
from tinkerfs.weights.traces import Traces
from tinkerfs.weights.transfer_monitor import TransferMonitor
from tinkerfs.weights.url_cache import SignedUrlCache
from tinkerfs.weights.version import Version
from tinkerfs.weights.virtual_file import Layout, VirtualFile

T = TypeVar("T")

#: Time for transfers to store a partly downloaded block when the reader is closed, seconds.
STOPPING_S = 0.3

#: Namespaces of the metadata store. The number is the version of the stored format.
_VERSIONS, _TENSORS = "weights version 1", "weights tensors 1"


@dataclass(frozen=True, slots=True)
class MemberListing:
    """The content of `files/`: members by name, and a line per skipped member."""

    members: dict[str, Member]
    skipped: tuple[str, ...]


class WeightsReader:
    """Read the weights of all checkpoints. Thread-safe; a context manager.

    Args:
        exports: knows the exports of checkpoints without an archive. A new export invalidates
            what is cached of its checkpoint, because its files may have other names.
        store: caches indexes and versions across mounts.
        cache: caches blocks across mounts.
        telemetry: records skipped members and counts cache hits.
        timeout_s: how long a transfer may make no progress, seconds.
        url_age_s: maximum age of a signed URL that revalidates a trace, or a checkpoint without a
            time, seconds.
        memory_bytes: memory bound for the blocks of all open files together.
        base_models: what is known of base models, for adapters; None for the models of the service.
        moe_layout: layout of the experts of adapters, "peft" or "packed".
        blob_proxy: the caching proxy of the site; None if there is none.

    Attributes:
        adapters: the converted adapters, for `AdapterFiles`.
        traces: the traces of sessions, which share the caches and connections of weights.
    """

    def __init__(
        self,
        url_cache: SignedUrlCache,
        exports: Exports,
        store: MetadataStore,
        cache: Blocks,
        telemetry: Telemetry,
        *,
        timeout_s: float,
        url_age_s: float = 0.0,
        memory_bytes: int = DEFAULT_BYTES,
        base_models: BaseModels | None = None,
        moe_layout: str = "peft",
        blob_proxy: BlobProxy | None = None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._telemetry = telemetry
        self._url_age_s = url_age_s
        monitor = TransferMonitor(telemetry, timeout_s)
        self._origins = Origins(
            url_cache, exports, cache, monitor, on_stale=self.invalidate, blob_proxy=blob_proxy
        )
        exports.on_exported = self.invalidate
        self._indexes = IndexCache(store, cache, timeout_s)
        self.adapters = AdapterCache(store)
        self.base_models = base_models or BaseModels(None)
        self.moe_layout = moe_layout
        self.memory = BlockMemoryPool(memory_bytes)
        self._files = RemoteFilePool(cache, self.memory, telemetry, timeout_s=timeout_s)
        telemetry.add_gauge("blocks_in_flight", self._files.blocks_in_flight)
        self.traces = Traces(
            url_cache, self._origins.connect, self._files, store, telemetry, url_age_s=url_age_s
        )

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the reader."""
        self.close()

    def close(self) -> None:
        """Close all connections. Reads in progress fail; what they received is cached."""
        self._origins.stop()
        deadline = time.monotonic() + STOPPING_S
        while not self._files.is_idle():
            if time.monotonic() >= deadline:
                break
            time.sleep(0.01)
        self._origins.close()

    def cached_files(self, checkpoint: CheckpointVersion) -> MemberListing | None:
        """Return the members if the index is cached; send no request."""
        index = self._indexes.cached(checkpoint.cache_key)
        return None if index is None else _listing(index)

    def files(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, *, is_open: bool = True
    ) -> MemberListing:
        """Return the members of a checkpoint; wait until its archive is built.

        With `is_open`, cached members are revalidated first.

        Raises:
            ApiError: the request fails.
            OSError: EIO if the archive is corrupt; see also `SignedUrlCache.url`.
        """
        if is_open:
            self._revalidate(checkpoint, ctx)
        return _listing(self._index(checkpoint, ctx))

    def open(
        self,
        checkpoint: CheckpointVersion,
        name: str,
        ctx: RequestContext,
        layout: Layout | None = None,
    ) -> WeightsFile:
        """Open a member by its name in `MemberListing.members`, or a layout over its bytes.

        Raises:
            ApiError, OSError: as `files`; ENOENT if the member does not exist.
        """
        self._revalidate(checkpoint, ctx, name)
        return self._open_member(checkpoint, self._index(checkpoint, ctx), name, layout)

    def _open_member(
        self, checkpoint: CheckpointVersion, index: Index, name: str, layout: Layout | None = None
    ) -> MemberFile:
        member = find_member(index, name, checkpoint.path)
        stored = self._origins.of(checkpoint, index).stored_file(index, name)
        file = self._acquire(checkpoint, stored)
        return MemberFile(file, member) if layout is None else VirtualFile(file, member, layout)

    def archive_bytes(self, checkpoint: CheckpointVersion) -> int | None:
        """Return the length of the archive if it is cached; send no request."""
        index = self._indexes.cached(checkpoint.cache_key)
        if index is not None and index.form == "files":
            return tar_layout(index.members).extents.size_bytes
        version = self._cached_version(checkpoint)
        return None if version is None else version.size_bytes

    def open_archive(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> WeightsFile:
        """Open the archive: as the store has it, otherwise a tar of the separate files.

        Raises:
            ApiError, OSError: as `files`.
        """
        self._revalidate(checkpoint, ctx)
        found = self._archive_version(checkpoint, ctx)
        if isinstance(found, Index):
            return self._open_tar(checkpoint, found)
        size_bytes = found.size_bytes
        segments = (Segment(0, size_bytes, 0),) if size_bytes else ()
        member = Member("", size_bytes, checkpoint.mtime_ns, segments)
        index = self._indexes.cached(checkpoint.cache_key)
        stored = self._origins.archive_of(checkpoint).whole(found, index)
        return MemberFile(self._acquire(checkpoint, stored), member)

    def _archive_version(
        self, checkpoint: CheckpointVersion, ctx: RequestContext
    ) -> Version | Index:
        """Return the version of the archive, or the index of separate files without one."""
        version = self._cached_version(checkpoint)
        if version is not None:
            return version
        index, origin = self._indexes.cached(checkpoint.cache_key), None
        if index is None and not checkpoint.is_external:
            try:
                load = self._origins.archive_of(checkpoint).version_loader(ctx)
            except errors.UnsupportedEndpoint as refusal:
                origin = self._origins.export_of(checkpoint, refusal)
            else:
                version = _run_and_wait(ctx, load, f"size of {checkpoint.path}")
                self._store.put(_VERSIONS, checkpoint.cache_key, msgspec.json.encode(version))
                return version
        index = self._index(checkpoint, ctx, origin)
        return index if index.form == "files" else index.version

    def _open_tar(self, checkpoint: CheckpointVersion, index: Index) -> WeightsFile:
        origin = self._origins.of(checkpoint, index)
        parts = []
        for member in index.members:
            stored = origin.stored_file(index, member.name)
            key = block_key(checkpoint.cache_key, stored.version, stored.kind)
            work = partial(self._open_member, checkpoint, index, member.name)
            parts.append(JoinedPart(key, member.size_bytes, work))
        return JoinedFile(parts, tar_layout(index.members), checkpoint.mtime_ns)

    def archive_url(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> str:
        """Return a valid signed URL of the archive; wait until the archive is built.

        Raises:
            ApiError: the request fails.
            OSError: see `SignedUrlCache.url`.
        """
        archive = self._origins.archive_of(checkpoint)
        if not checkpoint.has_time:
            archive.expire_urls(self._url_age_s)
        return archive.url(ctx).url

    def cached_archive_url(self, checkpoint: CheckpointVersion) -> str | None:
        """Return a valid cached URL of the archive, None if absent; send no request."""
        cached = self._origins.archive_of(checkpoint).cached_url()
        return None if cached is None else cached.url

    def drop_urls(self) -> None:
        """Drop all signed URLs; archive builds in progress continue."""
        self._origins.url_cache.clear()

    def cached_tensors(self, checkpoint: CheckpointVersion) -> bytes | None:
        """Return `tensors.json` if it is cached; send no request."""
        return self._store.get(_TENSORS, checkpoint.cache_key)

    def tensors(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> bytes:
        """Return `tensors.json`: the tensors of all safetensors files, sorted by name.

        Sends at most two range requests per file, in addition to those of `files`.

        Raises:
            ApiError, OSError: as `files`; EIO if a header is corrupt or too large.
        """
        self._revalidate(checkpoint, ctx)
        cached = self.cached_tensors(checkpoint)
        if cached is not None:
            return cached
        index = self._index(checkpoint, ctx)
        members = [each for each in index.members if each.name.endswith(".safetensors")]
        headers: dict[str, tuple[bytes, int]] = {}
        try:
            for member in members:
                header = self._header(checkpoint, index, member, ctx)
                headers[member.name] = (header, member.size_bytes)
            document = tensors_json(headers)
        except ValueError as error:
            raise errors.corrupt(checkpoint.path, str(error)) from None
        self._store.put(_TENSORS, checkpoint.cache_key, document)
        return document

    def cached_bytes(
        self, checkpoint: CheckpointVersion, name: str, layout: Layout | None = None
    ) -> int:
        """Return how many bytes of a member are on disk, 0 if the index is not cached."""
        index = self._indexes.cached(checkpoint.cache_key)
        if index is None:
            return 0
        with self._open_member(checkpoint, index, name, layout) as file:
            return file.cached_bytes()

    def adapter_source(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> AdapterSource:
        """Return what the adapter of a checkpoint is converted from.

        Sends at most three range requests, in addition to those of `files`.

        Raises:
            ApiError, OSError: as `files`; EIO if the header is corrupt or too large.
            ConversionError: a file is missing.
        """
        index = self._index(checkpoint, ctx)
        model, config = find_stored_files({each.name: each for each in index.members})
        try:
            header = self._header(checkpoint, index, model, ctx)
        except ValueError as error:
            raise errors.corrupt(checkpoint.path, str(error)) from None
        with self._open_member(checkpoint, index, config.name) as file:
            data = self._read_range(checkpoint, index, config, file, 0, config.size_bytes, ctx)
        return AdapterSource(header, model.size_bytes, data)

    def usage_bytes(self) -> int:
        """Return the disk usage of the whole block cache.

        Raises:
            OSError: the cache directory cannot be read.
        """
        return self._cache.usage_bytes()

    def free_bytes(self) -> int:
        """Return the free space on the disk of the block cache.

        Raises:
            OSError: the cache directory cannot be read.
        """
        return self._cache.free_bytes()

    def invalidate(self, checkpoint: CheckpointVersion) -> None:
        """Drop the cached index, version and tensors, because the weights have changed."""
        self._indexes.drop(checkpoint.cache_key, checkpoint.about)
        self.adapters.drop(checkpoint.cache_key)
        for namespace in (_VERSIONS, _TENSORS):
            self._store.delete(namespace, checkpoint.cache_key)

    def _revalidate(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, name: str = ""
    ) -> None:
        """Invalidate cached weights without a time if the store has another version.

        If the store cannot be reached, the cached version stays valid. Weights with a time need no
        request, because another version has another cache key. `name` is a file of external
        weights; empty for all files.

        Raises:
            ApiError: NotFound if the server no longer has the weights.
            OSError: EINTR if the caller was interrupted.
        """
        if checkpoint.has_time or self._indexes.is_loading(checkpoint.cache_key):
            return
        index = self._indexes.cached(checkpoint.cache_key)
        self._origins.of(checkpoint, index).expire_urls(self._url_age_s)
        try:
            if not self._is_current(checkpoint, ctx, name):
                self.invalidate(checkpoint)
        except errors.NotFound:
            self.invalidate(checkpoint)
            raise
        except errors.ApiError:
            pass
        except OSError as error:
            if errors.is_interruption(error):
                raise

    def _is_current(self, checkpoint: CheckpointVersion, ctx: RequestContext, name: str) -> bool:
        """Return whether the store has the cached version; False if no version is cached."""
        index = self._indexes.cached(checkpoint.cache_key)
        if index is not None and index.form == "files":
            version = index.versions.get(name)  # None for all files: they are indexed again
        else:
            version, name = self._cached_version(checkpoint), ""
        if version is None:
            return False
        check = self._origins.of(checkpoint, index).version_check(version, name, ctx)
        return _run_and_wait(ctx, check, f"version of {name}")

    def _index(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, origin: Origin | None = None
    ) -> Index:
        """Return the index, loaded from `origin` unless it is cached; None for the preferred."""

        def prepare() -> Callable[[], Index]:
            load = (origin or self._origins.of(checkpoint, None)).index_loader(ctx)

            def load_and_report() -> Index:
                index = load()
                for line in index.skipped:
                    error = errors.corrupt(checkpoint.path, f"left out: {line}")
                    self._telemetry.record_error(checkpoint.path, "index", error)
                return index

            return load_and_report

        name = f"index of {checkpoint.path}"
        return self._indexes.get(checkpoint.cache_key, prepare, name, ctx, checkpoint.about)

    def _acquire(self, checkpoint: CheckpointVersion, stored: StoredFile) -> RemoteFile:
        return self._files.acquire(checkpoint.cache_key, checkpoint.path, checkpoint.about, stored)

    def _cached_version(self, checkpoint: CheckpointVersion) -> Version | None:
        index = self._indexes.cached(checkpoint.cache_key)
        if index is not None:
            return None if index.form == "files" else index.version
        raw = self._store.get(_VERSIONS, checkpoint.cache_key)
        try:
            return None if raw is None else msgspec.json.decode(raw, type=Version)
        except msgspec.MsgspecError:
            return None

    def _header(
        self, checkpoint: CheckpointVersion, index: Index, member: Member, ctx: RequestContext
    ) -> bytes:
        """Return the header of a safetensors file, without its length prefix.

        Raises:
            ValueError: the file is not a safetensors file.
        """
        with self._open_member(checkpoint, index, member.name) as file:
            first_bytes = min(PROBE_BYTES, member.size_bytes)
            start = self._read_range(checkpoint, index, member, file, 0, first_bytes, ctx)
            stop = LENGTH_BYTES + header_length(start[:LENGTH_BYTES], member.size_bytes)
            if stop > len(start):
                start += self._read_range(checkpoint, index, member, file, len(start), stop, ctx)
        return start[LENGTH_BYTES:stop]

    def _read_range(
        self,
        checkpoint: CheckpointVersion,
        index: Index,
        member: Member,
        file: MemberFile,
        start: int,
        stop: int,
        ctx: RequestContext,
    ) -> bytes:
        """Return [start, stop) of a member: from the cache, by one request, or by blocks."""
        found = file.peek(start, stop)
        source = self._origins.of(checkpoint, index).stored_file(index, member.name).source
        if found is None and isinstance(source, RangeSource) and len(member.segments) == 1:
            source.prepare(ctx)
            archive_offset = member.segments[0].archive_offset
            work = partial(read_range, source, archive_offset + start, archive_offset + stop)
            found = _run_and_wait(ctx, work, f"header of {checkpoint.path}")
        return file.read(stop - start, start, ctx) if found is None else found


def _run_and_wait(ctx: RequestContext, work: Callable[[], T], name: str) -> T:
    """Run `work`, which has its own timeout, on another thread; return its result."""
    return ctx.wait_for(run_in_thread(work, name))


def _listing(index: Index) -> MemberListing:
    return MemberListing({member.name: member for member in index.members}, index.skipped)
