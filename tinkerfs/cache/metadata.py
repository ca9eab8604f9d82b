"""Metadata cache with TTL, single-flight loading and negative entries.

Concurrent misses for a key share one load and its outcome, including errors, so that a hanging
server costs one timeout and not one per waiter. A value that was read recently is served once more
while it is refreshed (stale-while-revalidate). During an outage the last known good value is served
(stale-if-error). No lock is held while a value is loaded. Thread-safe.
"""

import math
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, TypeVar

from cachetools import TLRUCache

from tinkerfs import errors
from tinkerfs.cache.cache_policy import CachePolicy
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import BACKGROUND_CONTEXT, Priority, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import Expiry, SharedReads

T = TypeVar("T")

#: Wait at most this long for a refresh if a stale value is available, seconds.
REVALIDATE_WAIT_S = 2.0

#: The same while refreshes of this kind are failing or timing out, seconds. A server that has
#: recovered responds within this time; a hanging one does not delay a walk at every directory.
DEGRADED_WAIT_S = 0.2

#: Wait at most this long for all pages of a first load before they are streamed, seconds. A long
#: listing is streamed at once.
STREAM_WAIT_S = 0.25

#: `Expiry.fresh_until` of a value that was replaced or removed.
_EXPIRED = -math.inf

#: Maximum number of entries; a listing is one entry.
MAX_ENTRIES = 262_144


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


class _EntryCache(TLRUCache[Hashable, _Entry]):
    """The entries by key; the least recently used ones are evicted."""

    def popitem(self) -> tuple[Hashable, _Entry]:
        """Evict an entry, and expire it: derived values would miss its later changes."""
        key, entry = super().popitem()
        entry.expiry.fresh_until = _EXPIRED
        return key, entry


#: Stands for a key without an entry.
_ABSENT = _Entry(None, False, Expiry(_EXPIRED), _EXPIRED)


class _Decision(Enum):
    """How `get` responds if no fresh value is cached."""

    SERVE_STALE = auto()
    RAISE_ERROR = auto()
    LOAD = auto()
    REVALIDATE = auto()
    REVALIDATE_IN_BACKGROUND = auto()


def _decide(entry: _Entry, now: float, policy: CachePolicy) -> _Decision:
    """Decide how `get` responds from an entry without a fresh value, such as `_ABSENT`."""
    if entry.error is not None and now < entry.error_until:
        return _Decision.SERVE_STALE if entry.has_value else _Decision.RAISE_ERROR
    if not entry.has_value:
        return _Decision.LOAD
    is_in_use = now - entry.expiry.last_used < policy.revalidate_grace_s
    return _Decision.REVALIDATE_IN_BACKGROUND if is_in_use else _Decision.REVALIDATE


