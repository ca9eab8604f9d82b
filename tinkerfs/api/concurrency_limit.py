"""Budget: how many calls of the API one mount makes at once, and whose turn it is.

The one gate that every call passes, so that a mount is polite however many ask through it. Who
waits goes before what is only guessed that somebody will want; what the server says of the pace
holds for all. Thread-safe; knows nothing of HTTP but statuses.

- Never more than `limit` calls at once, fewer after a 429: half, and one more after every few
  answers without one. Fewer as well, down to half, while the server only queues them (`pace.py`).
- While a `Retry-After` runs no call is begun.
- Guesses leave a turn for who waits, and an endpoint that was not seen to answer meanwhile leaves
  one for the others: a turn is held until an answer, or the call's own time-out.
- Builds of archives take no turn: the server may take minutes for one, 64 may be waited for at a
  time, and how many are started is bounded by `weights/url_cache.py`. They heed a `Retry-After`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tinkerfs import errors
from tinkerfs.api.endpoints import Endpoint
from tinkerfs.api.latency_gradient import LatencyGradient
from tinkerfs.clock import Clock
from tinkerfs.context import Priority

#: After so many answers for each call that is allowed at once, one more is.
SUCCESSES_PER_INCREASE = 2

#: The longest that a server's wish to be left alone is taken at its word, seconds.
MAX_RETRY_AFTER_S = 3600.0

#: How often who waits for a turn looks whether a pause is over, seconds; the first in the row looks
#: for all, and the others whether they have become the first.
_LOOK_S, _LOOK_AGAIN_S = 0.02, 0.25


@dataclass(slots=True, eq=False)
class Permit:
    """One call's turn.

    Attributes:
        endpoint: what is asked.
        interest: whether somebody waits for the answer.
        number: grows from turn to turn.
        status: of the answer, once it is there.
        retry_after_s: how long the server asked to wait, seconds; None where it did not.
        granted: set when it may begin.
        is_full: whether then, with this call, as many were under way as guesses may be.
        began: when, on the monotonic clock.
    """

    endpoint: Endpoint
    interest: Priority
    number: int
    status: int | None = None
    retry_after_s: float | None = None
    granted: threading.Event = field(default_factory=threading.Event)
    was_saturated: bool = False
    began: float = 0.0


class ConcurrencyLimiter:
    """The turns of one mount's calls.

    Args:
        limit: the most calls at once, 1 or more.
        clock: whose `monotonic` bounds and pauses run by.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._allowed = limit  # as far as 429s say
        self._pace = LatencyGradient(limit)
        self._answers = 0  # since `_allowed` changed
        self._number = 0
        self._last_decrease_seq = (
            0  # the newest turn when `_allowed` was halved: older 429s say the same
        )
        self._paused_until = float("-inf")
        self._pause_status = 0
        self._running: set[Permit] = set()
        self._waiting: dict[Permit, None] = {}
        #: Endpoints that answer while theirs are all turns but one.
        self._responsive_endpoints: set[str] = set()

    @property
    def limit(self) -> int:
        """How many calls there may be at once now."""
        with self._lock:
            return self._allowed_now

    @contextmanager
    def acquire(self, endpoint: Endpoint, deadline: float, priority: Priority) -> Iterator[Permit]:
        """Wait for a turn, and hold it while the body runs; the body tells it the answer's status.

        Args:
            endpoint: what is asked.
            deadline: when to give up, on the monotonic clock.
            priority: whether somebody waits for the answer.

        Raises:
            ApiError: there is no turn in time, without a call: RateLimited or ServerError while the
                server wants to be left alone for longer, else TimedOut.
        """
        if not priority.is_demand:
            priority.on_promoted = self._redispatch
        with self._lock:
            self._number += 1
            turn = Permit(endpoint, priority, self._number)
            self._waiting[turn] = None
            self._dispatch()
        try:
            self._wait(turn, deadline)
            turn.began = self._clock.monotonic()
            yield turn
        finally:
            with self._lock:
                self._waiting.pop(turn, None)
                self._running.discard(turn)
                if not self._count(turn.endpoint.label):
                    self._responsive_endpoints.discard(turn.endpoint.label)
                if turn.status is not None:
                    self._learn(turn, turn.status)
                    if turn.status < 400 and not turn.endpoint.is_long_running:
                        label, ended = turn.endpoint.label, self._clock.monotonic()
                        self._pace.record(label, turn.began, ended, is_full=turn.was_saturated)
                self._dispatch()

    def _redispatch(self) -> None:
        """See who may have a turn: a guess is none any more, so that another may run."""
        with self._lock:
            self._dispatch()

    def _wait(self, turn: Permit, deadline: float) -> None:
        while not turn.granted.is_set():
            with self._lock:
                self._dispatch()
                now = self._clock.monotonic()
                pause_s = self._paused_until - now
                if not turn.granted.is_set() and (now >= deadline or now + pause_s >= deadline):
                    raise self._rejection_error(turn, max(pause_s, 0.0)).as_local()
                is_first = next(iter(self._waiting), None) is turn
            turn.granted.wait(min(deadline - now, _LOOK_S if is_first else _LOOK_AGAIN_S))

    def _rejection_error(self, turn: Permit, pause_s: float) -> errors.ApiError:
        if pause_s:
            kind = errors.RateLimited if self._pause_status == 429 else errors.ServerError
            words = f"the server asked for no calls for another {pause_s:.0f} s"
            return kind(words, endpoint=turn.endpoint.label, status=self._pause_status)
        words = f"not asked in time: {len(self._running)} other calls go on (--concurrency)"
        return errors.RequestTimeout(words, endpoint=turn.endpoint.label)

    def _dispatch(self) -> None:
        """Give out the turns that are free; the caller holds the lock."""
        now = self._clock.monotonic()
        if now < self._paused_until:
            return
        while self._waiting and (turn := self._next()) is not None:
            del self._waiting[turn]
            if not turn.endpoint.is_long_running:
                self._running.add(turn)
                turn.was_saturated = len(self._running) >= max(self._limit_minus_reserved, 2)
            turn.granted.set()

    def _next(self) -> Permit | None:
        """Return whose turn it is, None where nobody may have one."""
        is_full = len(self._running) >= self._allowed_now
        guesses = sum(not turn.interest.is_demand for turn in self._running)
        guess = None
        for turn in self._waiting:
            if turn.endpoint.is_long_running:
                return turn
            if is_full or not self._has_room(turn.endpoint.label):
                continue
            if turn.interest.is_demand:
                return turn
            if guess is None and guesses < self._limit_minus_reserved:
                guess = turn
        return guess

    @property
    def _allowed_now(self) -> int:
        return min(self._allowed, self._pace.allowed)

    @property
    def _limit_minus_reserved(self) -> int:
        return max(self._allowed_now - 1, 1)

    def _has_room(self, label: str) -> bool:
        return (
            label in self._responsive_endpoints or self._count(label) < self._limit_minus_reserved
        )

    def _count(self, label: str) -> int:
        return sum(turn.endpoint.label == label for turn in self._running)

    def _learn(self, turn: Permit, status: int) -> None:
        """Take note of what an answer says of the pace; the caller holds the lock."""
        if self._count(turn.endpoint.label) >= self._limit_minus_reserved - 1:
            self._responsive_endpoints.add(turn.endpoint.label)
        wait_s = turn.retry_after_s
        is_pause = status == 429 or (
            status == 503 and status not in turn.endpoint.non_retryable_statuses
        )
        if is_pause and wait_s is not None:
            until = self._clock.monotonic() + min(wait_s, MAX_RETRY_AFTER_S)
            if until > self._paused_until:
                self._paused_until, self._pause_status = until, status
        if status == 429:
            if turn.number > self._last_decrease_seq:
                self._allowed = max(self._allowed // 2, 1)
                self._last_decrease_seq, self._answers = self._number, 0
        elif status < 500:
            self._answers += 1
            if (
                self._allowed < self._limit
                and self._answers >= SUCCESSES_PER_INCREASE * self._allowed
            ):
                self._allowed, self._answers = self._allowed + 1, 0
