"""The weights of checkpoints as files: members, positional reads, what their headers tell.

What the tree asks for bytes. Nothing is fetched before somebody reads it, and what was once found
out or fetched is kept on disk: a later mount lists a checkpoint without a call. The thread that
asks waits for work on other threads; the wait for an archive that is being built is its own, so
that its process group is held to the burst and it can give up. Thread-safe.
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
from tinkerfs.weights.connections import ObjectStoreClient
from tinkerfs.weights.etags import Sample
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.gzip_stream import GzipSource
from tinkerfs.weights.origin import BlockSource
from tinkerfs.weights.probe import has_version, read_archive_version, read_range
from tinkerfs.weights.range_source import RangeSource
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.safetensors_header import LENGTH_BYTES, header_length, tensors_json
from tinkerfs.weights.subject import CheckpointVersion
from tinkerfs.weights.tar_index import Member, Segment
from tinkerfs.weights.url_cache import SignedUrlCache, UrlProvider
from tinkerfs.weights.version import Version

T = TypeVar("T")

#: The bound on the memory that all open files take together.
MEMORY_BYTES = 256 << 20

#: How long transfers have to keep what came of a block when all ends, seconds.
STOPPING_S = 0.3

#: Indexes kept in memory; one of 1,000 members takes 0.3 MB.
MAX_INDEXES = 64

#: The spaces of the store, with the version of what is in them.
_INDEXES, _VERSIONS, _TENSORS = "weights index 2", "weights version 1", "weights tensors 1"


@dataclass(frozen=True, slots=True)
class MemberListing:
    """What `files/` shows: members by name, and what is left out and why, a line each."""

    members: dict[str, Member]
    skipped: tuple[str, ...]


class WeightsReader:
    """The weights of every checkpoint. Thread-safe; a context manager.

    Args:
        archives: the signed URLs.
        store: keeps indexes across mounts.
        cache: keeps blocks across mounts.
        telemetry: told of what is left out, and counts.
        timeout_s: how long a transfer may stand still, seconds.
        url_age_s: how old a URL may be, seconds, that tells which version of an undated checkpoint
            there is.
        memory_bytes: bound on blocks in memory, of all open files together.
    """

    def __init__(
        self,
        archives: SignedUrlCache,
        store: MetadataStore,
        cache: BlockCache,
        telemetry: Telemetry,
        *,
        timeout_s: float,
        url_age_s: float = 0.0,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._archives = archives
        self._store = store
        self._cache = cache
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._url_age_s = url_age_s
        self._client = ObjectStoreClient(telemetry, timeout_s=timeout_s)
        self.memory = BlockMemoryPool(memory_bytes)
        self._lock = threading.RLock()  # a flight that failed at once lands within it
        # All guarded by _lock.
        self._indexes: OrderedDict[str, Future[Index]] = OrderedDict()
        self._files: weakref.WeakValueDictionary[str, RemoteFile] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        """Return the weights themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close every connection to a store; reads under way fail, what came of them is kept."""
        self._client.stop()
        deadline = time.monotonic() + STOPPING_S
        while any(not file.is_idle() for file in list(self._files.values())):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.01)
        self._client.close()

    def cached_files(self, subject: CheckpointVersion) -> MemberListing | None:
        """Return the members where they are known without any request."""
        index = self._known(subject)
        return None if index is None else _listing(index)

    def files(
        self, subject: CheckpointVersion, ctx: RequestContext, *, is_open: bool = True
    ) -> MemberListing:
        """Return the members, waiting for the archive to be built.

        Args:
            subject: of which checkpoint.
            ctx: how long to wait, and on whose behalf.
            is_open: whether to make sure first that what is cached is of the right version.

        Raises:
            ApiError: they cannot be had.
            OSError: EIO when the archive is damaged; as `Archives.url`.
        """
        if is_open:
            self._revalidate(subject, ctx)
        return _listing(self._index(subject, ctx))

    def open(self, subject: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        """Open a member.

        Args:
            subject: of which checkpoint.
            name: as `Listing.members` has it.
            ctx: how long to wait, and on whose behalf.

        Raises:
            ApiError, OSError: as `files`; ENOENT where there is no such member.
        """
        self._revalidate(subject, ctx, name)
        return self._open(subject, name, ctx)

    def _open(self, subject: CheckpointVersion, name: str, ctx: RequestContext) -> WeightsFile:
        index = self._index(subject, ctx)
        member = find_member(index, name, subject.path)
        return WeightsFile(self._remote(subject, index, name), member)

    def archive_bytes(self, subject: CheckpointVersion) -> int | None:
        """Return the length of the archive where it is known without any request."""
        version = self._known_version(subject)
        return None if version is None else version.size_bytes

    def open_archive(self, subject: CheckpointVersion, ctx: RequestContext) -> WeightsFile:
        """Open the archive itself, as the store has it.

        Raises:
            ApiError: it cannot be had.
            OSError: as `Archives.url`.
        """
        self._revalidate(subject, ctx)
        version = self._known_version(subject)
        if version is None:
            address = self._address(subject)
            address.url(ctx)
            version = _run_and_wait(
                ctx, lambda: read_archive_version(self._client, address), f"size of {subject.path}"
            )
            self._store.put(_VERSIONS, subject.cache_key, msgspec.json.encode(version))
        size_bytes = version.size_bytes
        segments = (Segment(0, size_bytes, 0),) if size_bytes else ()
        member = Member("", size_bytes, subject.mtime_ns, segments)
        index = self._known(subject)
        digests = index.digests if index is not None and index.form == "tar" else ()
        sample = None if index is None else index.sample
        source = self._source(subject, version, sample=sample)
        file = self._shared(subject, version, "archive", size_bytes, source, digests)
        return WeightsFile(file, member)

    def cached_tensors(self, subject: CheckpointVersion) -> bytes | None:
        """Return `tensors.json` where it is known without any request."""
        return self._store.get(_TENSORS, subject.cache_key)

    def tensors(self, subject: CheckpointVersion, ctx: RequestContext) -> bytes:
        """Return the tensors of all safetensors files as JSON, sorted by name, from their headers.

        Takes two range requests a file at most, beyond those for `files`.

        Raises:
            ApiError, OSError: as `files`; EIO where a header is damaged or larger than is read.
        """
        self._revalidate(subject, ctx)
        known = self.cached_tensors(subject)
        if known is not None:
            return known
        index = self._index(subject, ctx)
        members = [each for each in index.members if each.name.endswith(".safetensors")]
        headers: dict[str, tuple[bytes, int]] = {}
        try:
            for member in members:
                header = self._header(subject, index, member, ctx)
                headers[member.name] = (header, member.size_bytes)
            made = tensors_json(headers)
        except ValueError as error:
            raise errors.corrupt(subject.path, str(error)) from None
        self._store.put(_TENSORS, subject.cache_key, made)
        return made

    def cached_bytes(self, subject: CheckpointVersion, name: str) -> int:
        """Return how many bytes of a member are on disk; 0 where that takes a request to tell."""
        index = self._known(subject)
        if index is None:
            return 0
        member = find_member(index, name, subject.path)
        with WeightsFile(self._remote(subject, index, name), member) as file:
            return file.kept_bytes()

    def kept_bytes(self) -> int:
        """Return what all that is kept takes on disk, whoever keeps it there.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._cache.kept_bytes()

    def invalidate(self, subject: CheckpointVersion) -> None:
        """Take note that the weights are others now: the next look asks the store again."""
        with self._lock:
            self._indexes.pop(subject.cache_key, None)
        for space in (_INDEXES, _VERSIONS, _TENSORS):
            self._store.delete(space, subject.cache_key)

    def _revalidate(self, subject: CheckpointVersion, ctx: RequestContext, name: str = "") -> None:
        """Forget what is cached of undated weights that the store has another version of by now.

        Where the store cannot be asked, what is cached serves. Other weights are known by their
        record.

        Args:
            subject: of which checkpoint.
            ctx: how long to wait, and on whose behalf.
            name: which file of external weights; empty for all.

        Raises:
            ApiError: NotFound where the server has no such weights any more.
            OSError: EINTR when the caller gave up.
        """
        if subject.is_dated or self._is_loading(subject):
            return
        self._archives.expire(subject.key, self._url_age_s, is_external=subject.is_external)
        try:
            if not self._is_current(subject, ctx, name):
                self.invalidate(subject)
        except errors.NotFound:
            self.invalidate(subject)
            raise
        except errors.ApiError:
            pass
        except OSError as error:
            if errors.is_interruption(error):
                raise

    def _is_loading(self, subject: CheckpointVersion) -> bool:
        with self._lock:
            flight = self._indexes.get(subject.cache_key)
        return flight is not None and not flight.done()

    def _is_current(self, subject: CheckpointVersion, ctx: RequestContext, name: str) -> bool:
        """Return whether the store has the version that is known; False where none is."""
        index = self._known(subject)
        if index is not None and index.form == "files":
            version = index.versions.get(name)  # of all of them the index is made once more
        else:
            version, name = self._known_version(subject), ""
        if version is None:
            return False
        address = self._address(subject, name)
        address.url(ctx)
        return _run_and_wait(
            ctx, lambda: has_version(self._client, address, version), f"version of {name}"
        )

    # Indexes

    def _known(self, subject: CheckpointVersion) -> Index | None:
        identity = subject.cache_key
        if self._archives.pop_changed(subject.key):
            self.invalidate(subject)
        with self._lock:
            flight = self._indexes.get(identity)
            if flight is not None:
                self._indexes.move_to_end(identity)
                return flight.result() if flight.done() and not flight.exception() else None
        raw = self._store.get(_INDEXES, identity)
        if raw is None:
            return None
        try:
            index = decode_index(raw)
        except ValueError:
            return None
        flight = Future[Index]()
        flight.set_result(index)
        with self._lock:
            self._keep(identity, flight)
        return index

    def _keep(self, identity: str, flight: "Future[Index]") -> None:
        self._indexes[identity] = flight
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)

    def _index(self, subject: CheckpointVersion, ctx: RequestContext) -> Index:
        known = self._known(subject)
        if known is not None:
            return known
        identity = subject.cache_key
        with self._lock:
            flight = self._indexes.get(identity)
        if flight is None:
            load = self._loader(subject, ctx)
            with self._lock:
                flight = self._indexes.get(identity)
                if flight is None:
                    flight = run_in_thread(load, f"index of {subject.path}")
                    self._keep(identity, flight)
                    flight.add_done_callback(lambda done: self._landed(identity, done))
        return ctx.wait_for(flight)

    def _landed(self, identity: str, flight: "Future[Index]") -> None:
        """Keep no failure: the next one to ask tries again."""
        if flight.exception() is not None:
            with self._lock:
                if self._indexes.get(identity) is flight:
                    del self._indexes[identity]

    def _loader(self, subject: CheckpointVersion, ctx: RequestContext) -> Callable[[], Index]:
        """Return what finds out the index, once there is a URL: that wait is the caller's."""
        address = self._address(subject)
        if subject.is_external:
            names = tuple(self._archives.external_urls(subject.key, subject.ref, subject.path, ctx))
        else:
            names = ()
            address.url(ctx)

        def load() -> Index:
            if subject.is_external:
                index = external_index(
                    self._client,
                    names,
                    lambda name: self._address(subject, name),
                    subject.mtime_ns,
                )
            else:
                index = archive_index(
                    self._client, address, self._cache, subject.cache_key, subject.about
                )
            for line in index.skipped:
                left_out = errors.corrupt(subject.path, f"left out: {line}")
                self._telemetry.record_error(subject.path, "index", left_out)
            self._store.put(_INDEXES, subject.cache_key, encode_index(index))
            return index

        return load

    # Files

    def _address(self, subject: CheckpointVersion, name: str = "") -> UrlProvider:
        return UrlProvider(self._archives, subject.key, subject.ref, subject.path, name)

    def _source(
        self,
        subject: CheckpointVersion,
        version: Version,
        name: str = "",
        sample: Sample | None = None,
    ) -> RangeSource:
        address = self._address(subject, name)
        # Of a file of external weights nothing is known but its length.
        return RangeSource(self._client, address, version, sample, is_plain=bool(name))

    def _remote(self, subject: CheckpointVersion, index: Index, name: str) -> RemoteFile:
        """Return the file that holds a member's bytes, in use."""
        if index.form == "files":
            version = index.versions[name]
            source = self._source(subject, version, name)
            return self._shared(subject, version, f"/{name}", version.size_bytes, source)
        version, plain_bytes = index.version, index.uncompressed_bytes
        source = self._source(subject, version, sample=index.sample)
        if index.form == "tar":
            digests = index.digests
            return self._shared(subject, version, "archive", plain_bytes, source, digests)
        unpacked = GzipSource(source, version.size_bytes, plain_bytes, subject.path)
        return self._shared(subject, version, "unpacked", plain_bytes, unpacked, index.digests)

    def _shared(
        self,
        subject: CheckpointVersion,
        version: Version,
        what: str,
        size_bytes: int,
        origin: BlockSource,
        digests: tuple[bytes, ...] = (),
    ) -> RemoteFile:
        """Return the one file of a key, in use."""
        key = block_key(subject.cache_key, version, what)
        with self._lock:
            file = self._files.get(key)
            if file is not None and file.acquire():
                return file
            file = RemoteFile(
                key,
                subject.path,
                size_bytes,
                origin,
                self._cache.open(key, f"{subject.about} {what}", size_bytes),
                self.memory,
                self._telemetry,
                timeout_s=self._timeout_s,
                digests=digests,
            )
            file.acquire()
            self._files[key] = file
            return file

    def _known_version(self, subject: CheckpointVersion) -> Version | None:
        index = self._known(subject)
        if index is not None:
            return None if index.form == "files" else index.version
        raw = self._store.get(_VERSIONS, subject.cache_key)
        try:
            return None if raw is None else msgspec.json.decode(raw, type=Version)
        except msgspec.MsgspecError:
            return None

    def _header(
        self, subject: CheckpointVersion, index: Index, member: Member, ctx: RequestContext
    ) -> bytes:
        """Return the header of a safetensors file, without its length.

        Raises:
            ValueError: it is none.
            ApiError, OSError: it cannot be read.
        """
        with self._open(subject, member.name, ctx) as file:
            first_bytes = min(PROBE_BYTES, member.size_bytes)
            start = self._read_range(subject, index, member, file, 0, first_bytes, ctx)
            stop = LENGTH_BYTES + header_length(start[:LENGTH_BYTES], member.size_bytes)
            if stop > len(start):
                start += self._read_range(subject, index, member, file, len(start), stop, ctx)
        return start[LENGTH_BYTES:stop]

    def _read_range(
        self,
        subject: CheckpointVersion,
        index: Index,
        member: Member,
        file: WeightsFile,
        start: int,
        stop: int,
        ctx: RequestContext,
    ) -> bytes:
        """Return [start, stop) of a member: kept, or by one request, or else by its blocks."""
        found = file.peek(start, stop)
        if found is None and index.form != "gzip" and len(member.segments) == 1:
            name, version = "", index.version
            if index.form == "files":
                name, version = member.name, index.versions[member.name]
            source = self._source(subject, version, name)
            source.prepare(ctx)
            place = member.segments[0].archive_offset
            work = partial(read_range, source, place + start, place + stop)
            found = _run_and_wait(ctx, work, f"header of {subject.path}")
        return file.read(stop - start, start, ctx) if found is None else found


def _run_and_wait(ctx: RequestContext, work: Callable[[], T], name: str) -> T:
    """Return what `work`, which has bounds of its own, comes to on another thread."""
    return ctx.wait_for(run_in_thread(work, name))


def _listing(index: Index) -> MemberListing:
    return MemberListing({member.name: member for member in index.members}, index.skipped)