class _Load(Future[Any]):
    """A load in flight.

    Attributes:
        started: when it was started, on the monotonic clock.
        priority: promoted when a caller starts to wait.
        stream: its partial results.
    """

    def __init__(self, started: float, shared_reads: SharedReads, *, is_demand: bool) -> None:
        super().__init__()
        self.started = started
        self.stream = ResultStream()
        self.priority = Priority(is_demand, on_partial=self.stream.show, shared_reads=shared_reads)
        self.add_done_callback(self.stream.close)


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
        self._entries = _EntryCache(
            max_entries, ttu=lambda _key, entry, _now: entry.stored_until, timer=clock.with_suspend
        )
        #: The expiry of what was derived from the absence of a value, by its key.
        self._absences: dict[Hashable, Expiry] = {}
        self._generation = 0
        self._local_mutation_count = 0
        #: Kinds of key for which the last load failed or exceeded its wait.
        self._degraded_kinds: set[Hashable] = set()
        # A load is superseded under _lock, and caches its result under it unless superseded.
        self._loads: SingleFlight[Hashable, _Load] = SingleFlight()

    @property
    def generation(self) -> int:
        """A number that changes whenever a cached value is replaced or removed.

        A value derived from several cached values is current while the number stays the same and
        its `Validity` holds. The first value of a key only expires what was derived from its
        absence. So the loads of a tree walk do not invalidate the directories before.
        """
        return self._generation

    @property
    def local_mutation_count(self) -> int:
        """The number of calls of `update`."""
        return self._local_mutation_count

    def get(self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext) -> T:
        """Return the value of `key`, loading it unless a fresh one is cached.

        The value's expiry is recorded in `ctx`. The load runs in another thread. The first item of
        a tuple key is its kind.

        Raises:
            ApiError: the load failed, now or within the TTL of the failure.
            OSError: EINTR or ETIMEDOUT if the wait ended before the load.
        """
        value: T = self._get(key, load, policy, ctx)
        return value

    def get_or_stream(
        self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext
    ) -> T | ResultStream:
        """Return the value like `get`, or the stream of a slow first load."""
        found: T | ResultStream = self._get(key, load, policy, ctx, may_stream=True)
        return found

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
            now = self._clock.with_suspend()
            entry = self._entries.get(key, _ABSENT)
            if now < entry.expiry.fresh_until:  # apart from _decide, because it is the hot path
                self._telemetry.count("metadata_cache_hits")
                entry.expiry.last_used = now
                ctx.depends_on(entry.expiry)
                return entry.value
            ctx.mark_uncacheable()
            decision = _decide(entry, now, policy)
            if entry.has_value:
                entry.expiry.last_used = now
            match decision:
                case _Decision.SERVE_STALE:
                    self._telemetry.count("metadata_cache_hits")
                    self._telemetry.count("stale_if_error_hits")
                    return entry.value
                case _Decision.RAISE_ERROR:
                    self._telemetry.count("metadata_cache_hits")
                    raise entry.take_error()
            self._telemetry.count("metadata_cache_misses")
            is_background = decision is _Decision.REVALIDATE_IN_BACKGROUND
            pending = self._join_or_start(key, load, policy, is_demand=not is_background)
            waited_s = self._clock.monotonic() - pending.started
            if is_background and waited_s < REVALIDATE_WAIT_S:
                self._telemetry.count("background_revalidations")
                return entry.value
        pending.priority.promote()
        if decision is _Decision.LOAD:
            return self._wait_for_first(pending, ctx, may_stream=may_stream)
        return self._wait_for_refresh(key, entry, pending, ctx)

    def _wait_for_refresh(
        self, key: Hashable, entry: _Entry, pending: _Load, ctx: RequestContext
    ) -> Any:
        """Return the refreshed value, or the stale one if the refresh is slow or fails."""
        is_healthy = entry.error is None and _kind(key) not in self._degraded_kinds
        wait_s = REVALIDATE_WAIT_S if is_healthy else DEGRADED_WAIT_S
        wait_s -= self._clock.monotonic() - pending.started
        try:
            return ctx.with_timeout(max(wait_s, 0.0)).wait_for(pending)
        except errors.UNAVAILABLE_ERRORS:
            pass
        except OSError as error:
            if not errors.is_timeout(error):
                raise
            with self._lock:
                self._degraded_kinds.add(_kind(key))
        self._telemetry.count("stale_if_error_hits")
        return entry.value

    def _wait_for_first(self, pending: _Load, ctx: RequestContext, *, may_stream: bool) -> Any:
        """Return the first value, or with `may_stream` the stream of a slow load."""
        if not may_stream:
            return ctx.wait_for(pending)
        wait_s = STREAM_WAIT_S - (self._clock.monotonic() - pending.started)
        try:
            ctx.with_timeout(max(wait_s, 0.0)).wait_for(pending.stream.is_long_or_ended)
        except OSError as error:
            if not errors.is_timeout(error):
                raise
        return ctx.wait_for(pending) if pending.done() else pending.stream

    def prefetch(self, key: Hashable, load: Loader[T], policy: CachePolicy) -> bool:
        """Start loading a value without a waiter; return whether a load was started.

        No load is started if a fresh value or negative entry is cached, or a load is in flight.
        """
        with self._lock:
            now = self._clock.with_suspend()
            entry = self._entries.get(key, _ABSENT)
            is_cached = now < max(entry.expiry.fresh_until, entry.error_until)
            if is_cached or self._loads.get(key) is not None:
                return False
            self._join_or_start(key, load, policy, is_demand=False)
            return True

    def reload(self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext) -> T:
        """Return the outcome of a new load, even if a fresh value is cached."""
        with self._lock:
            self._loads.forget(key)
            pending = self._join_or_start(key, load, policy, is_demand=True, may_share=False)
        value: T = ctx.wait_for(pending)
        return value

    def wait_idle(self, ctx: RequestContext) -> None:
        """Wait until no load is in flight.

        Raises:
            OSError: EINTR or ETIMEDOUT if the wait ended before that.
        """
        while in_flight := self._loads.in_flight():
            for pending in in_flight:
                ctx.wait_until_done(pending)

    def peek_partial(self, key: Hashable, part: Hashable) -> Any:
        """Return one item of a first load in flight; None if it has not arrived."""
        with self._lock:
            entry, pending = self._entries.get(key, _ABSENT), self._loads.get(key)
        if pending is None or entry.has_value:
            return None
        return pending.stream.find(part)

    def peek(self, key: Hashable, ctx: RequestContext) -> Any:
        """Return the cached value of `key`, fresh or stale; None if it is not cached.

        The absence of a value is recorded in `ctx`, until the first value is cached.
        """
        with self._lock:
            entry = self._entries.get(key, _ABSENT)
            if not entry.has_value and ctx.validity is not None:
                ctx.depends_on(self._absences.setdefault(key, Expiry(math.inf)))
            return entry.value

    def last_changed(self, key: Hashable) -> float | None:
        """Return when the value of `key` was last seen to change, seconds since 1970.

        None if the value has not changed since its first load.
        """
        with self._lock:
            return self._entries.get(key, _ABSENT).last_changed

    def update(self, key: Hashable, change: Callable[[T], T], *, is_authoritative: bool) -> None:
        """Change the cached value, if any, after a change on the server.

        The result of a load in flight is returned to its waiters but not cached, because the load
        was started before the change. Unless the new value is authoritative, the next `get`
        reloads it.
        """
        with self._lock:
            self._loads.forget(key)
            self._local_mutation_count += 1
            entry = self._entries.get(key, _ABSENT)
            if entry.has_value:
                now = self._clock.with_suspend()
                expiry = replace(entry.expiry) if is_authoritative else Expiry(now)
                value, changed_at = change(entry.value), self._clock.now()
                self._put(key, replace(entry, value=value, expiry=expiry, last_changed=changed_at))

    def expire(self, key: Hashable) -> None:
        """Make the next `get` reload the value; a load in flight is not cached."""
        with self._lock:
            self._loads.forget(key)
            entry = self._entries.get(key, _ABSENT)
            if entry.has_value:
                self._put(
                    key, replace(entry, expiry=Expiry(self._clock.with_suspend()), error=None)
                )

    def expire_all(self) -> None:
        """Make the next `get` of every key reload its value; no load in flight is cached."""
        with self._lock:
            self._loads.forget_all()
            for entry in self._entries.values():
                entry.expiry.fresh_until = _EXPIRED
            self._generation += 1

    def put(self, key: Hashable, value: object, policy: CachePolicy) -> None:
        """Cache a value that was obtained without `get`."""
        with self._lock:
            self._loads.forget(key)
            self._store_value(key, value, policy, is_change=False)

    def drop(self, key: Hashable) -> None:
        """Remove a value; the result of a load in flight is not cached."""
        with self._lock:
            self._loads.forget(key)
            entry = self._entries.pop(key, None)
            if entry is not None:
                entry.expiry.fresh_until = _EXPIRED
                self._generation += 1

    def clear(self) -> None:
        """Remove every value; the results of loads in flight are not cached."""
        with self._lock:
            self._loads.forget_all()
            for entry in self._entries.values():
                entry.expiry.fresh_until = _EXPIRED
            self._entries.clear()
            self._degraded_kinds.clear()
            self._generation += 1

    def _put(self, key: Hashable, entry: _Entry) -> None:
        """Store an entry and expire the one that it replaces; the caller holds the lock."""
        before = self._entries.get(key, _ABSENT)
        before.expiry.fresh_until = _EXPIRED
        self._entries[key] = entry
        if before.has_value:
            self._generation += 1
        elif entry.has_value and key in self._absences:
            self._absences.pop(key).fresh_until = _EXPIRED

    def _join_or_start(
        self,
        key: Hashable,
        load: Loader[T],
        policy: CachePolicy,
        *,
        is_demand: bool,
        may_share: bool = True,
    ) -> _Load:
        """Return the load in flight, or start one; the caller holds the lock."""
        pending = self._loads.get(key)
        if pending is not None:
            return pending
        shared_reads = SharedReads(policy.ttl_s if may_share else 0.0)
        pending = _Load(self._clock.monotonic(), shared_reads, is_demand=is_demand)

        def run() -> T:
            try:
                value = load(pending.priority)
            except errors.ApiError as error:
                self._on_error(key, pending, policy, error)
                raise
            before = self.peek(
                key, BACKGROUND_CONTEXT
            )  # compared without the lock, because a listing may be long
            is_change = before is not None and before != value
            if before is not None and not is_change:
                value = before  # keep one of two equal values, and all values derived from it
            with self._lock:
                if self._loads.get(key) is pending:
                    self._degraded_kinds.discard(_kind(key))
                    oldest_at = shared_reads.oldest_at
                    self._store_value(key, value, policy, is_change=is_change, loaded_at=oldest_at)
            return value

        return self._loads.run(key, run, f"load {_describe(key)}", pending)

    def _on_error(
        self, key: Hashable, pending: _Load, policy: CachePolicy, error: errors.ApiError
    ) -> None:
        """Cache the error of a load unless the load was superseded."""
        is_outage = isinstance(error, errors.UNAVAILABLE_ERRORS)
        with self._lock:
            if self._loads.get(key) is not pending:
                return
            now = min(self._clock.with_suspend(), pending.priority.shared_reads.oldest_at)
            until = now + policy.error_ttl_s(error)
            entry = self._entries.get(key, _ABSENT)
            if is_outage:
                self._degraded_kinds.add(_kind(key))
            if is_outage and entry.has_value:
                entry.error, entry.error_until = error, until
            elif is_outage and not pending.priority.is_demand:
                return  # a failed prefetch: the first demand request loads again
            else:
                entry = _Entry(None, False, Expiry(_EXPIRED), until, error, until)
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
        policy: CachePolicy,
        *,
        is_change: bool,
        loaded_at: float = math.inf,
    ) -> None:
        """Cache a new value, as old as `loaded_at`; the caller holds the lock."""
        now = min(self._clock.with_suspend(), loaded_at)
        fresh_until = now + policy.ttl_s
        stored_until = max(fresh_until, now + policy.stale_if_error_s)
        before = self._entries.get(key, _ABSENT)
        if before.has_value and before.value is value:
            before.expiry.fresh_until, before.stored_until = fresh_until, stored_until
            before.error = None
            self._entries[key] = before  # reorders it by its new expiry; the value is unchanged
            return
        entry = _Entry(value, True, Expiry(fresh_until), stored_until)
        if before.has_value:
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
