"""Metadata cache: TTL, single flight, refresh behind, negative entries, last good answer.

What it saves: a call for each of the thousands of stats that a walk makes. A miss is asked once
however many wait for it, and its outcome, error included, is everybody's: cachetools' own locking
lets the waiters of a failing key fail one after the other (measured: 16 waiters, 16 time-outs).
No lock is held while a value is loaded.
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

#: How long a failure that says nothing about the thing is remembered, seconds: long enough that a
#: walk during an outage makes few calls, short enough that recovery is noticed at once.
ERROR_TTL_S = 2.0

#: How long somebody who has a last good answer waits for a newer one, seconds.
REVALIDATE_WAIT_S = 2.0

#: And how long once the last try to get one, or another of its kind, came to nothing: a server that
#: is back answers within this, one that hangs does not hold up a walk at each folder again.
DEGRADED_WAIT_S = 0.2

#: How long a first answer is waited for before what an earlier mount kept is shown, or what came of
#: it, seconds: a quick server's own answer is shown, and whole.
WARM_START_WAIT_S = 0.25

#: Who goes on using a value meets its end of life without a wait: what was used within this time,
#: seconds, or a quarter of the TTL where that is less, is served once more and refreshed behind.
STALE_WHILE_REVALIDATE_S = 2.0

#: The end of what is no longer so, on the monotonic clock.
_ENDED = float("-inf")

#: Entries kept; a listing is one entry.
MAX_ENTRIES = 262_144


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How long what is loaded serves.

    Attributes:
        ttl_s: a value is fresh this long.
        stale_s: and serves so long altogether where newer ones cannot be had.
        negative_ttl_s: absence (an error of `negative`) is remembered this long.
        negative: the errors that are answers.
    """

    ttl_s: float
    stale_s: float
    negative_ttl_s: float
    negative_errors: tuple[type[errors.ApiError], ...] = (
        errors.NotFound,
        errors.UnsupportedEndpoint,
    )

    @property
    def revalidate_grace_s(self) -> float:
        """How long ago somebody may have used a value that is refreshed behind, seconds."""
        return min(STALE_WHILE_REVALIDATE_S, self.ttl_s / 4)

    def error_ttl_s(self, error: errors.ApiError) -> float:
        """Return how long a failure is remembered, seconds."""
        if error.is_local and isinstance(error, errors.UNAVAILABLE_ERRORS):  # it cost nothing
            return 0.0
        return self.negative_ttl_s if isinstance(error, self.negative_errors) else ERROR_TTL_S


@dataclass(slots=True, eq=False)
class _Entry:
    """A value with its age, or an error that is remembered; `error` rules while it is fresh.

    Attributes:
        term: for who rests on it; changed only under the lock, but for when it was used.
        is_warm: an earlier mount kept the value, and no answer has come in this one.
        changed_at: when it was seen to become another one, seconds since 1970.
        is_untold: whether nobody was waiting for the error when it came, and nobody came since.
    """

    value: Any
    has_value: bool
    term: Expiry
    kept_until: float
    error: errors.ApiError | None = None
    error_until: float = 0.0
    is_warm: bool = False
    last_changed: float | None = None
    is_unreported: bool = False

    def take_error(self) -> errors.ApiError:
        """Return the error to raise, as remembered from the second time on; under the lock."""
        assert self.error is not None
        error = self.error.as_local()
        error.is_local, self.is_unreported = not self.is_unreported, False
        return error


@dataclass(slots=True)
class _InFlightLoad:
    future: "Future[Any]"
    started: float
    interest: Priority
    parts: ResultStream


#: Loads a value; told whether somebody waits for it, now or from some time on.
Loader = Callable[[Priority], T]


