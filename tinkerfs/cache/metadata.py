"""Metadata cache with TTL, single-flight loading and negative entries.

Concurrent misses for a key share one load and its outcome, including errors, so that a hanging
server costs one timeout and not one per waiter. A value that was read recently is served once more
while it is refreshed (stale-while-revalidate). During an outage the last good value is served
(stale-if-error). No lock is held while a value is loaded. Thread-safe.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cachetools import TLRUCache

from tinkerfs import errors
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import Expiry, Priority, RequestContext
from tinkerfs.telemetry import Telemetry

T = TypeVar("T")

#: TTL of a cached failure that says nothing about the object, seconds. A walk during an outage
#: sends few requests, and a recovery is still noticed quickly.
ERROR_TTL_S = 2.0

#: Wait at most this long for a refresh if a stale value is available, seconds.
REVALIDATE_WAIT_S = 2.0

#: The same while refreshes of this kind are failing or timing out, seconds. A server that has
#: recovered responds within this time; a hanging one does not delay a walk at every directory.
DEGRADED_WAIT_S = 0.2

#: Wait at most this long for all pages of a first load before they are streamed, seconds.
STREAM_WAIT_S = 0.25

#: A value that was read within this time, seconds, is served once after its expiry while it is
#: refreshed in the background.
STALE_WHILE_REVALIDATE_S = 2.0

#: `Expiry.fresh_until` of a value that was replaced or removed.
_EXPIRED = float("-inf")

#: Maximum number of entries; a listing is one entry.
MAX_ENTRIES = 262_144


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How long the outcomes of a load are cached.

    Attributes:
        ttl_s: freshness of a value.
        stale_if_error_s: a value is served this long after its load while refreshes fail.
        negative_ttl_s: TTL of a negative entry.
        negative_errors: the errors that are cached as negative entries.
    """

    ttl_s: float
    stale_if_error_s: float
    negative_ttl_s: float
    negative_errors: tuple[type[errors.ApiError], ...] = (
        errors.NotFound,
        errors.UnsupportedEndpoint,
    )

    @property
    def revalidate_grace_s(self) -> float:
        """Maximum time since the last read for stale-while-revalidate, seconds."""
        return min(STALE_WHILE_REVALIDATE_S, self.ttl_s / 4)

    def error_ttl_s(self, error: errors.ApiError) -> float:
        """Return how long an error is cached, seconds."""
        # An error that was raised without a request is cheap to raise again.
        if error.is_local and isinstance(error, errors.UNAVAILABLE_ERRORS):
            return 0.0
        return self.negative_ttl_s if isinstance(error, self.negative_errors) else ERROR_TTL_S


@dataclass(slots=True, eq=False)
class _Entry:
    """A cached value, a cached error, or both; a fresh error takes precedence.

    Attributes:
        expiry: shared with derived values; changed under the lock, except for `last_used`.
        last_changed: when the value was seen to change, seconds since 1970.
        is_unreported: the error has not been raised to any caller yet.
    """

    value: Any
    has_value: bool
    expiry: Expiry
    stored_until: float
    error: errors.ApiError | None = None
    error_until: float = 0.0
    last_changed: float | None = None
    is_unreported: bool = False

    def take_error(self) -> errors.ApiError:
        """Return the error to raise, and mark it as reported; the caller holds the lock.

        Only the first caller gets it as an error of a request; later ones get it as a local one.
        """
        assert self.error is not None
        error = self.error.as_local()
        error.is_local, self.is_unreported = not self.is_unreported, False
        return error


@dataclass(slots=True)
class _InFlightLoad:
    future: "Future[Any]"
    started: float
    priority: Priority
    stream: ResultStream


#: Loads a value. The priority says whether a caller waits for it, and may be promoted meanwhile.
Loader = Callable[[Priority], T]


