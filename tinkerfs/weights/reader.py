"""Read the weights of checkpoints: list and open members, describe tensors.

The filesystem tree and the commands use it for everything below `files/`, `archive.tar` and
`tensors.json`. Nothing is downloaded before a read needs it. Indexes, versions and blocks are
cached on disk, so a later mount lists a checkpoint without a request. Requests run on other
threads. The calling thread itself waits for an archive build, so that the build counts against
the rate limit of its process group and the wait can be interrupted. Thread-safe.
"""

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

import msgspec

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.archive_index import (
    PROBE_BYTES,
    Index,
    archive_index,
    block_key,
    decode_index,
    encode_index,
    external_index,
    find_member,
)
from tinkerfs.weights.block_source import BlockSource
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.connections import ObjectStoreClient
from tinkerfs.weights.etags import Sample
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.gzip_stream import GzipSource
from tinkerfs.weights.probe import has_version, read_archive_version, read_range
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, tensors_json
from tinkerfs.weights.tar_index import Member, Segment
from tinkerfs.weights.url_cache import SignedUrlCache, UrlProvider
from tinkerfs.weights.version import Version

T = TypeVar("T")

#: Memory bound for the blocks of all open files together.
MEMORY_BYTES = 256 << 20

#: Time for transfers to store a partly downloaded block when the reader is closed, seconds.
STOPPING_S = 0.3

#: Maximum number of indexes in memory. An index of 1,000 members takes 0.3 MB.
MAX_INDEXES = 64

#: Namespaces of the metadata store. The number is the version of the stored format.
_INDEXES, _VERSIONS, _TENSORS = "weights index 2", "weights version 1", "weights tensors 1"


@dataclass(frozen=True, slots=True)
class MemberListing:
    """The content of `files/`: members by name, and a line per skipped member."""

    members: dict[str, Member]
    skipped: tuple[str, ...]