class MetadataCache:
    """Values by key, loaded when asked for. Thread-safe.

    Args:
        telemetry: counts hits, misses and failures.
        clock: for ages.
        max_entries: so many values are kept; the ones that were used least recently go first.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._entries: TLRUCache[Hashable, _Entry] = TLRUCache(
            max_entries, ttu=lambda _key, entry, _now: entry.kept_until, timer=clock.monotonic
        )
        self._flights: dict[Hashable, _InFlightLoad] = {}
        self._epoch = 0
        self._amendments = 0
        self._degraded_kinds: set[Hashable] = (
            set()
        )  # kinds whose last load failed, or was not waited for

    @property
    def generation(self) -> int:
        """A number that becomes another one with every kept value that does.

        What was made of several of them, peeked at or got, is as it was while this is.
        """
        return self._epoch

    @property
    def local_mutations(self) -> int:
        """How many times `amend` was called."""
        return self._amendments

    def get(
        self,
        key: Hashable,
        load: Loader[T],
        policy: CachePolicy,
        ctx: RequestContext,
        fallback: Callable[[], T | None] | None = None,
    ) -> T:
        """Return the value of `key`, loading it where no fresh one is kept.

        The call is told how long the value holds.

        Args:
            key: of what.
            load: how.
            policy: for how long it serves.
            ctx: how to wait.
            fallback: what an earlier mount kept, which will do while the first answer is on its way;
                None where only this mount's own will.

        Raises:
            ApiError: what `load` raised, now or while that is remembered.
            OSError: EINTR or ETIMEDOUT, when this caller's wait ended before the load did.
        """
        return self._get(key, load, policy, ctx, fallback)  # type: ignore[no-any-return]

    def get_or_stream(
        self,
        key: Hashable,
        load: Loader[T],
        policy: CachePolicy,
        ctx: RequestContext,
        fallback: Callable[[], T | None] | None = None,
    ) -> T | ResultStream:
        """Return the value as `get` does, or what comes of the first one where that takes a while.

        Args and errors are those of `get`.
        """
        return self._get(key, load, policy, ctx, fallback, in_parts=True)  # type: ignore[no-any-return]

    def _get(
        self,
        key: Hashable,
        load: Loader[Any],
        policy: CachePolicy,
        ctx: RequestContext,
        fallback: Callable[[], Any] | None,
        *,
        in_parts: bool = False,
    ) -> Any:
        with self._lock:
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            was_used_at = float("-inf")
            if entry is not None and entry.has_value:
                was_used_at, entry.term.last_used = entry.term.last_used, now
                if now < entry.term.fresh_until:
                    self._telemetry.count("cache_hits")
                    ctx.depends_on(entry.term)
                    return entry.value
            ctx.mark_uncacheable()
            if entry is not None and entry.error is not None and now < entry.error_until:
                self._telemetry.count("cache_hits")
                if not entry.has_value:
                    raise entry.take_error()
                self._telemetry.count("stale_answers")
                return entry.value
            self._telemetry.count("cache_misses")
            if entry is not None and entry.is_warm and fallback is None:
                entry, was_used_at = None, float("-inf")
            is_in_use = now - was_used_at < policy.revalidate_grace_s
            flight = self._flights.get(key) or self._start(
                key, load, policy, Priority(is_demand=not is_in_use)
            )
            if is_in_use and now - flight.started < REVALIDATE_WAIT_S:
                self._telemetry.count("refreshed_behind")
                return entry.value  # type: ignore[union-attr]
        flight.interest.promote()
        if entry is None or not entry.has_value:
            return self._first(key, flight, policy, ctx, fallback, in_parts=in_parts)
        try:
            is_hopeful = entry.error is None and _kind(key) not in self._degraded_kinds
            patience_s = REVALIDATE_WAIT_S if is_hopeful else DEGRADED_WAIT_S
            patience_s = max(patience_s - (now - flight.started), 0.0)
            return ctx.with_timeout(patience_s).wait_for(flight.future)
        except errors.UNAVAILABLE_ERRORS:
            pass
        except OSError as error:
            if not errors.is_timeout(error):
                raise
            with self._lock:
                self._degraded_kinds.add(_kind(key))
        self._telemetry.count("stale_answers")
        return entry.value

    def _first(
        self,
        key: Hashable,
        flight: _InFlightLoad,
        policy: CachePolicy,
        ctx: RequestContext,
        kept: Callable[[], Any] | None,
        *,
        in_parts: bool,
    ) -> Any:
        """Return the first answer, or what an earlier mount kept, or parts, where it takes long."""
        if kept is not None or in_parts:
            patience_s = WARM_START_WAIT_S - (self._clock.monotonic() - flight.started)
            try:
                return ctx.with_timeout(max(patience_s, 0.0)).wait_for(flight.future)
            except OSError as error:
                if not errors.is_timeout(error):
                    raise
        if kept is not None:
            value = kept()
            if value is not None:
                with self._lock:
                    now = self._clock.monotonic()
                    before = self._entries.get(key)
                    if self._flights.get(key) is flight:
                        if before is not None and before.has_value:  # another reader's
                            return before.value
                        until = now + policy.stale_s
                        term = Expiry(now, last_used=now)
                        self._put(key, _Entry(value, True, term, until, is_warm=True))
                        self._telemetry.count("warm_starts")
                        return value
        return flight.parts if in_parts else ctx.wait_for(flight.future)

    def prefetch(self, key: Hashable, load: Loader[T], policy: CachePolicy) -> bool:
        """Begin to load a value for which nobody waits yet; tell whether that was needed.

        It is not where a fresh value is kept, or absence, or a load is under way.
        """
        with self._lock:
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            if key in self._flights or (
                entry is not None and now < max(entry.term.fresh_until, entry.error_until)
            ):
                return False
            self._start(key, load, policy, Priority(is_demand=False))
            return True

    def reload(self, key: Hashable, load: Loader[T], policy: CachePolicy, ctx: RequestContext) -> T:
        """Return the value as `load` gives it from now on, whatever is kept or under way."""
        with self._lock:
            flight = self._start(key, load, policy, Priority(is_demand=True))
        return ctx.wait_for(flight.future)  # type: ignore[no-any-return]

    def peek_partial(self, key: Hashable, part: Hashable) -> Any:
        """Return the part of that key of a first value that is on its way; None where none came."""
        with self._lock:
            entry, flight = self._entries.get(key), self._flights.get(key)
        is_first = entry is None or not entry.has_value
        return flight.parts.find(part) if flight is not None and is_first else None

    def is_warm(self, key: Hashable) -> bool:
        """Tell whether the value of `key` is what an earlier mount kept."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and entry.is_warm

    def peek(self, key: Hashable) -> Any:
        """Return the value that is kept for `key`, fresh or not, None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            return entry.value if entry is not None and entry.has_value else None

    def last_changed(self, key: Hashable) -> float | None:
        """Return when the value of `key` was last seen to change, seconds since 1970.

        None while it is what it was when it was first loaded.
        """
        with self._lock:
            entry = self._entries.get(key)
            return entry.last_changed if entry is not None else None

    def update(self, key: Hashable, change: Callable[[T], T], *, is_authoritative: bool) -> None:
        """Change the value that is kept, after the thing itself was changed.

        A load that is under way began before the change: its waiters get it, it is not kept.

        Args:
            key: whose value.
            change: returns the new value for the old one.
            is_authoritative: the new value is the truth; else it is asked for again at the next look.
        """
        with self._lock:
            self._flights.pop(key, None)
            self._amendments += 1
            entry = self._entries.get(key)
            if entry is not None and entry.has_value:
                term = replace(entry.term) if is_authoritative else Expiry(self._clock.monotonic())
                value, now = change(entry.value), self._clock.now()
                self._put(key, replace(entry, value=value, term=term, last_changed=now))

    def expire(self, key: Hashable) -> None:
        """Let the next `get` ask again: the value may be another one by now.

        A load in flight may have begun before that: its waiters get it, it is not cached.
        """
        with self._lock:
            self._flights.pop(key, None)
            entry = self._entries.get(key)
            if entry is not None and entry.has_value:
                self._put(key, replace(entry, term=Expiry(self._clock.monotonic()), error=None))

    def put(self, key: Hashable, value: object, policy: CachePolicy) -> None:
        """Cache a value that came by another way."""
        with self._lock:
            self._flights.pop(key, None)
            self._store_value(key, value, self._entries.get(key), policy, is_change=False)

    def drop(self, key: Hashable) -> None:
        """Drop a value; a load in flight is not cached."""
        with self._lock:
            self._flights.pop(key, None)
            entry = self._entries.pop(key, None)
            if entry is not None:
                entry.term.fresh_until = _ENDED
                self._epoch += 1

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._flights.clear()
            for entry in self._entries.values():
                entry.term.fresh_until = _ENDED
            self._entries.clear()
            self._degraded_kinds.clear()
            self._epoch += 1

    def _put(self, key: Hashable, entry: _Entry) -> None:
        """Keep an entry in place of the one that is there; the caller holds the lock."""
        before = self._entries.get(key)
        if before is not None and before is not entry:
            before.term.fresh_until = _ENDED  # who rests on it asks again
        self._entries[key] = entry
        self._epoch += 1

    def _start(
        self, key: Hashable, load: Loader[T], policy: CachePolicy, priority: Priority
    ) -> _InFlightLoad:
        """Begin a load; the caller holds the lock."""
        flight = _InFlightLoad(Future(), self._clock.monotonic(), priority, ResultStream())
        self._flights[key] = flight
        priority.on_partial = flight.parts.add

        def fly() -> T:
            try:
                value = load(priority)
            except errors.ApiError as error:
                self._complete(key, flight, policy, error=error)
                raise
            except BaseException:
                self._complete(key, flight, policy)
                raise
            before = self.peek(key)  # compared without the lock: a listing may be long
            is_change = before is not None and before != value
            if before is not None and not is_change:
                value = before  # one of two that are alike is enough, and all that is made of it
            self._complete(key, flight, policy, value=(value,), is_change=is_change)
            return value

        flight.future = run_in_thread(fly, f"load {_words(key)}")
        flight.future.add_done_callback(flight.parts.close)
        return flight

    def _complete(
        self,
        key: Hashable,
        flight: _InFlightLoad,
        policy: CachePolicy,
        *,
        value: tuple[Any] | None = None,
        is_change: bool = False,
        error: errors.ApiError | None = None,
    ) -> None:
        """Keep the outcome of a load, unless a change or a newer load came in between."""
        with self._lock:
            if self._flights.get(key) is not flight:
                return
            del self._flights[key]
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
            if is_outage and entry is not None and entry.has_value and not entry.is_warm:
                entry.error, entry.error_until = error, now + policy.error_ttl_s(error)
            elif is_outage and not flight.interest.is_demand:
                return  # a guess that failed: who wants to know asks, and is told
            else:
                until = now + policy.error_ttl_s(error)
                is_untold = not flight.interest.is_demand
                entry = _Entry(
                    None, False, Expiry(now), until, error, until, is_unreported=is_untold
                )
                self._put(key, entry)
                return
        if not error.is_local:
            self._telemetry.record_error(
                _words(key), "refresh", errors.os_error_from_api(error, "")
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
        """Keep a value that has just come; the caller holds the lock."""
        now = self._clock.monotonic()
        fresh_until = now + policy.ttl_s
        kept_until = max(fresh_until, now + policy.stale_s)
        if before is not None and before.has_value and before.value is value:
            before.term.fresh_until, before.kept_until = fresh_until, kept_until
            before.error, before.is_warm = None, False
            self._entries[key] = before  # by its new time; nothing else is another now
            return
        entry = _Entry(value, True, Expiry(fresh_until), kept_until)
        if before is not None and before.has_value:
            entry.term.last_used, entry.last_changed = before.term.last_used, before.last_changed
        if is_change:
            entry.last_changed = self._clock.now()
        self._put(key, entry)


def _kind(key: Hashable) -> Hashable:
    """Return what a key has in common with those that ask the same thing of others."""
    return key[0] if isinstance(key, tuple) else key


def _words(key: Hashable) -> str:
    return " ".join(str(part) for part in key) if isinstance(key, tuple) else str(key)
