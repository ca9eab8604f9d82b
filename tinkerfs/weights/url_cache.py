"""Archives: the signed URLs of a checkpoint, shared by all who ask, fresh when handed out.

The server builds an archive when its URL is first asked for, which costs it something and can take
minutes. So one build is waited for however many ask, a reader that gives up does not abandon it, a
URL serves until shortly before it expires, and one process group starts only so many in a minute: a
walk that follows links would otherwise ask for every archive of the account. The URLs of external
weights, one a file, come all at once; nothing is built for them. Thread-safe.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.models import SignedUrl
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from concurrent.futures import Future

#: A URL is not handed out within this time of its expiry, seconds, or a tenth of its life.
EXPIRY_MARGIN_S = 60.0
#: Between two questions whether an archive is ready, where the server names no time: from, to.
POLL_S = (1.0, 15.0)
#: Between two tries while the API is unreachable in the middle of a transfer: from, to.
OUTAGE_POLL_S = (0.25, 2.0)
#: Within which `burst` builds may be started.
RATE_LIMIT_WINDOW_S = 60.0


#: The name of an archive among the URLs of a checkpoint; files of external weights have their own.
_ARCHIVE = ""


@dataclass(frozen=True, slots=True, repr=False)
class _CachedUrls:
    """The URLs of one checkpoint by name, and how long they are handed out; all secrets."""

    urls: Mapping[str, SignedUrl]
    good_until: float
    asked_at: float


class SignedUrlCache:
    """The signed URLs of checkpoints.

    Args:
        client: asks for them.
        telemetry: shows what is waited for.
        clock: `now` for expiries, `monotonic` for bounds.
        timeout_s: bound on the wait for an archive, seconds.
        outage_timeout_s: how long an unreachable API is waited for in the middle of a transfer,
            seconds: where there was a URL of the archive before. At a first look it fails at once.
        burst: how many builds one process group may start within `BURST_WINDOW_S`; 0 for any.
        is_one_transfer: whether all that is asked for belongs to one transfer, which is in progress
            once there was any URL.
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
        self._lock = threading.RLock()  # a flight that failed at once lands within it
        # Guarded by _lock.
        self._grants: dict[Hashable, _CachedUrls] = {}
        self._flights: dict[Hashable, Future[_CachedUrls]] = {}
        self._started: dict[int, deque[float]] = {}
        #: Archives that were built for this mount: a new URL of one costs the server nothing.
        self._built: set[Hashable] = set()
        self._changed: set[Hashable] = set()

    def known(self, key: Hashable) -> SignedUrl | None:
        """Return a URL of an archive that is still good, without a call."""
        with self._lock:
            grant = self._known((key, False))
        return None if grant is None else grant.urls[_ARCHIVE]

    def has_urls(self, key: Hashable, *, is_external: bool) -> bool:
        """Tell whether there are URLs that are still good."""
        with self._lock:
            return self._known((key, is_external)) is not None

    def url(self, key: Hashable, ref: CheckpointRef, path: str, ctx: RequestContext) -> SignedUrl:
        """Return a URL that is good for some time yet, waiting for the archive to be built.

        Args:
            key: the checkpoint and its version.
            ref: how the API is asked for it.
            path: the file on whose behalf it is asked, for messages.
            ctx: whose process group may start a build, and how long to wait.

        Raises:
            ApiError: what the server said in the end; NotReady never.
            OSError: ETIMEDOUT when it was not built in time, EBUSY when this process group has
                started too many builds, EINTR when the caller gave up.
        """

        def ask(hold_s: float) -> _CachedUrls:
            url = self._client.archive(ref, hold_s)
            return self._cache_entry({_ARCHIVE: url.url}, url.expires_at_s)

        return self._grant((key, False), ask, path, ctx).urls[_ARCHIVE]

    def external_urls(
        self, key: Hashable, ref: CheckpointRef, path: str, ctx: RequestContext
    ) -> Mapping[str, SignedUrl]:
        """Return a URL for each file of external weights, good for some time yet.

        Raises:
            ApiError, OSError: as `url`, but EBUSY.
        """

        def ask(_hold_s: float) -> _CachedUrls:
            return self._cache_entry(*self._client.external_weights_urls(ref))

        return self._grant((key, True), ask, path, ctx).urls

    def invalidate(self, key: Hashable, url: SignedUrl, *, is_external: bool = False) -> None:
        """Take note that the store lets nobody in with a URL: the next one to ask gets another."""
        with self._lock:
            grant = self._grants.get((key, is_external))
            if grant is not None and url in grant.urls.values():
                del self._grants[key, is_external]

    def expire(self, key: Hashable, age_s: float, *, is_external: bool = False) -> None:
        """Drop a URL that is older than this, seconds: it may be another version's by now."""
        with self._lock:
            grant = self._grants.get((key, is_external))
            if grant is not None and self._clock.now() - grant.asked_at >= age_s:
                del self._grants[key, is_external]

    def mark_changed(self, key: Hashable) -> None:
        """Take note that the store has other weights for a checkpoint than were known."""
        with self._lock:
            self._changed.add(key)

    def pop_changed(self, key: Hashable) -> bool:
        """Tell, once, whether `changed` was called for a checkpoint."""
        with self._lock:
            is_changed = key in self._changed
            self._changed.discard(key)
            return is_changed

    def forget(self) -> None:
        """Drop every URL that is kept; builds under way go on."""
        with self._lock:
            self._grants.clear()

    def _grant(
        self,
        key: tuple[Hashable, bool],
        ask: Callable[[float], _CachedUrls],
        path: str,
        ctx: RequestContext,
    ) -> _CachedUrls:
        is_external = key[1]
        with self._lock:
            known = self._known(key)
            if known is not None:
                return known
            flight = self._flights.get(key)
            if flight is None:
                if not is_external and key not in self._built:
                    self._check_rate_limit(ctx.caller().pgid, path)
                flight = run_in_thread(lambda: self._build(key, ask, path), f"archive {path}")
                self._flights[key] = flight
                flight.add_done_callback(lambda _done: self._landed(key))
        return ctx.with_timeout(self._timeout_s).wait_for(flight)

    def _known(self, key: Hashable) -> _CachedUrls | None:
        grant = self._grants.get(key)
        if grant is not None and self._clock.now() >= grant.good_until:
            del self._grants[key]
            return None
        return grant

    def _cache_entry(self, urls: Mapping[str, str], expires_at_s: float) -> _CachedUrls:
        margin_s = min(EXPIRY_MARGIN_S, max(expires_at_s - self._clock.now(), 0.0) / 10)
        signed = {name: SignedUrl(url, expires_at_s) for name, url in urls.items()}
        return _CachedUrls(signed, expires_at_s - margin_s, self._clock.now())

    def _landed(self, key: Hashable) -> None:
        with self._lock:
            self._flights.pop(key, None)

    def _check_rate_limit(self, group: int, path: str) -> None:
        """Let a process group start a build, or refuse; the caller holds the lock."""
        if not self._burst:
            return
        now = self._clock.monotonic()
        for other in [g for g, s in self._started.items() if now - s[-1] >= RATE_LIMIT_WINDOW_S]:
            del self._started[other]
        started = self._started.setdefault(group, deque(maxlen=self._burst))
        if len(started) == self._burst and now - started[0] < RATE_LIMIT_WINDOW_S:
            raise errors.burst_exceeded(
                path,
                f"one process group may start {self._burst} archive builds a minute "
                "(--archive-burst): this looks like a walk that follows links, or a process that "
                "opens many adapters (hint: run tinkerfs prefetch or tinkerfs get first: what is "
                "cached does not count)",
            )
        started.append(now)

    def _build(self, key: Hashable, ask: Callable[[float], _CachedUrls], path: str) -> _CachedUrls:
        """Ask until the archive is there; runs on a thread of its own.

        Args:
            key: of the grant.
            ask: asks once; takes how long the server may hold its response, seconds.
            path: for messages.
        """
        began = self._clock.monotonic()
        pause_s, longest_s = POLL_S
        outage_pauses, outage_began = _doubling(*OUTAGE_POLL_S), None
        with self._telemetry.track_pending(f"archive {path}"):
            while True:
                try:
                    grant = ask(self._timeout_s - (self._clock.monotonic() - began))
                    break
                except (errors.ConnectionFailed, errors.RequestTimeout) as error:
                    now = self._clock.monotonic()
                    outage_began = now if outage_began is None else outage_began
                    wait_s = next(outage_pauses)
                    is_over = now + wait_s - outage_began > self._outage_timeout_s
                    if is_over or not self._is_blip(key, error):
                        raise
                except errors.ResourceNotReady as error:
                    outage_pauses, outage_began = _doubling(*OUTAGE_POLL_S), None
                    wait_s = error.retry_after_s if error.retry_after_s is not None else pause_s
                    pause_s = min(pause_s * 2, longest_s)
                    waited_s = self._clock.monotonic() - began
                    if waited_s + wait_s > self._timeout_s:
                        raise errors.RequestTimeout(
                            f"the archive was not built within {self._timeout_s:g} s "
                            f"(--archive-timeout); the server's last word: {error.message}",
                            endpoint=error.endpoint,
                            status=error.status,
                        ) from None
                threading.Event().wait(max(wait_s, 0.02))
        with self._lock:
            self._grants[key] = grant
            self._built.add(key)
        return grant

    def _is_blip(self, key: Hashable, error: errors.ApiError) -> bool:
        """Return whether a failure may pass, and is in the middle of a transfer."""
        with self._lock:
            is_transfer = key in self._built or (self._is_one_transfer and bool(self._built))
        return is_transfer and (isinstance(error, errors.ConnectionFailed) or error.is_unsent)


