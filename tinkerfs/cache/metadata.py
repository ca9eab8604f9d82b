"""Metadata cache: TTL, single flight, negative entries, last good answer on an outage.

What it saves: a call for each of the thousands of stats that a walk makes. A miss is asked once
however many wait for it, and its outcome, error included, is everybody's: cachetools' own locking
lets the waiters of a failing key fail one after the other (measured: 16 waiters, 16 time-outs).
No lock is held while a value is loaded.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from cachetools import TLRUCache

from tinkerfs import errors
from tinkerfs.cache.flight import in_thread
from tinkerfs.call import Call
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.telemetry import Telemetry

__all__ = ["MetadataCache", "Policy"]

T = TypeVar("T")

#: How long a failure that says nothing about the thing is remembered, seconds: long enough that a
#: walk during an outage makes few calls, short enough that recovery is noticed at once.
FAILURE_TTL_S = 2.0

#: How long somebody who has a last good answer waits for a newer one, seconds.
PATIENCE_S = 2.0

#: Entries kept; a listing is one entry.
MAX_ENTRIES = 262_144


@dataclass(frozen=True, slots=True)
class Policy:
    """How long what is loaded serves.

    Attributes:
        ttl_s: a value is fresh this long.
        stale_s: and serves so long altogether where newer ones cannot be had.
        negative_ttl_s: absence (an error of `negative`) is remembered this long.
        negative: the errors that are answers.
        missing_ttl_s: that the server has no such endpoint is remembered this long; None for
            `negative_ttl_s`.
    """

    ttl_s: float
    stale_s: float
    negative_ttl_s: float
    negative: tuple[type[errors.ApiError], ...] = (errors.NotFound, errors.EndpointMissing)
    missing_ttl_s: float | None = None

    def error_ttl_s(self, error: errors.ApiError) -> float:
        """Return how long a failure is remembered, seconds."""
        if self.missing_ttl_s is not None and isinstance(error, errors.EndpointMissing):
            return self.missing_ttl_s
        return self.negative_ttl_s if isinstance(error, self.negative) else FAILURE_TTL_S


@dataclass(slots=True)
class _Entry:
    """A value with its age, or an error that is remembered; `error` rules while it is fresh."""

    value: Any
    has_value: bool
    fresh_until: float
    kept_until: float
    error: errors.ApiError | None = None
    error_until: float = 0.0


@dataclass(slots=True)
class _Flight:
    future: "Future[Any]"
    started: float


class MetadataCache:
    """Values by key, loaded when asked for. Thread-safe."""

    def __init__(self, telemetry: Telemetry, clock: Clock = SYSTEM_CLOCK) -> None:
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._entries: TLRUCache[Hashable, _Entry] = TLRUCache(
            MAX_ENTRIES, ttu=lambda _key, entry, _now: entry.kept_until, timer=clock.monotonic
        )
        self._flights: dict[Hashable, _Flight] = {}

    def get(self, key: Hashable, load: Callable[[], T], policy: Policy, call: Call) -> T:
        """Return the value of `key`, loading it where no fresh one is kept.

        Raises:
            ApiError: what `load` raised, now or while that is remembered.
            OSError: EINTR or ETIMEDOUT, when this caller's wait ended before the load did.
        """
        with self._lock:
            now = self._clock.monotonic()
            entry = self._entries.get(key)
            if entry is not None and entry.has_value and now < entry.fresh_until:
                self._telemetry.count("cache_hits")
                return entry.value  # type: ignore[no-any-return]
            if entry is not None and entry.error is not None and now < entry.error_until:
                self._telemetry.count("cache_hits")
                if not entry.has_value:
                    raise entry.error.remembered()
                self._telemetry.count("stale_answers")
                return entry.value  # type: ignore[no-any-return]
            self._telemetry.count("cache_misses")
            flight = self._flights.get(key) or self._start(key, load, policy)
        if entry is None or not entry.has_value:
            return call.wait(flight.future)  # type: ignore[no-any-return]
        try:
            patience_s = max(PATIENCE_S - (now - flight.started), 0.0)
            return call.within(patience_s).wait(flight.future)  # type: ignore[no-any-return]
        except errors.OUTAGES:
            pass
        except OSError as error:
            if not errors.is_timeout(error):
                raise
        self._telemetry.count("stale_answers")
        return entry.value  # type: ignore[no-any-return]

    def reload(self, key: Hashable, load: Callable[[], T], policy: Policy, call: Call) -> T:
        """Return the value as `load` gives it from now on, whatever is kept or under way."""
        with self._lock:
            flight = self._start(key, load, policy)
        return call.wait(flight.future)  # type: ignore[no-any-return]

    def peek(self, key: Hashable) -> Any:
        """Return the value that is kept for `key`, fresh or not, None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            return entry.value if entry is not None and entry.has_value else None

    def amend(self, key: Hashable, change: Callable[[T], T], *, is_exact: bool) -> None:
        """Change the value that is kept, after the thing itself was changed.

        A load that is under way began before the change: its waiters get it, it is not kept.

        Args:
            key: whose value.
            change: returns the new value for the old one.
            is_exact: the new value is the truth; else it is asked for again at the next look.
        """
        with self._lock:
            self._flights.pop(key, None)
            entry = self._entries.get(key)
            if entry is not None and entry.has_value:
                entry.value = change(entry.value)
                if not is_exact:
                    entry.fresh_until = self._clock.monotonic()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._flights.clear()
            self._entries.clear()

    def _start(self, key: Hashable, load: Callable[[], T], policy: Policy) -> _Flight:
        """Begin a load; the caller holds the lock."""
        flight = _Flight(Future(), self._clock.monotonic())
        self._flights[key] = flight

        def fly() -> T:
            try:
                value = load()
            except errors.ApiError as error:
                self._land(key, flight, policy, error=error)
                raise
            except BaseException:
                self._land(key, flight, policy)
                raise
            self._land(key, flight, policy, value=(value,))
            return value

        flight.future = in_thread(fly, f"load {_words(key)}")
        return flight

    def _land(
        self,
        key: Hashable,
        flight: _Flight,
        policy: Policy,
        *,
        value: tuple[Any] | None = None,
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
                fresh_until = now + policy.ttl_s
                self._entries[key] = _Entry(
                    value[0], True, fresh_until, max(fresh_until, now + policy.stale_s)
                )
                return
            if error is None:
                return
            is_outage = isinstance(error, errors.OUTAGES)
            if is_outage and entry is not None and entry.has_value:
                entry.error, entry.error_until = error, now + FAILURE_TTL_S
            else:
                until = now + policy.error_ttl_s(error)
                self._entries[key] = _Entry(None, False, now, until, error, until)
                return
        self._telemetry.failed(_words(key), "refresh", errors.from_api(error, ""))


def _words(key: Hashable) -> str:
    return " ".join(str(part) for part in key) if isinstance(key, tuple) else str(key)
