"""Circuit breakers: requests to a failing endpoint fail at once, except probes.

Without a breaker each file of a walk waits for its own timeout: 30 s per file while the server
hangs. Each endpoint has its own breaker, because a status 500 of one endpoint says nothing about
the others.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.clock import Clock

#: Consecutive failed requests, each with all its retries, after which the breaker opens.
FAILURE_THRESHOLD = 3
#: The same if the last request got no response: each one took the whole timeout.
NO_RESPONSE_THRESHOLD = 2
#: Delay between two probes of an open breaker, seconds.
PROBE_INTERVAL_S = 1.0
#: Timeout of a probe, seconds; twice the slowest success if that is longer.
PROBE_TIMEOUT_S = 2.0

#: Errors that count as failures. A 429 does not: the server works, and says when to retry.
_TRIPPING_ERRORS = (
    errors.ServerError,
    errors.ConnectionFailed,
    errors.RequestTimeout,
    errors.UntrustedCertificate,
    errors.ProtocolError,
)
_NO_RESPONSE_ERRORS = (errors.ConnectionFailed, errors.RequestTimeout)


@dataclass(slots=True)
class _CircuitState:
    """State of the breaker of one endpoint; guarded by the lock of `CircuitBreakers`."""

    failures: int = 0
    last_error: errors.ApiError | None = None
    slowest_s: float = 0.0
    is_half_open: bool = False
    next_probe_at: float = 0.0

    @property
    def is_open(self) -> bool:
        has_no_response = isinstance(self.last_error, _NO_RESPONSE_ERRORS)
        return self.failures >= (NO_RESPONSE_THRESHOLD if has_no_response else FAILURE_THRESHOLD)


class CircuitBreakers:
    """One circuit breaker per endpoint label. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[str, _CircuitState] = {}  # guarded by _lock

    def reset(self) -> None:
        """Close all breakers."""
        with self._lock:
            self._states.clear()

    def is_open(self, label: str) -> bool:
        """Return whether the breaker of an endpoint is open, so that only probes are sent."""
        with self._lock:
            state = self._states.get(label)
            return state is not None and state.is_open

    @contextmanager
    def guard(
        self, label: str, deadline: float, *, is_long_running: bool = False
    ) -> Iterator[float]:
        """Run a request unless its endpoint's breaker is open, and record the outcome.

        Args:
            label: label of the endpoint.
            deadline: of the request, on the monotonic clock.
            is_long_running: whether the server may delay its response for minutes. A timeout is
                then not counted as a failure, and a probe keeps the whole deadline.

        Yields:
            The deadline of the request; an earlier one if the request is a probe.

        Raises:
            ApiError: a copy of the last error, without a request. The breaker is open, and a probe
                is in flight or was sent less than `PROBE_INTERVAL_S` ago.
        """
        started_at = self._clock.monotonic()
        with self._lock:
            state = self._states.setdefault(label, _CircuitState())
            is_probe = state.is_open
            if is_probe and is_long_running:
                if started_at < state.next_probe_at:
                    assert state.last_error is not None
                    raise state.last_error.as_local()
                state.next_probe_at = started_at + PROBE_INTERVAL_S
            elif is_probe:
                if state.is_half_open or started_at < state.next_probe_at:
                    assert state.last_error is not None
                    raise state.last_error.as_local()
                state.is_half_open = True
                timeout_s = max(PROBE_TIMEOUT_S, 2 * state.slowest_s)
                deadline = min(deadline, started_at + timeout_s)
        failure: errors.ApiError | None = None
        is_outcome = True
        try:
            yield deadline
        except errors.ApiError as error:
            failure = error if isinstance(error, _TRIPPING_ERRORS) else None
            # A local error says nothing about the endpoint: no request was sent.
            is_delayed = (
                is_long_running
                and isinstance(error, errors.RequestTimeout)
                and not error.request_not_sent
            )
            is_outcome = not (error.is_local or is_delayed)
            raise
        finally:
            with self._lock:
                now = self._clock.monotonic()
                if is_probe and not is_long_running:
                    state.is_half_open, state.next_probe_at = False, now + PROBE_INTERVAL_S
                if is_outcome and failure is None:
                    state.failures, state.last_error, state.next_probe_at = 0, None, 0.0
                    state.slowest_s = max(state.slowest_s, now - started_at)
                elif is_outcome:
                    state.failures, state.last_error = state.failures + 1, failure
