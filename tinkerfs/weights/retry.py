"""Retry budget of one transfer.

Failures and time are counted since the last `PROGRESS_BYTES` of progress. So a slow transfer that
makes progress is never aborted, a short outage fails no file operation, and a dead store is
reported within `timeout_s`.
"""

import random
import time

from tinkerfs.errors import ApiError, ProtocolError

#: Maximum numbers of invalid responses and of stalls since the last progress. Each stall takes
#: `timeout_s`.
MAX_UNUSABLE = 8
MAX_STALLS = 2
PROGRESS_BYTES = 64 << 10

#: First and longest wait between retries, seconds.
BACKOFF_S = (0.1, 5.0)


class TransferInterrupted(Exception):
    """A request got no valid response, or the response broke off.

    Attributes:
        error: raised if the retry budget is exhausted.
        wait_s: the store's Retry-After, seconds; None if it sent none.
        is_stall: whether the transfer made no progress for `timeout_s`.
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
    """Retry budget of one transfer, reset by progress. Not thread-safe.

    Args:
        timeout_s: maximum time without progress, not counting stalls, seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reset()

    def _reset(self) -> None:
        self._failures = self._stalls = self._unusable = self._progress_bytes = 0
        self._last_progress = time.monotonic()

    def record_progress(self, size_bytes: int) -> None:
        """Record received bytes; reset the budget after `PROGRESS_BYTES` of them."""
        self._progress_bytes += size_bytes
        if self._progress_bytes >= PROGRESS_BYTES:
            self._reset()

    def backoff_or_raise(self, interruption: TransferInterrupted) -> None:
        """Wait before the next attempt, or raise the error if the budget is exhausted.

        Raises:
            ApiError: the error of the interruption.
        """
        self._failures += 1
        self._stalls += interruption.is_stall
        self._unusable += isinstance(interruption.error, ProtocolError)
        first_s, longest_s = BACKOFF_S
        spent_s = time.monotonic() - self._last_progress - self._stalls * self._timeout_s
        left_s = self._timeout_s - spent_s
        wait_s = 0.0
        if interruption.wait_s is not None:
            wait_s = interruption.wait_s
        elif self._failures > 1:
            wait_s = min(first_s * 2.0 ** min(self._failures, 16), longest_s)
            wait_s = min(wait_s * random.uniform(0.75, 1), left_s)  # a last attempt at the deadline
        if (
            self._unusable >= MAX_UNUSABLE
            or self._stalls >= MAX_STALLS
            or left_s <= 0
            or wait_s > left_s
        ):
            raise interruption.error
        time.sleep(wait_s)