class WeightsReader:
    """Read the weights of all checkpoints. Thread-safe; a context manager.

    Args:
        store: caches indexes and versions across mounts.
        cache: caches blocks across mounts.
        telemetry: records skipped members and counts cache hits.
        timeout_s: how long a transfer may make no progress, seconds.
        url_age_s: maximum age of a signed URL that revalidates an undated checkpoint, seconds.
        memory_bytes: memory bound for the blocks of all open files together.
    """

    def __init__(
        self,
        url_cache: SignedUrlCache,
        store: MetadataStore,
        cache: BlockCache,
        telemetry: Telemetry,
        *,
        timeout_s: float,
        url_age_s: float = 0.0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._url_cache = url_cache
        self._store = store
        self._cache = cache
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._url_age_s = url_age_s
        self._client = ObjectStoreClient(telemetry, timeout_s=timeout_s)
        self.memory = BlockMemoryPool(memory_bytes)
        self._lock = threading.RLock()  # reentrant: a future that is already done runs its callback
        # All guarded by _lock.
        self._indexes: OrderedDict[str, Future[Index]] = OrderedDict()
        self._files: weakref.WeakValueDictionary[str, RemoteFile] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close all connections. Reads in progress fail; what they received is cached."""
        self._client.stop()
        deadline = time.monotonic() + STOPPING_S
        while any(not file.is_idle() for file in list(self._files.values())):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.01)
        self._client.close()

    def cached_files(self, checkpoint: CheckpointVersion) -> MemberListing | None:
        """Return the members if the index is cached; send no request."""
        index = self._cached_index(checkpoint)
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

    def open(self, checkpoint: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        """Open a member by its name in `MemberListing.members`.

        Raises:
            ApiError, OSError: as `files`; ENOENT if the member does not exist.
        """
        self._revalidate(checkpoint, ctx, name)
        return self._open(checkpoint, name, ctx)

    def _open(self, checkpoint: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        index = self._index(checkpoint, ctx)
        member = find_member(index, name, checkpoint.path)
        return WeightsFile(self._remote_file(checkpoint, index, name), member)

    def archive_bytes(self, checkpoint: CheckpointVersion) -> int | None:
        """Return the length of the archive if it is cached; send no request."""
        version = self._cached_version(checkpoint)
        return None if version is None else version.size_bytes

    def open_archive(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> WeightsFile:
        """Open the archive itself, with the bytes that the store has.

        Raises:
            ApiError, OSError: as `files`.
        """
        self._revalidate(checkpoint, ctx)
        version = self._cached_version(checkpoint)
        if version is None:
            url_provider = self._url_provider(checkpoint)
            url_provider.url(ctx)
            version = _run_and_wait(
                ctx,
                lambda: read_archive_version(self._client, url_provider),
                f"size of {checkpoint.path}",
            )
            self._store.put(_VERSIONS, checkpoint.cache_key, msgspec.json.encode(version))
        size_bytes = version.size_bytes
        segments = (Segment(0, size_bytes, 0),) if size_bytes else ()
        member = Member("", size_bytes, checkpoint.mtime_ns, segments)
        index = self._cached_index(checkpoint)
        digests = index.digests if index is not None and index.form == "tar" else ()
        sample = None if index is None else index.sample
        source = self._source(checkpoint, version, sample=sample)
        file = self._shared_file(checkpoint, version, "archive", size_bytes, source, digests)
        return WeightsFile(file, member)

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

    def cached_bytes(self, checkpoint: CheckpointVersion, name: str) -> int:
        """Return how many bytes of a member are on disk, 0 if the index is not cached."""
        index = self._cached_index(checkpoint)
        if index is None:
            return 0
        member = find_member(index, name, checkpoint.path)
        with WeightsFile(self._remote_file(checkpoint, index, name), member) as file:
            return file.cached_bytes()

    def usage_bytes(self) -> int:
        """Return the disk usage of the whole block cache.

        Raises:
            OSError: the cache directory cannot be read.
        """
        return self._cache.usage_bytes()

    def invalidate(self, checkpoint: CheckpointVersion) -> None:
        """Drop the cached index, version and tensors, because the weights have changed."""
        with self._lock:
            self._indexes.pop(checkpoint.cache_key, None)
        for namespace in (_INDEXES, _VERSIONS, _TENSORS):
            self._store.delete(namespace, checkpoint.cache_key)

    def _revalidate(
        self, checkpoint: CheckpointVersion, ctx: RequestContext, name: str = ""
    ) -> None:
        """Invalidate cached undated weights if the store has another version.

        If the store cannot be reached, the cached version stays valid. Dated weights need no
        request, because another version has another cache key. `name` is a file of external
        weights; empty for all files.

        Raises:
            ApiError: NotFound if the server no longer has the weights.
            OSError: EINTR if the caller was interrupted.
        """
        if checkpoint.is_dated or self._is_loading(checkpoint):
            return
        self._url_cache.expire(checkpoint.key, self._url_age_s, is_external=checkpoint.is_external)
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

    def _is_loading(self, checkpoint: CheckpointVersion) -> bool:
        with self._lock:
            future = self._indexes.get(checkpoint.cache_key)
        return future is not None and not future.done()

    def _is_current(self, checkpoint: CheckpointVersion, ctx: RequestContext, name: str) -> bool:
        """Return whether the store has the cached version; False if no version is cached."""
        index = self._cached_index(checkpoint)
        if index is not None and index.form == "files":
            version = index.versions.get(name)  # None for all files: they are indexed again
        else:
            version, name = self._cached_version(checkpoint), ""
        if version is None:
            return False
        url_provider = self._url_provider(checkpoint, name)
        url_provider.url(ctx)
        return _run_and_wait(
            ctx, lambda: has_version(self._client, url_provider, version), f"version of {name}"
        )

    # Indexes

    def _cached_index(self, checkpoint: CheckpointVersion) -> Index | None:
        cache_key = checkpoint.cache_key
        if self._url_cache.pop_changed(checkpoint.key):
            self.invalidate(checkpoint)
        with self._lock:
            future = self._indexes.get(cache_key)
            if future is not None:
                self._indexes.move_to_end(cache_key)
                return future.result() if future.done() and not future.exception() else None
        raw = self._store.get(_INDEXES, cache_key)
        if raw is None:
            return None
        try:
            index = decode_index(raw)
        except ValueError:
            return None
        future = Future[Index]()
        future.set_result(index)
        with self._lock:
            self._store_index(cache_key, future)
        return index

    def _store_index(self, cache_key: str, future: "Future[Index]") -> None:
        self._indexes[cache_key] = future
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)

    def _index(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> Index:
        cached = self._cached_index(checkpoint)
        if cached is not None:
            return cached
        cache_key = checkpoint.cache_key
        with self._lock:
            future = self._indexes.get(cache_key)
        if future is None:
            load = self._loader(checkpoint, ctx)
            with self._lock:
                future = self._indexes.get(cache_key)
                if future is None:
                    future = run_in_thread(load, f"index of {checkpoint.path}")
                    self._store_index(cache_key, future)
                    future.add_done_callback(lambda done: self._on_index_done(cache_key, done))
        return ctx.wait_for(future)

    def _on_index_done(self, cache_key: str, future: "Future[Index]") -> None:
        """Drop a failed load, so that the next caller retries."""
        if future.exception() is not None:
            with self._lock:
                if self._indexes.get(cache_key) is future:
                    del self._indexes[cache_key]

    def _loader(self, checkpoint: CheckpointVersion, ctx: RequestContext) -> Callable[[], Index]:
        """Get a URL on the calling thread; return the function that loads the index."""
        url_provider = self._url_provider(checkpoint)
        if checkpoint.is_external:
            names = tuple(
                self._url_cache.external_urls(checkpoint.key, checkpoint.ref, checkpoint.path, ctx)
            )
        else:
            names = ()
            url_provider.url(ctx)

        def load() -> Index:
            if checkpoint.is_external:
                index = external_index(
                    self._client,
                    names,
                    lambda name: self._url_provider(checkpoint, name),
                    checkpoint.mtime_ns,
                )
            else:
                index = archive_index(
                    self._client, url_provider, self._cache, checkpoint.cache_key, checkpoint.about
                )
            for line in index.skipped:
                error = errors.corrupt(checkpoint.path, f"left out: {line}")
                self._telemetry.record_error(checkpoint.path, "index", error)
            self._store.put(_INDEXES, checkpoint.cache_key, encode_index(index))
            return index

        return load

    # Files

    def _url_provider(self, checkpoint: CheckpointVersion, name: str = "") -> UrlProvider:
        return UrlProvider(self._url_cache, checkpoint.key, checkpoint.ref, checkpoint.path, name)

    def _source(
        self,
        checkpoint: CheckpointVersion,
        version: Version,
        name: str = "",
        sample: Sample | None = None,
    ) -> RangeSource:
        url_provider = self._url_provider(checkpoint, name)
        # Only the length of a file of external weights is derived from its content.
        return RangeSource(self._client, url_provider, version, sample, is_plain=bool(name))

    def _remote_file(self, checkpoint: CheckpointVersion, index: Index, name: str) -> RemoteFile:
        """Return the acquired file that holds the bytes of a member."""
        if index.form == "files":
            version = index.versions[name]
            source = self._source(checkpoint, version, name)
            return self._shared_file(checkpoint, version, f"/{name}", version.size_bytes, source)
        version, uncompressed_bytes = index.version, index.uncompressed_bytes
        source = self._source(checkpoint, version, sample=index.sample)
        if index.form == "tar":
            digests = index.digests
            return self._shared_file(
                checkpoint, version, "archive", uncompressed_bytes, source, digests
            )
        gzip_source = GzipSource(source, version.size_bytes, uncompressed_bytes, checkpoint.path)
        return self._shared_file(
            checkpoint, version, "unpacked", uncompressed_bytes, gzip_source, index.digests
        )

    def _shared_file(
        self,
        checkpoint: CheckpointVersion,
        version: Version,
        kind: str,
        size_bytes: int,
        source: BlockSource,
        digests: tuple[bytes, ...] = (),
    ) -> RemoteFile:
        """Return the acquired file of a version; all handles share it."""
        key = block_key(checkpoint.cache_key, version, kind)
        with self._lock:
            file = self._files.get(key)
            if file is not None and file.acquire():
                return file
            file = RemoteFile(
                key,
                checkpoint.path,
                size_bytes,
                source,
                self._cache.open(key, f"{checkpoint.about} {kind}", size_bytes),
                self.memory,
                self._telemetry,
                timeout_s=self._timeout_s,
                digests=digests,
            )
            file.acquire()
            self._files[key] = file
            return file

    def _cached_version(self, checkpoint: CheckpointVersion) -> Version | None:
        index = self._cached_index(checkpoint)
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
        with self._open(checkpoint, member.name, ctx) as file:
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
        file: WeightsFile,
        start: int,
        stop: int,
        ctx: RequestContext,
    ) -> bytes:
        """Return [start, stop) of a member: from the cache, by one request, or by blocks."""
        found = file.peek(start, stop)
        if found is None and index.form != "gzip" and len(member.segments) == 1:
            name, version = "", index.version
            if index.form == "files":
                name, version = member.name, index.versions[member.name]
            source = self._source(checkpoint, version, name)
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
