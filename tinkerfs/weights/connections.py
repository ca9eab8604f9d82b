"""Connections to object stores: one GET at a time of each, its body as it comes.

What makes them is in `pools`, and comes when the first is wanted: so a mount starts 0.08 s sooner.
No URL is in any message or log: they are secrets.
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

#: How messages and counters call a request to the store.
STORE_ENDPOINT = "GET store"

#: How much is read at a time at the most: each piece costs a turn with the interpreter's one lock.
READ_BYTES = 1 << 20

#: Idle connections are kept for so long after the last request, seconds: of one that a sleep or
#: another network has cut off nothing tells but a time-out.
MAX_IDLE_S = 15.0


class ObjectStoreClient:
    """Connections to object stores. Thread-safe; a context manager.

    The proxies of the environment are used, and the certificates that the API's client trusts.

    Args:
        telemetry: counts requests and bytes.
        timeout_s: how long a transfer may stand still, seconds.
    """

    def __init__(self, telemetry: Telemetry, *, timeout_s: float) -> None:
        self.telemetry = telemetry
        self.timeout_s = timeout_s
        self._stopping = threading.Event()
        self._used_at = time.monotonic()
        self._lock = threading.Lock()
        self._pools: ConnectionPools | None = None  # made under _lock

    def get(self, url: str, headers: Mapping[str, str]) -> "Response":
        """Ask for a URL, and return the answer whatever its status; no redirect is followed.

        Raises:
            Lost: there is none.
            Unreachable: after `stop`, or where the proxy or the certificates to trust that the
                environment names cannot be used.
            UntrustedCertificate: the store's certificate is refused.
            ProtocolError: the URL is none of HTTP.
        """
        try:
            pools = self._made()
        except (OSError, ImportError) as error:  # tinkerfs was removed, or is another
            message = f"HTTP cannot be set up ({errors.redact(str(error))}): mount again"
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
        """End each transfer at its next piece, as Unreachable, and begin no other."""
        self._stopping.set()

    def raise_if_stopped(self) -> None:
        """Go on.

        Raises:
            Unreachable: after `stop`.
        """
        if self._stopping.is_set():
            raise errors.ConnectionFailed("it was stopped here", endpoint=STORE_ENDPOINT)

    def close(self) -> None:
        """Close every idle connection, and each other one with its transfer; begin no other."""
        self.stop()
        with self._lock:
            if self._pools is not None:
                self._pools.drop_idle()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def touch(self) -> None:
        """Take note that a connection has just served; for `Response`."""
        self._used_at = time.monotonic()

    def stall_error(self, host: str) -> TransferInterrupted:
        """Return what it means that next to nothing came for `timeout_s`."""
        message = f"{host} sent next to nothing for {self.timeout_s:g} s"
        return TransferInterrupted(
            errors.RequestTimeout(message, endpoint=STORE_ENDPOINT), is_stall=True
        )

    def _made(self) -> "ConnectionPools":
        with self._lock:
            if self._pools is None:
                from tinkerfs.weights.pools import ConnectionPools

                self._pools = ConnectionPools(self)
            return self._pools
