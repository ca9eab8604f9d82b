"""Bounds, counters and retries that all transfers from object stores share.

Unlike `http` this module does not import urllib3, so that a mount starts faster.
"""

import threading
import time

from tinkerfs import errors
from tinkerfs.errors import ApiError
from tinkerfs.operation_log import RequestRecord
from tinkerfs.retry import STORE_BACKOFF, FailureKind, RetryBudget
from tinkerfs.telemetry import Telemetry

#: The name of a request to a store in messages and counters.
STORE_ENDPOINT = "GET store"

#: The same of a request to the caching proxy of the site.
PROXY_ENDPOINT = "GET proxy"

#: The counter of received bytes by endpoint.
_BYTE_COUNTERS = {
    STORE_ENDPOINT: "store_bytes_received",
    PROXY_ENDPOINT: "blob_proxy_bytes_received",
}

#: Maximum size of a chunk. Smaller reads would contend more for the interpreter lock.
CHUNK_BYTES = 1 << 20

#: Number of failures of a kind since the last progress at which a transfer fails.
MAX_FAILURES = {FailureKind.STALLED: 2, FailureKind.UNUSABLE_RESPONSE: 8}


class TransferInterrupted(Exception):
    """A request got no valid response, or the response broke off.

    Attributes:
        error: raised if the retry budget is exhausted.
        requested_s: the store's Retry-After, seconds; None if it sent none.
    """

    def __init__(
        self,
        error: ApiError,
        kind: FailureKind = FailureKind.OTHER,
        *,
        requested_s: float | None = None,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.kind = kind
        self.requested_s = requested_s

    def wait_or_raise(self, retry_budget: RetryBudget) -> None:
        """Wait before the next attempt, or raise the error if the budget is exhausted.

        Raises:
            ApiError: `error`.
        """
        delay_s = retry_budget.next_delay_s(self.kind, self.requested_s)
        if delay_s is None:
            raise self.error
        time.sleep(delay_s)


class TransferMonitor:
    """Counts the bytes of transfers, bounds their stalls, and stops them. Thread-safe.

    Attributes:
        stall_timeout_s: how long a transfer may make almost no progress, seconds.
    """

    def __init__(self, telemetry: Telemetry, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self._telemetry = telemetry
        self._stopping = threading.Event()
        self._used_at = time.monotonic()

    def retry_budget(self) -> RetryBudget:
        """Return the budget of one transfer; progress restarts it."""
        return RetryBudget(
            STORE_BACKOFF, self.stall_timeout_s, max_failures=MAX_FAILURES, has_last_attempt=True
        )

    def record_request(self, endpoint: str, outcome: str) -> None:
        """Count a request by its status or failure."""
        self._telemetry.record_request(endpoint, outcome)

    def record_transfer(self, endpoint: str, url: str, outcome: str, started_at: float) -> None:
        """Add a request that has ended to the operation that this thread works for.

        Args:
            outcome: its status or failure.
            started_at: time of its start, seconds since 1970.
        """
        self._telemetry.operations.record_request(
            RequestRecord(
                endpoint=endpoint,
                url=url,
                outcome=outcome,
                started_at=started_at,
                duration_s=max(time.time() - started_at, 0.0),
            )
        )

    def record_chunk(self, endpoint: str, size_bytes: int) -> None:
        """Count the bytes of a received chunk."""
        self._telemetry.count("bytes_received", size_bytes)
        self._telemetry.count(_BYTE_COUNTERS[endpoint], size_bytes)

    def touch(self) -> None:
        """Record that a connection was used just now."""
        self._used_at = time.monotonic()

    def idle_s(self) -> float:
        """Return how long no connection was used, seconds."""
        return time.monotonic() - self._used_at

    def stop(self) -> None:
        """End all transfers at their next chunk with ConnectionFailed, and start no more."""
        self._stopping.set()

    def raise_if_stopped(self) -> None:
        """Raise an error if the transfers were stopped.

        Raises:
            ConnectionFailed: `stop` has been called.
        """
        if self._stopping.is_set():
            raise errors.ConnectionFailed("the client was stopped", endpoint=STORE_ENDPOINT)

    def stall_error(self, host: str) -> TransferInterrupted:
        """Return the error that a transfer made almost no progress for `stall_timeout_s`."""
        message = f"{host} sent next to nothing for {self.stall_timeout_s:g} s"
        return TransferInterrupted(
            errors.RequestTimeout(message, endpoint=STORE_ENDPOINT), FailureKind.STALLED
        )
