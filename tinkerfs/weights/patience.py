"""How often a transfer is tried again: anew whenever it got on, and never without a bound.

A file operation waits for it, so a dead store has to be told in time; a slow one that moves is left
alone.
"""

import random
import time

from tinkerfs.errors import ApiError

__all__ = ["Lost", "Patience"]

#: Failures in a row, without `PROGRESS_BYTES` in between, that end it; of them without any way to
#: the store; and stalls, which take `timeout_s` each.
MAX_FAILURES = 8
MAX_UNCONNECTED = 2
MAX_STALLS = 2
PROGRESS_BYTES = 64 << 10

#: Waits between tries, seconds: the first, and the longest.
BACKOFF_S = (0.1, 5.0)


class Lost(Exception):
    """No usable answer, or not all of it.

    Attributes:
        error: what is told if that stays so.
        wait_s: how long the store wants to be left alone.
        is_stall: it took `timeout_s` to find out.
        is_unconnected: there was no connection.
    """

    def __init__(
        self,
        error: ApiError,
        *,
        wait_s: float | None = None,
        is_stall: bool = False,
        is_unconnected: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        self.is_stall = is_stall
        self.is_unconnected = is_unconnected


class Patience:
    """How often one transfer is tried again: anew whenever it got on. One thread's."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reset()

    def _reset(self) -> None:
        self._failures = self._stalls = self._unconnected = self._gained_bytes = 0
        self._since = time.monotonic()

    def gained(self, size_bytes: int) -> None:
        """Take note of bytes that came."""
        self._gained_bytes += size_bytes
        if self._gained_bytes >= PROGRESS_BYTES:
            self._reset()

    def lost(self, lost: Lost) -> None:
        """Wait before the next try.

        Raises:
            ApiError: there is to be none.
        """
        self._failures += 1
        self._stalls += lost.is_stall
        self._unconnected += lost.is_unconnected
        first_s, longest_s = BACKOFF_S
        wait_s = 0.0 if self._failures == 1 else min(first_s * 2.0**self._failures, longest_s)
        if lost.wait_s is not None:
            wait_s = lost.wait_s
        elif wait_s:
            wait_s *= random.uniform(0.75, 1)
        spent_s = time.monotonic() - self._since - self._stalls * self._timeout_s
        if (
            self._failures >= MAX_FAILURES
            or self._stalls >= MAX_STALLS
            or self._unconnected >= MAX_UNCONNECTED
            or spent_s + wait_s > self._timeout_s
        ):
            raise lost.error
        time.sleep(wait_s)
