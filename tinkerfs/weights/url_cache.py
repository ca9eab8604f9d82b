"""Cache the signed URLs of checkpoints and traces, and build each archive once.

The server builds an archive at the first request for its URL, which is expensive and may take
minutes. Concurrent callers therefore share one build, and a build continues after a caller is
interrupted. A URL is reused until shortly before it expires. Each process group may start only
a few builds a minute, because a walk that follows links would otherwise build every archive of
the account. Files of external weights have one URL each; the server lists all of them in one
response and builds nothing. The trace of a session is built like an archive. Thread-safe.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.models import SignedUrl
from tinkerfs.clock import Clock
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.retry import BUILD_POLL, OUTAGE_BACKOFF, RetryBudget
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import SharedReads

#: A URL is not returned within this time of its expiry, seconds, or a tenth of its lifetime.
EXPIRY_MARGIN_S = 60.0
#: Length of the window in which a process group may start `burst` builds.
RATE_LIMIT_WINDOW_S = 60.0


#: A URL of another host counts as newer than a rejected one if it was requested that much later,
#: seconds. Hosts know the time of each other's requests less exactly than that of their own.
_NEWER_S = 0.5

#: The name of an archive or a trace in `_CachedUrls.urls`; external files have their own names.
_ONLY = ""


@dataclass(frozen=True, slots=True, repr=False)
class _CachedUrls:
    """The URLs of one checkpoint or trace by name, and when they were requested; all secrets."""

    urls: Mapping[str, SignedUrl]
    valid_until: float
    requested_at: float


class SignedUrlCache:
    """Signed URLs of archives and external weights by checkpoint, and of traces by session.

    Args:
        telemetry: tracks the pending builds.
        clock: `now` for expiries, `monotonic` for timeouts.
        timeout_s: maximum time for an archive build, seconds.
        outage_timeout_s: how long to retry while the API is unreachable during a transfer, seconds.
            A transfer is in progress if the archive had a URL before. Otherwise the request fails
            at once.
        burst: maximum number of builds per process group in `RATE_LIMIT_WINDOW_S`; 0 for no limit.
        is_one_transfer: treat all requests as one transfer, in progress since its first URL.
    """

    def __init__(
        self,
        client: Client,
        telemetry: Telemetry,
        clock: Clock,
        *,
        timeout_s: float,
        outage_timeout_s: float,
        burst: int,
        is_one_transfer: bool = False,
    ) -> None:
        self._outage_timeout_s = outage_timeout_s
        self._is_one_transfer = is_one_transfer
        self._client = client
        self._telemetry = telemetry
        self._clock = clock
        self._timeout_s = timeout_s
        self._burst = burst
        self._builds: SingleFlight[Hashable, Future[_CachedUrls]] = SingleFlight()
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._entries: dict[Hashable, _CachedUrls] = {}
        self._started: dict[int, deque[float]] = {}
        #: What was built before: another URL costs the server little or nothing.
        self._built: set[Hashable] = set()
        #: What a URL must be newer than, on `Clock.with_suspend`, because an older one was dropped.
        self._not_before: dict[Hashable, float] = {}

    def cached_url(self, key: Hashable) -> SignedUrl | None:
        """Return a valid cached URL of an archive, None if absent; send no request."""
        with self._lock:
            entry = self._cached((key, False))
        return None if entry is None else entry.urls[_ONLY]

    def has_urls(self, key: Hashable, *, is_external: bool) -> bool:
        """Return whether valid URLs are cached."""
        with self._lock:
            return self._cached((key, is_external)) is not None

    def is_younger(self, key: Hashable, age_s: float) -> bool:
        """Return whether a valid URL of an archive or a trace is younger than `age_s`."""
        with self._lock:
            entry = self._cached((key, False))
            return entry is not None and self._clock.now() - entry.requested_at < age_s

    def url(self, key: Hashable, ref: CheckpointRef, path: str, ctx: RequestContext) -> SignedUrl:
        """Return a valid URL of an archive; wait until the archive is built.

        The rate limit applies to the process group of `ctx`; `path` is for messages.

        Raises:
            ApiError: the last error of the server, but never ResourceNotReady.
            OSError: ETIMEDOUT if the archive was not built in time; EBUSY if the process group has
                started too many builds; EINTR if the caller was interrupted.
        """
        # A server without archives builds none, so its refusals do not count as builds.
        self._client.check_supported(endpoints.ARCHIVE, ref)

        def request(hold_s: float) -> _CachedUrls:
            reads = self._shared_reads((key, False))
            url = self._client.archive(ref, hold_s, reads)
            return self._cache_entry({_ONLY: url.url}, url.expires_at_s, reads)

        return self._get_or_build((key, False), request, path, ctx).urls[_ONLY]

    def trace_url(
        self, key: Hashable, session_id: str, path: str, ctx: RequestContext
    ) -> SignedUrl:
        """Return a valid URL of a session's trace; wait until the trace is built.

        The rate limit of archives applies, because a walk that follows links reaches traces too.

        Raises:
            ApiError: as `url`; BuildFailed if the server could not build the trace.
            OSError: as `url`.
        """
        self._client.check_supported(endpoints.TRACE)

        def request(_hold_s: float) -> _CachedUrls:
            url = self._client.trace_url(session_id)
            return self._cache_entry({_ONLY: url.url}, url.expires_at_s, SharedReads())

        return self._get_or_build((key, False), request, path, ctx, what="trace").urls[_ONLY]

    def external_urls(
        self, key: Hashable, ref: CheckpointRef, path: str, ctx: RequestContext
    ) -> Mapping[str, SignedUrl]:
        """Return a valid URL for each file of external weights, by file name.

        Raises:
            ApiError, OSError: as `url`, except EBUSY.
        """

        def request(_hold_s: float) -> _CachedUrls:
            reads = self._shared_reads((key, True))
            return self._cache_entry(*self._client.external_weights_urls(ref, reads), reads)

        return self._get_or_build((key, True), request, path, ctx).urls

    def invalidate(self, key: Hashable, url: SignedUrl, *, is_external: bool = False) -> None:
        """Drop a URL that the store has rejected; the next caller requests another."""
        with self._lock:
            entry = self._entries.get((key, is_external))
            if entry is not None and url in entry.urls.values():
                self._drop((key, is_external), entry)

    def expire(self, key: Hashable, age_s: float, *, is_external: bool = False) -> None:
        """Drop URLs older than `age_s`, which may lead to a previous version."""
        with self._lock:
            entry = self._entries.get((key, is_external))
            if entry is not None and self._clock.now() - entry.requested_at >= age_s:
                self._drop((key, is_external), entry)

    def _drop(self, key: Hashable, entry: _CachedUrls) -> None:
        """Drop URLs, also those that other hosts got from the same request; _lock is held."""
        del self._entries[key]
        age_s = self._clock.now() - entry.requested_at
        self._not_before[key] = self._clock.with_suspend() - age_s + _NEWER_S

    def _shared_reads(self, key: Hashable) -> SharedReads:
        """Return which URLs of other hosts may be used."""
        with self._lock:
            return SharedReads(math.inf, self._not_before.get(key, -math.inf))

    def clear(self) -> None:
        """Drop all URLs; builds in progress continue."""
        with self._lock:
            self._entries.clear()

    def _get_or_build(
        self,
        key: tuple[Hashable, bool],
        request: Callable[[float], _CachedUrls],
        path: str,
        ctx: RequestContext,
        *,
        what: str = "archive",
    ) -> _CachedUrls:
        is_external = key[1]
        with self._lock:
            cached = self._cached(key)
            if cached is not None:
                return cached
            future = self._builds.get(key)
            if future is None:
                if not is_external and key not in self._built:
                    self._check_rate_limit(ctx.caller().pgid, path)
                work = partial(self._build, key, request, path, what)
                future = self._builds.run(key, work, f"{what} {path}", Future())
        return ctx.with_timeout(self._timeout_s).wait_for(future)

    def _cached(self, key: Hashable) -> _CachedUrls | None:
        entry = self._entries.get(key)
        if entry is not None and self._clock.now() >= entry.valid_until:
            del self._entries[key]
            return None
        return entry

    def _cache_entry(
        self, urls: Mapping[str, str], expires_at_s: float, reads: SharedReads
    ) -> _CachedUrls:
        margin_s = min(EXPIRY_MARGIN_S, max(expires_at_s - self._clock.now(), 0.0) / 10)
        signed = {name: SignedUrl(url, expires_at_s) for name, url in urls.items()}
        age_s = max(self._clock.with_suspend() - reads.oldest_at, 0.0)
        return _CachedUrls(signed, expires_at_s - margin_s, self._clock.now() - age_s)

    def _check_rate_limit(self, pgid: int, path: str) -> None:
        """Record a build of a process group, or raise EBUSY; the caller holds the lock."""
        if not self._burst:
            return
        now = self._clock.monotonic()
        for other in [g for g, s in self._started.items() if now - s[-1] >= RATE_LIMIT_WINDOW_S]:
            del self._started[other]
        started = self._started.setdefault(pgid, deque(maxlen=self._burst))
        if len(started) == self._burst and now - started[0] < RATE_LIMIT_WINDOW_S:
            raise errors.burst_exceeded(
                path,
                f"one process group may start {self._burst} archive or trace builds a minute "
                "(--archive-burst): this looks like a walk that follows links, or a process that "
                "opens many adapters (hint: run tinkerfs prefetch or tinkerfs get first: what is "
                "cached does not count)",
            )
        started.append(now)

    def _build(
        self, key: Hashable, request: Callable[[float], _CachedUrls], path: str, what: str
    ) -> _CachedUrls:
        """Request the URLs until the archive is built; runs on its own thread.

        `request` sends one request; its argument is how long the server may hold the response.
        """
        began = self._clock.monotonic()
        polls, outage_budget = 0, None
        with self._telemetry.track_pending(f"{what} {path}"):
            while True:
                try:
                    entry = request(self._timeout_s - (self._clock.monotonic() - began))
                    break
                except (errors.ConnectionFailed, errors.RequestTimeout) as error:
                    outage_budget = outage_budget or RetryBudget(
                        OUTAGE_BACKOFF, self._outage_timeout_s, clock=self._clock
                    )
                    delay_s = outage_budget.next_delay_s()
                    if delay_s is None or not self._is_transient(key, error):
                        raise
                    wait_s = delay_s
                except errors.ResourceNotReady as error:
                    polls, outage_budget = polls + 1, None
                    requested_s = error.retry_after_s
                    wait_s = BUILD_POLL.delay_s(polls) if requested_s is None else requested_s
                    waited_s = self._clock.monotonic() - began
                    if waited_s + wait_s > self._timeout_s:
                        raise errors.RequestTimeout(
                            f"the {what} was not built within {self._timeout_s:g} s "
                            f"(--archive-timeout); the server's last response: {error.message}",
                            endpoint=error.endpoint,
                            status=error.status,
                        ) from None
                threading.Event().wait(max(wait_s, 0.02))
        with self._lock:
            self._entries[key] = entry
            self._built.add(key)
        return entry

    def _is_transient(self, key: Hashable, error: errors.ApiError) -> bool:
        """Return whether a failure may be transient and occurred during a transfer."""
        with self._lock:
            is_transfer = key in self._built or (self._is_one_transfer and bool(self._built))
        return is_transfer and (
            isinstance(error, errors.ConnectionFailed) or error.request_not_sent
        )


class UrlProvider(Protocol):
    """Provides and renews the signed URL of one file. Thread-safe."""

    @property
    def path(self) -> str:
        """The path that a user requested, for messages."""
        ...

    def url(self, ctx: RequestContext = BACKGROUND_CONTEXT) -> SignedUrl:
        """Return a valid URL.

        Raises:
            ApiError: the request fails; NotFound if the server no longer lists the file.
            OSError: as `SignedUrlCache.url`.
        """
        ...

    def has_url(self) -> bool:
        """Return whether a valid URL is cached."""
        ...

    def invalidate(self, url: SignedUrl) -> None:
        """Drop a URL that the store has rejected."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointUrlProvider:
    """The `UrlProvider` of an archive, or of a file of external weights.

    Attributes:
        key: the checkpoint and its version.
        path: for messages.
        name: a file of external weights; empty for the archive.
    """

    url_cache: SignedUrlCache
    key: Hashable
    ref: CheckpointRef
    path: str
    name: str = _ONLY

    def url(self, ctx: RequestContext = BACKGROUND_CONTEXT) -> SignedUrl:
        """See `UrlProvider.url`."""
        if not self.name:
            return self.url_cache.url(self.key, self.ref, self.path, ctx)
        urls = self.url_cache.external_urls(self.key, self.ref, self.path, ctx)
        return find_url(urls, self.name)

    def has_url(self) -> bool:
        """Return whether a valid URL is cached."""
        return self.url_cache.has_urls(self.key, is_external=bool(self.name))

    def invalidate(self, url: SignedUrl) -> None:
        """Drop a URL that the store has rejected."""
        self.url_cache.invalidate(self.key, url, is_external=bool(self.name))


@dataclass(frozen=True, slots=True)
class TraceUrlProvider:
    """The `UrlProvider` of a session's trace.

    Attributes:
        key: the session.
        path: for messages.
    """

    url_cache: SignedUrlCache
    key: Hashable
    session_id: str
    path: str

    def url(self, ctx: RequestContext = BACKGROUND_CONTEXT) -> SignedUrl:
        """See `UrlProvider.url`; NotFound if the session does not exist."""
        return self.url_cache.trace_url(self.key, self.session_id, self.path, ctx)

    def has_url(self) -> bool:
        """Return whether a valid URL is cached."""
        return self.url_cache.has_urls(self.key, is_external=False)

    def invalidate(self, url: SignedUrl) -> None:
        """Drop a URL that the store has rejected."""
        self.url_cache.invalidate(self.key, url)


def find_url(urls: Mapping[str, SignedUrl], name: str) -> SignedUrl:
    """Return the URL of a file.

    Raises:
        NotFound: the server no longer lists the file.
    """
    if name not in urls:
        raise errors.NotFound(f"the server no longer lists {name!r}")
    return urls[name]
