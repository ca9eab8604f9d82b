"""Capability cache: remembers which endpoints a server does not implement.

SkyRL has neither publish nor delete, hatchery has no list of runs, and a newer official service has
no archives. Without this cache a walk over 500 checkpoints sends 500 requests to a missing
endpoint.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.clock import Clock

#: An unsupported endpoint is not requested again for this long, seconds.
UNSUPPORTED_TTL_S = 600.0
#: Consecutive refusals after which a capability counts as unsupported. A single refusal may concern
#: only one checkpoint: the server rejects its name, or its archive is lost.
UNSUPPORTED_THRESHOLD = 3


@dataclass(slots=True)
class _CapabilityState:
    """State of one capability; guarded by the lock of `CapabilityCache`."""

    refusals: int = 0
    last_refusal: errors.ApiError | None = None
    refused_at: float = 0.0
    is_supported: bool = False


class CapabilityCache:
    """Unsupported capabilities of one server. Thread-safe.

    A capability that has worked once is never considered unsupported.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[Hashable, _CapabilityState] = {}  # guarded by _lock

    @contextmanager
    def guard(
        self,
        capability: Hashable,
        refusal: type[errors.ApiError] = errors.UnsupportedEndpoint,
        *,
        threshold: int = UNSUPPORTED_THRESHOLD,
    ) -> Iterator[None]:
        """Run a request unless its capability is unsupported, and record its outcome.

        Args:
            capability: any key, such as the label of an endpoint.
            refusal: the error by which the server reports a missing capability.
            threshold: consecutive refusals after which the capability counts as unsupported.

        Raises:
            ApiError: a copy of the last refusal, without a request.
        """
        self.check(capability, threshold=threshold)
        with self._lock:
            state = self._states.setdefault(capability, _CapabilityState())
        try:
            yield
        except refusal as error:
            with self._lock:
                if not state.is_supported:
                    state.refusals, state.last_refusal = state.refusals + 1, error
                    state.refused_at = self._clock.monotonic()
            raise
        with self._lock:
            state.refusals, state.last_refusal, state.is_supported = 0, None, True

    def check(self, capability: Hashable, *, threshold: int = UNSUPPORTED_THRESHOLD) -> None:
        """Raise a copy of the last refusal if the capability is unsupported."""
        with self._lock:
            state = self._states.get(capability)
            if state is None or state.last_refusal is None or state.refusals < threshold:
                return
            if self._clock.monotonic() < state.refused_at + UNSUPPORTED_TTL_S:
                raise state.last_refusal.as_local()

    def reset(self) -> None:
        """Forget all capabilities, so that every endpoint is requested again."""
        with self._lock:
            self._states.clear()
