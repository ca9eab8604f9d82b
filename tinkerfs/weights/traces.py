"""Read the traces of sessions, which the server builds on request.

A trace grows while its session runs, so an open asks the server for the current one. The server
does not build a trace again that is up to date (Tinker SDK 0.38, `rest_client.py`). Blocks are
cached by the version that the store reports, as those of weights are. Thread-safe.

A version is current as long as its URL is fresh or a handle has it open, and meanwhile an open does
not ask for another. So the size that the kernel has cached is that of the version that is opened
next. Some programs read no more bytes than that: those that call sendfile(2) without fstat(2).
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from tinkerfs import errors
from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.name_encoding import compound_key
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.file import MemberFile, WeightsFile
from tinkerfs.weights.origins import StoredFile
from tinkerfs.weights.probe import read_version
from tinkerfs.weights.range_source import Connect, RangeSource
from tinkerfs.weights.remote_file import RemoteFile
from tinkerfs.weights.remote_file_pool import RemoteFilePool
from tinkerfs.weights.tar_index import Member, Segment
from tinkerfs.weights.url_cache import SignedUrlCache, TraceUrlProvider
from tinkerfs.weights.version import Version

#: Namespace of the metadata store. The number is the version of the stored format.
_VERSIONS = "trace version 1"

#: A size is not reported as exact within this time of the end of its URL's freshness, seconds: the
#: kernel may use it for a second.
_SIZE_MARGIN_S = 3.0


@dataclass(frozen=True, slots=True)
class SessionTrace:
    """The trace of one session.

    Attributes:
        server: the API's base URL.
        path: the path that a user requested, for messages.
        mtime_ns: of the file, nanoseconds since 1970.
    """

    server: str
    session_id: str
    path: str
    mtime_ns: int

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the trace on the server, among checkpoints too."""
        return "trace", self.session_id

    @property
    def cache_key(self) -> str:
        """A text that is unique on this host for the trace."""
        return compound_key(self.server, *self.key)


class _TraceFile(MemberFile):
    """An open trace."""

    def __init__(self, file: RemoteFile, member: Member, on_close: Callable[[], None]) -> None:
        super().__init__(file, member)
        self._on_close = on_close

    def close(self) -> None:
        """See `WeightsFile.close`."""
        super().close()
        self._on_close()


class Traces:
    """Opens the traces of sessions. Thread-safe.

    Args:
        connect: returns the HTTP client of the store.
        files: the open files, whose blocks are cached.
        store: caches the versions across mounts.
        telemetry: records why another version than the current one is opened.
        url_age_s: maximum age of a signed URL that reveals the current version, seconds.
    """

    def __init__(
        self,
        url_cache: SignedUrlCache,
        connect: Connect,
        files: RemoteFilePool,
        store: MetadataStore,
        telemetry: Telemetry,
        *,
        url_age_s: float,
    ) -> None:
        self._url_cache = url_cache
        self._connect = connect
        self._files = files
        self._store = store
        self._telemetry = telemetry
        self._url_age_s = url_age_s
        self._lock = threading.Lock()
        #: The number of open handles, by trace and version; guarded by _lock.
        self._handles: Counter[tuple[str, Version]] = Counter()

    def size_bytes(self, trace: SessionTrace) -> int | None:
        """Return the exact length of the version that the next open returns, None if unknown."""
        version = self._current_version(trace, self._url_age_s - _SIZE_MARGIN_S)
        return None if version is None else version.size_bytes

    def open(self, trace: SessionTrace, ctx: RequestContext) -> WeightsFile:
        """Open the current trace; wait until the server has built it.

        If the server or the store is not available, the version that was opened last is opened.

        Raises:
            ApiError: the request fails; NotFound if the session does not exist; BuildFailed if the
                server could not build the trace.
            OSError: see `SignedUrlCache.url`.
        """
        provider = TraceUrlProvider(self._url_cache, trace.key, trace.session_id, trace.path)
        version = self._current_version(trace, self._url_age_s)
        if version is None:
            version = self._request_version(trace, provider, ctx)
        return self._open_version(trace, provider, version)

    def _current_version(self, trace: SessionTrace, age_s: float) -> Version | None:
        """Return the known version if it is open, or its URL is younger than `age_s`."""
        version = self._known_version(trace)
        if version is None:
            return None
        with self._lock:
            is_open = self._handles[trace.cache_key, version] > 0
        return version if is_open or self._url_cache.is_younger(trace.key, age_s) else None

    def _request_version(
        self, trace: SessionTrace, provider: TraceUrlProvider, ctx: RequestContext
    ) -> Version:
        known = self._known_version(trace)
        self._url_cache.expire(trace.key, self._url_age_s)
        try:
            provider.url(
                ctx
            )  # here, because the rate limit is for the process group of this thread
            request = run_in_thread(
                lambda: read_version(self._connect, provider), f"size of {trace.path}"
            )
            version = ctx.wait_for(request)
        except errors.UNAVAILABLE_ERRORS as error:
            if known is None:
                raise
            failure = errors.os_error_from_api(error, trace.path)
            self._telemetry.record_error(trace.path, "update", failure)
            return known
        except errors.NotFound:
            self._forget(trace)
            raise
        if version != known:
            self._store.put(_VERSIONS, trace.cache_key, msgspec.json.encode(version))
        return version

    def _open_version(
        self, trace: SessionTrace, provider: TraceUrlProvider, version: Version
    ) -> WeightsFile:
        size_bytes = version.size_bytes
        source = RangeSource(
            self._connect,
            provider,
            version,
            is_plain=True,
            on_stale=lambda: self._forget(trace),
        )
        stored = StoredFile(kind="trace", version=version, size_bytes=size_bytes, source=source)
        segments = (Segment(0, size_bytes, 0),) if size_bytes else ()
        about = f"session {trace.session_id}"
        file = self._files.acquire(trace.cache_key, trace.path, about, stored)
        handle = (trace.cache_key, version)
        with self._lock:
            self._handles[handle] += 1
        member = Member("", size_bytes, trace.mtime_ns, segments)
        return _TraceFile(file, member, lambda: self._on_close(handle))

    def _on_close(self, handle: tuple[str, Version]) -> None:
        with self._lock:
            self._handles[handle] -= 1
            if not self._handles[handle]:
                del self._handles[handle]

    def _known_version(self, trace: SessionTrace) -> Version | None:
        raw = self._store.get(_VERSIONS, trace.cache_key)
        try:
            return None if raw is None else msgspec.json.decode(raw, type=Version)
        except msgspec.MsgspecError:
            return None

    def _forget(self, trace: SessionTrace) -> None:
        self._store.delete(_VERSIONS, trace.cache_key)
