"""How long a transfer is tried again: from the last progress on, and never without a bound.

A store that refuses connections, whose name cannot be resolved, or that fails, is asked again until
`timeout_s` has passed without progress: a short outage fails no file operation. A slow store that
moves is left alone.
"""

import random
import time

from tinkerfs.errors import ApiError, ProtocolError

#: Responses that cannot be used, in a row without `PROGRESS_BYTES` in between, that end it; and
#: stalls, which take `timeout_s` each.
MAX_UNUSABLE = 8
MAX_STALLS = 2
PROGRESS_BYTES = 64 << 10

#: Waits between tries, seconds: the first, and the longest.
BACKOFF_S = (0.1, 5.0)


class TransferInterrupted(Exception):
    """No usable answer, or not all of it.

    Attributes:
        error: what is told if that stays so.
        wait_s: how long the store wants to be left alone.
        is_stall: it took `timeout_s` to find out.
    """

    def __init__(
        self,
        error: ApiError,
        *,
        wait_s: float | None = None,
        is_stall: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        self.is_stall = is_stall


class RetryBudget:
    """How long one transfer is tried again, from its last progress on. One thread's.

    Args:
        timeout_s: bound on the time without progress, stalls left out, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reset()

    def _reset(self) -> None:
        self._failures = self._stalls = self._unusable = self._gained_bytes = 0
        self._since = time.monotonic()

    def record_progress(self, size_bytes: int) -> None:
        """Take note of bytes that came."""
        self._gained_bytes += size_bytes
        if self._gained_bytes >= PROGRESS_BYTES:
            self._reset()

    def backoff_or_raise(self, lost: TransferInterrupted) -> None:
        """Wait before the next try.

        Raises:
            ApiError: there is to be none.
        """
        self._failures += 1
        self._stalls += lost.is_stall
        self._unusable += isinstance(lost.error, ProtocolError)
        first_s, longest_s = BACKOFF_S
        spent_s = time.monotonic() - self._since - self._stalls * self._timeout_s
        left_s = self._timeout_s - spent_s
        wait_s = 0.0
        if lost.wait_s is not None:
            wait_s = lost.wait_s
        elif self._failures > 1:
            wait_s = min(first_s * 2.0 ** min(self._failures, 16), longest_s)
            wait_s = min(wait_s * random.uniform(0.75, 1), left_s)  # a last try at the very end
        if (
            self._unusable >= MAX_UNUSABLE
            or self._stalls >= MAX_STALLS
            or left_s <= 0
            or wait_s > left_s
        ):
            raise lost.error
        time.sleep(wait_s)
