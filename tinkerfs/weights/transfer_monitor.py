"""Bounds and counters that all transfers from object stores share.

Unlike `http` this module does not import urllib3, so that a mount starts faster.
"""

import threading
import time

from tinkerfs import errors
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.retry import TransferInterrupted

#: The name of a request to a store in messages and counters.
STORE_ENDPOINT = "GET store"

#: Maximum size of a chunk. Smaller reads would contend more for the interpreter lock.
CHUNK_BYTES = 1 << 20


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

    def record_request(self, outcome: str) -> None:
        """Count a request by its status or failure."""
        self._telemetry.record_request(STORE_ENDPOINT, outcome)

    def record_chunk(self, size_bytes: int) -> None:
        """Count the bytes of a received chunk."""
        self._telemetry.count("bytes_received", size_bytes)

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
            errors.RequestTimeout(message, endpoint=STORE_ENDPOINT), is_stall=True
        )
