"""Circuit breakers: requests that would fail anyway fail at once, except for probes.

A breaker opens after a few failures in a row. There are two reasons to have one per endpoint:

- An outage. Without a breaker each file of a walk waits for its own timeout: 30 s per file while
  the server hangs.
- An endpoint that the server does not implement. SkyRL has neither publish nor delete, hatchery has
  no list of runs, and a newer official service has no archives. Without a breaker a walk over 500
  checkpoints sends 500 requests to a missing endpoint.
"""

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tinkerfs import errors
from tinkerfs.clock import Clock

#: An unsupported endpoint is requested again after this time, seconds.
UNSUPPORTED_TTL_S = 600.0

_NO_RESPONSE_ERRORS = (errors.ConnectionFailed, errors.RequestTimeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a breaker opens, and how it closes again.

    Attributes:
        trip_on: errors that count as failures.
        threshold: number of consecutive failures at which the breaker opens.
        no_response_threshold: the same if the last request got no response.
        reset_after_s: delay before a probe, after the breaker opened or a probe failed, seconds.
        probe_timeout_s: timeout of a probe, seconds; twice the slowest success if that is longer.
        sticky_success: whether a breaker stays closed for good after a success. Other errors than
            `trip_on` then count neither as a success nor as a failure.
    """

    trip_on: tuple[type[errors.ApiError], ...]
    threshold: int
    no_response_threshold: int
    reset_after_s: float
    probe_timeout_s: float = math.inf
    sticky_success: bool = False


#: An endpoint that fails or hangs. A request counts once, with all its retries. A request without a
#: response counts more, because it took the whole timeout. A 429 does not count: the server works,
#: and says when to retry.
OUTAGE = BreakerPolicy(
    trip_on=(
        errors.ServerError,
        errors.ConnectionFailed,
        errors.RequestTimeout,
        errors.UntrustedCertificate,
        errors.ProtocolError,
    ),
    threshold=3,
    no_response_threshold=2,
    reset_after_s=1.0,
    probe_timeout_s=2.0,
)
#: An endpoint that the server may not implement. A single refusal may concern only one checkpoint:
#: the server rejects its name, or its archive is lost.
UNSUPPORTED = BreakerPolicy(
    trip_on=(errors.UnsupportedEndpoint,),
    threshold=3,
    no_response_threshold=3,
    reset_after_s=UNSUPPORTED_TTL_S,
    sticky_success=True,
)
#: The same for an endpoint without parameters: every refusal is about the endpoint.
UNSUPPORTED_LISTING = replace(UNSUPPORTED, threshold=1, no_response_threshold=1)
#: The same for an endpoint that rejects what it does not support as a bad request.
UNSUPPORTED_KIND = replace(UNSUPPORTED, trip_on=(errors.BadRequest,))
#: The same for a page size, which the first refusal settles.
UNSUPPORTED_PAGE_SIZE = replace(UNSUPPORTED_KIND, threshold=1, no_response_threshold=1)


@dataclass(slots=True)
class _Breaker:
    """One circuit breaker; guarded by the lock of `CircuitBreakers`.

    Attributes:
        slowest_s: duration of the slowest success, seconds.
        next_probe_at: infinite while a probe is in flight.
    """

    policy: BreakerPolicy
    failures: int = 0
    last_error: errors.ApiError | None = None
    has_succeeded: bool = False
    slowest_s: float = 0.0
    next_probe_at: float = 0.0

    @property
    def is_open(self) -> bool:
        has_no_response = isinstance(self.last_error, _NO_RESPONSE_ERRORS)
        policy = self.policy
        return self.failures >= (
            policy.no_response_threshold if has_no_response else policy.threshold
        )

    def check_probe(self, now: float) -> None:
        """Raise the last error if it is not yet time for a probe."""
        if now < self.next_probe_at:
            assert self.last_error is not None
            raise self.last_error.as_local()

    def start_probe(self, now: float, *, is_long_running: bool) -> float:
        """Return the latest end of a probe that starts now, or raise the last error."""
        self.check_probe(now)
        if is_long_running:
            self.next_probe_at = now + self.policy.reset_after_s
            return math.inf
        self.next_probe_at = math.inf
        return now + max(self.policy.probe_timeout_s, 2 * self.slowest_s)

    def record_success(self, duration_s: float) -> None:
        self.failures, self.last_error, self.has_succeeded = 0, None, True
        self.slowest_s = max(self.slowest_s, duration_s)

    def record_failure(self, error: errors.ApiError, now: float, *, is_probe: bool) -> None:
        if self.policy.sticky_success and self.has_succeeded:
            return
        is_probe = is_probe or not self.is_open
        self.failures, self.last_error = self.failures + 1, error
        if is_probe:  # not a request that was sent before the breaker opened
            self.next_probe_at = now + self.policy.reset_after_s


class CircuitBreakers:
    """One circuit breaker per policy and key. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._breakers: dict[tuple[BreakerPolicy, Hashable], _Breaker] = {}  # guarded by _lock

    def reset(self) -> None:
        """Close all breakers, and forget what has worked."""
        with self._lock:
            self._breakers.clear()

    def is_open(self, policy: BreakerPolicy, key: Hashable) -> bool:
        """Return whether a breaker is open, so that only probes are sent."""
        with self._lock:
            breaker = self._breakers.get((policy, key))
            return breaker is not None and breaker.is_open

    def check(self, policy: BreakerPolicy, key: Hashable) -> None:
        """Raise a copy of the last error if `guard` would; start no probe.

        Raises:
            ApiError: as `guard`.
        """
        with self._lock:
            breaker = self._breakers.get((policy, key))
            if breaker is not None and breaker.is_open:
                breaker.check_probe(self._clock.monotonic())

    @contextmanager
    def guard(
        self,
        policy: BreakerPolicy,
        key: Hashable,
        deadline: float = math.inf,
        *,
        is_long_running: bool = False,
    ) -> Iterator[float]:
        """Run a request unless its breaker is open, and record the outcome.

        Args:
            policy: the policy of the breaker.
            key: what the breaker is for, such as the label of an endpoint.
            deadline: of the request, on the monotonic clock.
            is_long_running: whether the server may delay its response for minutes. A timeout is
                then not counted as a failure, and a probe keeps the whole deadline.

        Yields:
            The deadline of the request; an earlier one if the request is a probe.

        Raises:
            ApiError: a copy of the last error, without a request. The breaker is open, and it is
                not yet time for the next probe.
        """
        started_at = self._clock.monotonic()
        with self._lock:
            breaker = self._breakers.setdefault((policy, key), _Breaker(policy))
            is_probe = breaker.is_open
            if is_probe:
                probe_ends_at = breaker.start_probe(started_at, is_long_running=is_long_running)
                deadline = min(deadline, probe_ends_at)
        failure: errors.ApiError | None = None
        is_outcome = True
        try:
            yield deadline
        except errors.ApiError as error:
            failure = error if isinstance(error, policy.trip_on) else None
            is_delayed = (
                is_long_running
                and isinstance(error, errors.RequestTimeout)
                and not error.request_not_sent
            )
            # A local error says nothing about the endpoint: no request was sent.
            is_outcome = not (error.is_local or is_delayed)
            is_outcome = is_outcome and (failure is not None or not policy.sticky_success)
            raise
        finally:
            with self._lock:
                now = self._clock.monotonic()
                if is_outcome and failure is None:
                    breaker.record_success(now - started_at)
                elif is_outcome and failure is not None:
                    breaker.record_failure(failure, now, is_probe=is_probe)
                elif is_probe and not is_long_running:
                    breaker.next_probe_at = now
