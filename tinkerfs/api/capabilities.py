"""What a server has turned out to lack, so that it is asked for it again rarely.

SkyRL has neither publish nor delete, hatchery no list of runs, and a newer official service no
archives. Without this, a walk over 500 checkpoints asks 500 times for what is not there.
"""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.clock import Clock

#: What a server lacks it is not asked for again for this long, seconds.
UNSUPPORTED_TTL_S = 600.0
#: One refusal may be about the one checkpoint that was asked about: it has a name that the server
#: does not take, or its archive is lost. As many in a row without a success are about all.
UNSUPPORTED_THRESHOLD = 3


@dataclass(slots=True)
class _State:
    """What is known of one thing that servers may lack; guarded by the lock of `Lacks`."""

    refusals: int = 0
    last: errors.ApiError | None = None
    asked_at: float = 0.0
    is_supported: bool = False


class CapabilityCache:
    """What one server lacks. Thread-safe.

    What has worked once is there, whatever is said of it later.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[Hashable, _State] = {}  # guarded by _lock

    @contextmanager
    def guard(
        self,
        what: Hashable,
        refusal: type[errors.ApiError] = errors.UnsupportedEndpoint,
        *,
        refusals: int = UNSUPPORTED_THRESHOLD,
    ) -> Iterator[None]:
        """Let a call through where its answer is not known yet, and learn from how it ends.

        Args:
            what: names what the server may lack.
            refusal: the failure that says so.
            refusals: how many of them in a row are about more than what was asked for.

        Raises:
            ApiError: the last refusal, told again.
        """
        with self._lock:
            state = self._states.setdefault(what, _State())
            is_fresh = self._clock.monotonic() < state.asked_at + UNSUPPORTED_TTL_S
            if state.last is not None and state.refusals >= refusals and is_fresh:
                raise state.last.as_local()
        try:
            yield
        except refusal as error:
            with self._lock:
                if not state.is_supported:
                    state.refusals, state.last = state.refusals + 1, error
                    state.asked_at = self._clock.monotonic()
            raise
        with self._lock:
            state.refusals, state.last, state.is_supported = 0, None, True

    def reset(self) -> None:
        """Ask for everything anew."""
        with self._lock:
            self._states.clear()
