"""HTTP client for object stores: GET requests with streamed bodies.

The connections are made in `pools`, which is imported at the first request, so that a mount starts
faster. Messages and logs contain no URL, because signed URLs are secrets.
"""

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from tinkerfs import errors
from tinkerfs.errors import StartupError
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.retry import TransferInterrupted

if TYPE_CHECKING:
    from tinkerfs.weights.pools import ConnectionPools, Response

#: The name of a request to a store in messages and counters.
STORE_ENDPOINT = "GET store"

#: Maximum size of a read. Smaller reads would contend more for the interpreter lock.
READ_BYTES = 1 << 20

#: Idle connections are closed this long after the last request, seconds. After a suspend or a
#: network change only a timeout would show that they are dead.
MAX_IDLE_S = 15.0


class ObjectStoreClient:
    """HTTP client for object stores. Thread-safe; a context manager.

    It uses the proxies of the environment, and trusts the same certificates as the API client.

    Args:
        telemetry: counts requests and bytes.
        timeout_s: how long a transfer may make no progress, seconds.
    """

    def __init__(self, telemetry: Telemetry, *, timeout_s: float) -> None:
        self.telemetry = telemetry
        self.timeout_s = timeout_s
        self._stopping = threading.Event()
        self._used_at = time.monotonic()
        self._lock = threading.Lock()
        self._pools: ConnectionPools | None = None  # made under _lock

    def get(self, url: str, headers: Mapping[str, str]) -> "Response":
        """Send a request; return the response whatever its status. Follow no redirect.

        Raises:
            TransferInterrupted: there is no response.
            ConnectionFailed: the client was stopped, or a proxy or certificate file of the
                environment cannot be used.
            UntrustedCertificate: the store's certificate is rejected.
            ProtocolError: the URL is invalid.
        """
        try:
            pools = self._get_pools()
        except (OSError, ImportError) as error:  # tinkerfs was removed or upgraded
            message = f"HTTP cannot be set up: {errors.redact(str(error))} (hint: mount again)"
            raise errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT) from None
        self.raise_if_stopped()
        if time.monotonic() - self._used_at > MAX_IDLE_S:
            pools.drop_idle()
        self.touch()
        try:
            return pools.get(url, headers)
        except StartupError as error:
            raise errors.ConnectionFailed(str(error), endpoint=STORE_ENDPOINT) from None

    def stop(self) -> None:
        """End all transfers at their next chunk with ConnectionFailed, and start no more."""
        self._stopping.set()

    def raise_if_stopped(self) -> None:
        """Raise an error if the client was stopped.

        Raises:
            ConnectionFailed: `stop` has been called.
        """
        if self._stopping.is_set():
            raise errors.ConnectionFailed("the client was stopped", endpoint=STORE_ENDPOINT)

    def close(self) -> None:
        """Stop the client and close all connections, those in use after their transfer."""
        self.stop()
        with self._lock:
            if self._pools is not None:
                self._pools.drop_idle()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the client."""
        self.close()

    def touch(self) -> None:
        """Record that a connection was used just now; called by `Response`."""
        self._used_at = time.monotonic()

    def stall_error(self, host: str) -> TransferInterrupted:
        """Return the error that a transfer made almost no progress for `timeout_s`."""
        message = f"{host} sent next to nothing for {self.timeout_s:g} s"
        return TransferInterrupted(
            errors.RequestTimeout(message, endpoint=STORE_ENDPOINT), is_stall=True
        )

    def _get_pools(self) -> "ConnectionPools":
        with self._lock:
            if self._pools is None:
                from tinkerfs.weights.pools import ConnectionPools

                self._pools = ConnectionPools(self)
            return self._pools
