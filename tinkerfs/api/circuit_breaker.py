"""Circuit breaker: while an endpoint is out, calls of it fail at once and one probe looks for it.

Without it each file of a walk waits out its own time-out: 30 s a file with a server that hangs. An
endpoint has a breaker of its own, because one that answers 500 says nothing about the others.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.clock import Clock

#: So many failures in a row, with all their retries, and the endpoint counts as out.
FAILURE_THRESHOLD = 3
#: Where not even a connection or an answer was had, each took the whole time-out.
NO_RESPONSE_THRESHOLD = 2
#: Between two probes, seconds: recovery is noticed within this, a probe's bound, and a moment.
PROBE_INTERVAL_S = 1.0
#: A probe is given up after this long, seconds, or twice the slowest success where that is more.
PROBE_TIMEOUT_S = 2.0

#: What says that a server is out. To be asked too often (429) is no outage: it says when to return.
_TRIPPING_ERRORS = (
    errors.ServerError,
    errors.ConnectionFailed,
    errors.RequestTimeout,
    errors.UntrustedCertificate,
    errors.ProtocolError,
)
_WITHOUT_ANSWER = (errors.ConnectionFailed, errors.RequestTimeout)


@dataclass(slots=True)
class _State:
    """What is known of one endpoint; guarded by the lock of the breakers."""

    failures: int = 0
    last: errors.ApiError | None = None
    slowest_s: float = 0.0
    is_half_open: bool = False
    next_probe: float = 0.0

    @property
    def is_open(self) -> bool:
        enough = (
            NO_RESPONSE_THRESHOLD if isinstance(self.last, _WITHOUT_ANSWER) else FAILURE_THRESHOLD
        )
        return self.failures >= enough


class CircuitBreakers:
    """One breaker for each endpoint, by its label. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[str, _State] = {}  # guarded by _lock

    def reset(self) -> None:
        """Take every endpoint for well."""
        with self._lock:
            self._states.clear()

    @contextmanager
    def guard(self, label: str, deadline: float, *, is_build: bool = False) -> Iterator[float]:
        """Let one call through, and learn from how it ends.

        Args:
            label: the endpoint.
            deadline: when the call would give up, on the monotonic clock.
            is_build: whether the server may hold its response while it makes something. A time-out
                says nothing of the endpoint then, and a probe has the time that others have.

        Yields:
            when to give up: sooner, where the call is the probe of an endpoint that is out.

        Raises:
            ApiError: the last failure, told again: the endpoint is out, and somebody probes it
                already or has just now.
        """
        started = self._clock.monotonic()
        with self._lock:
            state = self._states.setdefault(label, _State())
            is_probe = state.is_open
            if is_probe and is_build:
                if started < state.next_probe:
                    assert state.last is not None
                    raise state.last.as_local()
                state.next_probe = started + PROBE_INTERVAL_S
            elif is_probe:
                if state.is_half_open or started < state.next_probe:
                    assert state.last is not None
                    raise state.last.as_local()
                state.is_half_open = True
                patience_s = max(PROBE_TIMEOUT_S, 2 * state.slowest_s)
                deadline = min(deadline, started + patience_s)
        failure: errors.ApiError | None = None
        is_news = True
        try:
            yield deadline
        except errors.ApiError as error:
            failure = error if isinstance(error, _TRIPPING_ERRORS) else None
            # Of what is remembered nobody was asked: it was not its turn.
            is_held = is_build and isinstance(error, errors.RequestTimeout) and not error.is_unsent
            is_news = not (error.is_local or is_held)
            raise
        finally:
            with self._lock:
                now = self._clock.monotonic()
                if is_probe and not is_build:
                    state.is_half_open, state.next_probe = False, now + PROBE_INTERVAL_S
                if is_news and failure is None:
                    state.failures, state.last, state.next_probe = 0, None, 0.0
                    state.slowest_s = max(state.slowest_s, now - started)
                elif is_news:
                    state.failures, state.last = state.failures + 1, failure