class MetadataCache:
    """Caches values by key and loads them on demand. Thread-safe.

    Args:
        max_entries: the least recently used entries are evicted beyond this number.
    """

    def __init__(
        self, telemetry: Telemetry, clock: Clock = SYSTEM_CLOCK, max_entries: int = MAX_ENTRIES
    ) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._entries: TLRUCache[Hashable, _Entry] = TLRUCache(
            max_entries, ttu=lambda _key, entry, _now: entry.stored_until, timer=clock.monotonic
        )
        self._in_flight: dict[Hashable, _InFlightLoad] = {}
        self._generation = 0
        self._local_mutations = 0
        #: Kinds of key for which the last load failed or exceeded its wait.
        self._degraded_kinds: set[Hashable] = set()

    @property
    def generation(self) -> int:
        """A number that changes whenever a cached value is replaced, added or removed.

        A value derived from several cached values is current while the number stays the same.
        """
        return self._generation

    @property
    def local_mutations(self) -> int:
        """The number of calls of `update`."""
        return self._local_mutations

    def get(self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext) -> T:
        """Return the value of `key`, loading it unless a fresh one is cached.

        The value's expiry is recorded in `ctx`. The load runs in another thread. The first item of
        a tuple key is its kind.

        Raises:
            ApiError: the load failed, now or within the TTL of the failure.
            OSError: EINTR or ETIMEDOUT if the wait ended before the load.
        """
        return self._get(key, load, policy, ctx)  # type: ignore[no-any-return]

    def get_or_stream(
        self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext
    ) -> T | ResultStream:
        """Return the value like `get`, or the stream of a slow first load."""
        return self._get(key, load, policy, ctx, may_stream=True)  # type: ignore[no-any-return]

    def _get(
        self,
        key: Hashable,
        load: Loader[Any],
        policy: CachePolicy,
        ctx: RequestContext,
        *,
        may_stream: bool = False,
    ) -> Any:
        with self._lock:
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            last_used = float("-inf")
            if entry is not None and entry.has_value:
                last_used, entry.expiry.last_used = entry.expiry.last_used, now
                if now < entry.expiry.fresh_until:
                    self._telemetry.count("metadata_cache_hits")
                    ctx.depends_on(entry.expiry)
                    return entry.value
            ctx.mark_uncacheable()
            if entry is not None and entry.error is not None and now < entry.error_until:
                self._telemetry.count("metadata_cache_hits")
                if not entry.has_value:
                    raise entry.take_error()
                self._telemetry.count("stale_if_error_hits")
                return entry.value
            self._telemetry.count("metadata_cache_misses")
            is_in_use = now - last_used < policy.revalidate_grace_s
            pending = self._in_flight.get(key) or self._start(
                key, load, policy, Priority(is_demand=not is_in_use)
            )
            if is_in_use and now - pending.started < REVALIDATE_WAIT_S:
                self._telemetry.count("background_revalidations")
                return entry.value  # type: ignore[union-attr]
        pending.priority.promote()
        if entry is None or not entry.has_value:
            return self._wait_for_first(pending, ctx, may_stream=may_stream)
        try:
            is_healthy = entry.error is None and _kind(key) not in self._degraded_kinds
            wait_s = REVALIDATE_WAIT_S if is_healthy else DEGRADED_WAIT_S
            wait_s = max(wait_s - (now - pending.started), 0.0)
            return ctx.with_timeout(wait_s).wait_for(pending.future)
        except errors.UNAVAILABLE_ERRORS:
            pass
        except OSError as error:
            if not errors.is_timeout(error):
                raise
            with self._lock:
                self._degraded_kinds.add(_kind(key))
        self._telemetry.count("stale_if_error_hits")
        return entry.value

    def _wait_for_first(
        self, pending: _InFlightLoad, ctx: RequestContext, *, may_stream: bool
    ) -> Any:
        """Return the first value, or with `may_stream` the stream of a slow load."""
        if not may_stream:
            return ctx.wait_for(pending.future)
        wait_s = STREAM_WAIT_S - (self._clock.monotonic() - pending.started)
        try:
            return ctx.with_timeout(max(wait_s, 0.0)).wait_for(pending.future)
        except OSError as error:
            if not errors.is_timeout(error):
                raise
        return pending.stream

    def prefetch(self, key: Hashable, load: Loader[T], policy: CachePolicy) -> bool:
        """Start loading a value without a waiter; return whether a load was started.

        No load is started if a fresh value or negative entry is cached, or a load is in flight.
        """
        with self._lock:
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            if key in self._in_flight or (
                entry is not None and now < max(entry.expiry.fresh_until, entry.error_until)
            ):
                return False
            self._start(key, load, policy, Priority(is_demand=False))
            return True

    def reload(self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext) -> T:
        """Return the outcome of a new load, even if a fresh value is cached."""
        with self._lock:
            pending = self._start(key, load, policy, Priority(is_demand=True))
        return ctx.wait_for(pending.future)  # type: ignore[no-any-return]

    def peek_partial(self, key: Hashable, part: Hashable) -> Any:
        """Return one item of a first load in flight; None if it has not arrived."""
        with self._lock:
            entry, pending = self._entries.get(key), self._in_flight.get(key)
        is_first = entry is None or not entry.has_value
        return pending.stream.find(part) if pending is not None and is_first else None

    def peek(self, key: Hashable) -> Any:
        """Return the cached value of `key`, fresh or stale; None if it is not cached."""
        with self._lock:
            entry = self._entries.get(key)
            return entry.value if entry is not None and entry.has_value else None

    def last_changed(self, key: Hashable) -> float | None:
        """Return when the value of `key` was last seen to change, seconds since 1970.

        None if the value has not changed since its first load.
        """
        with self._lock:
            entry = self._entries.get(key)
            return entry.last_changed if entry is not None else None

    def update(self, key: Hashable, change: Callable[[T], T], *, is_authoritative: bool) -> None:
        """Change the cached value, if any, after a change on the server.

        The result of a load in flight is returned to its waiters but not cached, because the load
        was started before the change. Unless the new value is authoritative, the next `get`
        reloads it.
        """
        with self._lock:
            self._in_flight.pop(key, None)
            self._local_mutations += 1
            entry = self._entries.get(key)
            if entry is not None and entry.has_value:
                now = self._clock.monotonic()
                expiry = replace(entry.expiry) if is_authoritative else Expiry(now)
                value, changed_at = change(entry.value), self._clock.now()
                self._put(key, replace(entry, value=value, expiry=expiry, last_changed=changed_at))

    def expire(self, key: Hashable) -> None:
        """Make the next `get` reload the value; a load in flight is not cached."""
        with self._lock:
            self._in_flight.pop(key, None)
            entry = self._entries.get(key)
            if entry is not None and entry.has_value:
                self._put(key, replace(entry, expiry=Expiry(self._clock.monotonic()), error=None))

    def put(self, key: Hashable, value: object, policy: CachePolicy) -> None:
        """Cache a value that was obtained without `get`."""
        with self._lock:
            self._in_flight.pop(key, None)
            self._store_value(key, value, self._entries.get(key), policy, is_change=False)

    def drop(self, key: Hashable) -> None:
        """Remove a value; the result of a load in flight is not cached."""
        with self._lock:
            self._in_flight.pop(key, None)
            entry = self._entries.pop(key, None)
            if entry is not None:
                entry.expiry.fresh_until = _EXPIRED
                self._generation += 1

    def clear(self) -> None:
        """Remove every value; the results of loads in flight are not cached."""
        with self._lock:
            self._in_flight.clear()
            for entry in self._entries.values():
                entry.expiry.fresh_until = _EXPIRED
            self._entries.clear()
            self._degraded_kinds.clear()
            self._generation += 1

    def _put(self, key: Hashable, entry: _Entry) -> None:
        """Store an entry and expire the one that it replaces; the caller holds the lock."""
        before = self._entries.get(key)
        if before is not None and before is not entry:
            before.expiry.fresh_until = _EXPIRED
        self._entries[key] = entry
        self._generation += 1

    def _start(
        self, key: Hashable, load: Loader[T], policy: CachePolicy, priority: Priority
    ) -> _InFlightLoad:
        """Start a load; the caller holds the lock."""
        pending = _InFlightLoad(Future(), self._clock.monotonic(), priority, ResultStream())
        self._in_flight[key] = pending
        priority.on_partial = pending.stream.add

        def run() -> T:
            try:
                value = load(priority)
            except errors.ApiError as error:
                self._complete(key, pending, policy, error=error)
                raise
            except BaseException:
                self._complete(key, pending, policy)
                raise
            before = self.peek(key)  # compared without the lock, because a listing may be long
            is_change = before is not None and before != value
            if before is not None and not is_change:
                value = before  # keep one of two equal values, and all values derived from it
            self._complete(key, pending, policy, value=(value,), is_change=is_change)
            return value

        pending.future = run_in_thread(run, f"load {_describe(key)}")
        pending.future.add_done_callback(pending.stream.close)
        return pending

    def _complete(
        self,
        key: Hashable,
        pending: _InFlightLoad,
        policy: CachePolicy,
        *,
        value: tuple[Any] | None = None,
        is_change: bool = False,
        error: errors.ApiError | None = None,
    ) -> None:
        """Cache the outcome of a load unless the load was superseded."""
        with self._lock:
            if self._in_flight.get(key) is not pending:
                return
            del self._in_flight[key]
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            if value is not None:
                self._degraded_kinds.discard(_kind(key))
                self._store_value(key, value[0], entry, policy, is_change=is_change)
                return
            if error is None:
                return
            is_outage = isinstance(error, errors.UNAVAILABLE_ERRORS)
            if is_outage:
                self._degraded_kinds.add(_kind(key))
            if is_outage and entry is not None and entry.has_value:
                entry.error, entry.error_until = error, now + policy.error_ttl_s(error)
            elif is_outage and not pending.priority.is_demand:
                return  # a failed prefetch: the first demand request loads again
            else:
                until = now + policy.error_ttl_s(error)
                entry = _Entry(None, False, Expiry(now), until, error, until)
                entry.is_unreported = not pending.priority.is_demand
                self._put(key, entry)
                return
        if not error.is_local:
            self._telemetry.record_error(
                _describe(key), "refresh", errors.os_error_from_api(error, "")
            )

    def _store_value(
        self,
        key: Hashable,
        value: Any,
        before: _Entry | None,
        policy: CachePolicy,
        *,
        is_change: bool,
    ) -> None:
        """Cache a new value; the caller holds the lock."""
        now = self._clock.monotonic()
        fresh_until = now + policy.ttl_s
        stored_until = max(fresh_until, now + policy.stale_if_error_s)
        if before is not None and before.has_value and before.value is value:
            before.expiry.fresh_until, before.stored_until = fresh_until, stored_until
            before.error = None
            self._entries[key] = before  # reorders it by its new expiry; the value is unchanged
            return
        entry = _Entry(value, True, Expiry(fresh_until), stored_until)
        if before is not None and before.has_value:
            entry.expiry.last_used = before.expiry.last_used
            entry.last_changed = before.last_changed
        if is_change:
            entry.last_changed = self._clock.now()
        self._put(key, entry)


def _kind(key: Hashable) -> Hashable:
    """Return the part of a key that all requests of the same endpoint have in common."""
    return key[0] if isinstance(key, tuple) else key


def _describe(key: Hashable) -> str:
    return " ".join(str(part) for part in key) if isinstance(key, tuple) else str(key)
