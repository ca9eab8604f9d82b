"""Retries: delays between attempts, and when to give up. No HTTP.

Every part that repeats a request takes its delays from here: API requests, transfers from a store,
polls of an archive build, and requests with a rejected key.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum, auto

from tinkerfs.clock import SYSTEM_CLOCK, Clock

#: Random factor of each delay, so that clients that failed together do not return together.
JITTER = (0.75, 1.0)

#: Longer HTTP dates are cut off.
_MAX_DATE_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that double with each failure; both bounds are in seconds.

    The delay is 0 after each of the first `immediate_retries` failures.
    """

    first_s: float
    max_s: float
    immediate_retries: int = 0

    def delay_s(self, failures: int) -> float:
        """Return the delay after a number of failures in a row, 1 or more; without jitter."""
        doublings = failures - 1 - self.immediate_retries
        return min(self.first_s * 2.0 ** min(doublings, 64), self.max_s) if doublings >= 0 else 0.0


#: Between the attempts of an API request (as in the Tinker SDK).
API_BACKOFF = Backoff(0.5, 10.0)
#: Between the attempts of a transfer from a store.
STORE_BACKOFF = Backoff(0.4, 5.0, immediate_retries=1)
#: Between requests for the URL of an archive while the API is unreachable during a transfer.
OUTAGE_BACKOFF = Backoff(0.25, 2.0)
#: Between polls of an unfinished archive if the server does not request a delay.
BUILD_POLL = Backoff(1.0, 15.0)
#: How long requests fail locally after a rejected or unavailable key.
KEY_BACKOFF = Backoff(5.0, 300.0)


class FailureKind(Enum):
    """Kinds of failure that a `RetryBudget` may limit separately."""

    NOT_SENT = auto()
    STALLED = auto()
    UNUSABLE_RESPONSE = auto()
    OTHER = auto()


class RetryBudget:
    """Limits the attempts of one operation by number and by time. Not thread-safe.

    Args:
        timeout_s: time for all attempts, seconds. A stall takes as much by itself, and so extends
            the deadline by it.
        max_failures: number of failures of a kind at which no attempt is left. Kinds that are not
            mentioned are unlimited.
        max_attempts: the same for all kinds together.
        has_last_attempt: whether the backoff ends at the deadline, for one more attempt then.
            Otherwise the operation fails as soon as the next backoff would exceed the deadline.
    """

    def __init__(
        self,
        backoff: Backoff,
        timeout_s: float,
        *,
        max_failures: Mapping[FailureKind, int] | None = None,
        max_attempts: float = math.inf,
        has_last_attempt: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._backoff = backoff
        self._timeout_s = timeout_s
        self._max_failures = max_failures or {}
        self._max_attempts = max_attempts
        self._has_last_attempt = has_last_attempt
        self._clock = clock
        self._failures: Counter[FailureKind] = Counter()
        self.restart()

    def restart(self) -> None:
        """Forget all failures and grant the whole time again, after progress."""
        self._failures.clear()
        self._deadline = self._clock.monotonic() + self._timeout_s

    def next_delay_s(
        self, kind: FailureKind = FailureKind.OTHER, requested_s: float | None = None
    ) -> float | None:
        """Count a failure; return the delay before the next attempt, None to give up.

        A requested delay, such as that of a Retry-After, replaces the backoff.
        """
        self._failures[kind] += 1
        if kind is FailureKind.STALLED:
            self._deadline += self._timeout_s
        failures, left_s = self._failures.total(), self._deadline - self._clock.monotonic()
        max_failures = self._max_failures.get(kind, math.inf)
        if left_s <= 0 or failures >= self._max_attempts or self._failures[kind] >= max_failures:
            return None
        if requested_s is not None:
            delay_s = requested_s
        else:
            delay_s = self._backoff.delay_s(failures) * random.uniform(*JITTER)
            if self._has_last_attempt:
                delay_s = min(delay_s, left_s)
        return delay_s if delay_s <= left_s else None


def parse_http_date_s(text: str) -> float | None:
    """Parse an HTTP date (RFC 9110, 5.6.7) to seconds since 1970; None if invalid."""
    try:
        when = parsedate_to_datetime(text[:_MAX_DATE_LENGTH])
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def parse_retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the delay that a response requests in seconds (>= 0), None without one.

    `retry-after-ms` (Tinker SDK) takes precedence over `Retry-After` (RFC 9110, 10.2.3), which is a
    number of seconds or an HTTP date. `now_s` is the current time in seconds since 1970.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            delay_s = float(text) * unit_s
        except ValueError:
            date_s = parse_http_date_s(text) if name == "retry-after" else None
            if date_s is not None:
                return max(date_s - now_s, 0.0)
            continue
        if math.isfinite(delay_s) and delay_s >= 0:
            return delay_s
    return None