def _doubling(first_s: float, longest_s: float) -> Iterator[float]:
    wait_s = first_s
    while True:
        yield wait_s
        wait_s = min(wait_s * 2, longest_s)


@dataclass(frozen=True, slots=True)
class UrlProvider:
    """Where one file of a checkpoint is, now and after its URL has expired. Thread-safe.

    Attributes:
        archives: who keeps the URLs.
        key: the checkpoint and its version.
        ref: how the API is asked for it.
        path: for messages.
        name: which file of external weights; empty for the archive.
    """

    archives: SignedUrlCache
    key: Hashable
    ref: CheckpointRef
    path: str
    name: str = _ARCHIVE

    def url(self, ctx: RequestContext = BACKGROUND_CONTEXT) -> SignedUrl:
        """Return a URL that is good for some time yet.

        Raises:
            ApiError: what the server said; NotFound where it has no such file any more.
            OSError: as `Archives.url`.
        """
        if not self.name:
            return self.archives.url(self.key, self.ref, self.path, ctx)
        urls = self.archives.external_urls(self.key, self.ref, self.path, ctx)
        if self.name not in urls:
            raise errors.NotFound(f"the server tells of no {self.name!r} any more")
        return urls[self.name]

    def is_known(self) -> bool:
        """Tell whether `url` has one at hand."""
        return self.archives.has_urls(self.key, is_external=bool(self.name))

    def mark_changed(self) -> None:
        """Take note that the store has another file there than was known."""
        self.archives.mark_changed(self.key)

    def invalidate(self, url: SignedUrl) -> None:
        """Take note that the store lets nobody in with this URL."""
        self.archives.invalidate(self.key, url, is_external=bool(self.name))
