"""Concurrency limiter of the API requests of one mount.

Every API request acquires a permit here. Thread-safe; of HTTP the limiter knows only statuses.

- After a 429 the limit is halved. Then it grows by one after `SUCCESSES_PER_INCREASE` successes per
  permit (AIMD).
- No request starts while a Retry-After is in effect.
- Demand requests take precedence over prefetches, which always leave one permit free.
- An endpoint that has not responded recently also leaves one permit free for the other endpoints,
  because a request holds its permit until it gets a response or times out.
- Archive requests need no permit, because they may take minutes. They obey a Retry-After, and
  `weights/url_cache.py` limits their rate.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tinkerfs import errors
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.clock import Clock
from tinkerfs.context import Priority

#: The limit grows by one after this number of successes per permit.
SUCCESSES_PER_INCREASE = 2

#: Maximum pause after a Retry-After, seconds; a longer one is shortened to this.
MAX_RETRY_AFTER_S = 3600.0

#: How often the first waiting request checks whether a pause has ended, and how often the others
#: check whether they have become the first, seconds.
_FIRST_POLL_S, _OTHER_POLL_S = 0.02, 0.25


@dataclass(slots=True, eq=False)
class Permit:
    """Permit of one request.

    Attributes:
        seq: sequence number of the permit.
        status: status of the response; the holder sets it.
        retry_after_s: delay that the server requested, seconds; the holder sets it.
        granted: set when the request may start.
    """

    endpoint: Endpoint
    priority: Priority
    seq: int
    status: int | None = None
    retry_after_s: float | None = None
    granted: threading.Event = field(default_factory=threading.Event)


class ConcurrencyLimiter:
    """Grants permits for the API requests of one mount. Thread-safe.

    Args:
        limit: maximum number of requests in flight, 1 or more.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._max_limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._current_limit = limit
        self._successes = 0  # since `_current_limit` changed
        self._seq = 0
        #: Newest permit at the time of the last decrease. A 429 of an older permit belongs to the
        #: same burst, and does not decrease the limit again.
        self._last_decrease_seq = 0
        self._paused_until = float("-inf")
        self._pause_status = 0
        self._running: set[Permit] = set()
        self._queue: dict[Permit, None] = {}
        #: Endpoints that responded while their requests held all permits but one.
        self._responsive_endpoints: set[str] = set()

    @property
    def limit(self) -> int:
        """The current maximum number of requests in flight."""
        with self._lock:
            return self._current_limit

    @property
    def running(self) -> int:
        """The number of permits that are held."""
        with self._lock:
            return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a permit."""
        with self._lock:
            return len(self._queue)

    @contextmanager
    def acquire(self, endpoint: Endpoint, deadline: float, priority: Priority) -> Iterator[Permit]:
        """Wait for a permit and hold it in the body.

        The body sets the response's status on the permit. The deadline is on the monotonic clock.
        If the priority is promoted while the request waits, it becomes a demand request.

        Raises:
            ApiError: no permit was granted before the deadline. RateLimited or ServerError if a
                Retry-After lasts longer, otherwise RequestTimeout. No request was sent.
        """
        if not priority.is_demand:
            priority.on_promoted = self._redispatch
        with self._lock:
            self._seq += 1
            permit = Permit(endpoint, priority, self._seq)
            self._queue[permit] = None
            self._dispatch()
        try:
            self._wait(permit, deadline)
            yield permit
        finally:
            with self._lock:
                self._queue.pop(permit, None)
                self._running.discard(permit)
                if not self._count(endpoint.label):
                    self._responsive_endpoints.discard(endpoint.label)
                if permit.status is not None:
                    self._record_status(permit, permit.status)
                self._dispatch()

    def _redispatch(self) -> None:
        """Grant permits after a prefetch has been promoted to a demand request."""
        with self._lock:
            self._dispatch()

    def _wait(self, permit: Permit, deadline: float) -> None:
        while not permit.granted.is_set():
            with self._lock:
                self._dispatch()
                now = self._clock.monotonic()
                pause_s = self._paused_until - now
                is_too_late = now >= deadline or now + pause_s >= deadline
                if not permit.granted.is_set() and is_too_late:
                    raise self._rejection_error(permit, max(pause_s, 0.0)).as_local()
                is_first = next(iter(self._queue), None) is permit
            permit.granted.wait(min(deadline - now, _FIRST_POLL_S if is_first else _OTHER_POLL_S))

    def _rejection_error(self, permit: Permit, pause_s: float) -> errors.ApiError:
        label = permit.endpoint.label
        if pause_s:
            kind = errors.RateLimited if self._pause_status == 429 else errors.ServerError
            message = f"the server asked for no requests for another {pause_s:.0f} s"
            return kind(message, endpoint=label, status=self._pause_status)
        return errors.RequestTimeout(
            f"request not started in time: {len(self._running)} other requests are in flight"
            " (hint: raise --concurrency)",
            endpoint=label,
        )

    def _dispatch(self) -> None:
        """Grant all available permits; the caller holds the lock."""
        now = self._clock.monotonic()
        if now < self._paused_until:
            return
        while self._queue and (permit := self._next()) is not None:
            del self._queue[permit]
            if not permit.endpoint.is_long_running:
                self._running.add(permit)
            permit.granted.set()

    def _next(self) -> Permit | None:
        """Return the next permit to grant, None if no queued request may start."""
        is_full = len(self._running) >= self._current_limit
        prefetches = sum(not permit.priority.is_demand for permit in self._running)
        first_prefetch = None
        for permit in self._queue:
            if permit.endpoint.is_long_running:
                return permit
            if is_full or not self._has_room(permit.endpoint.label):
                continue
            if permit.priority.is_demand:
                return permit
            if first_prefetch is None and prefetches < self._limit_minus_reserved:
                first_prefetch = permit
        return first_prefetch

    @property
    def _limit_minus_reserved(self) -> int:
        return max(self._current_limit - 1, 1)

    def _has_room(self, label: str) -> bool:
        return (
            label in self._responsive_endpoints or self._count(label) < self._limit_minus_reserved
        )

    def _count(self, label: str) -> int:
        return sum(permit.endpoint.label == label for permit in self._running)

    def _record_status(self, permit: Permit, status: int) -> None:
        """Adjust the limit and the pause to a response; the caller holds the lock."""
        if self._count(permit.endpoint.label) >= self._limit_minus_reserved - 1:
            self._responsive_endpoints.add(permit.endpoint.label)
        retry_after_s = permit.retry_after_s
        is_pause = status == 429 or (
            status == 503 and status not in permit.endpoint.non_retryable_statuses
        )
        if is_pause and retry_after_s is not None:
            until = self._clock.monotonic() + min(retry_after_s, MAX_RETRY_AFTER_S)
            if until > self._paused_until:
                self._paused_until, self._pause_status = until, status
        if status == 429:
            if permit.seq > self._last_decrease_seq:
                self._current_limit = max(self._current_limit // 2, 1)
                self._last_decrease_seq, self._successes = self._seq, 0
        elif status < 500:
            self._successes += 1
            if (
                self._current_limit < self._max_limit
                and self._successes >= SUCCESSES_PER_INCREASE * self._current_limit
            ):
                self._current_limit, self._successes = self._current_limit + 1, 0
