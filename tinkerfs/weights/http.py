"""HTTP client for object stores: GET requests with streamed bodies.

This module and `store_connection` import urllib3, which takes 0.08 s. So `Origins` imports them
while the URL of the first archive is requested. urllib3 copies a body less often than httpx, which
the API client uses. Messages and logs contain no URL, because signed URLs are secrets.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

import urllib3

from tinkerfs import __version__, errors, proxies, tls
from tinkerfs.errors import StartupError
from tinkerfs.retry import FailureKind
from tinkerfs.weights.blob_proxy import BlobProxy
from tinkerfs.weights.store_connection import StaleConnection, TlsSocket, use_deadlines
from tinkerfs.weights.transfer_monitor import (
    CHUNK_BYTES,
    STORE_ENDPOINT,
    TransferInterrupted,
    TransferMonitor,
)

CONNECT_TIMEOUT_S = 5.0

#: A transfer with a lower rate over the stall timeout counts as stalled, bytes per second.
MIN_BYTES_PER_S = 1024

#: Maximum number of idle connections per store.
MAX_IDLE = 32

#: Idle connections are closed this long after the last request, seconds. After a suspend or a
#: network change only a timeout would show that they are dead.
MAX_IDLE_S = 15.0

#: Maximum number of attempts to send a request on idle connections that turn out to be dead.
_MAX_STALE = 3

_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"tinkerfs/{__version__}"}


class ObjectStoreClient:
    """HTTP client for object stores. Thread-safe; a context manager.

    It uses the proxies of the environment, and trusts the same certificates as the API client.
    Connections are pooled by proxy.

    Attributes:
        monitor: counts, bounds and stops the transfers.
        blob_proxy: the caching proxy of the site, for `RangeSource`; None if there is none.
    """

    def __init__(self, monitor: TransferMonitor, blob_proxy: BlobProxy | None = None) -> None:
        for name in ("connection", "connectionpool", "response"):
            logger = logging.getLogger(f"urllib3.{name}")  # its warnings contain URLs
            if logger.level < logging.ERROR:
                logger.setLevel(logging.ERROR)
        self.monitor = monitor
        self.blob_proxy = blob_proxy
        timeout_s = monitor.stall_timeout_s
        self._timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, timeout_s), read=timeout_s)
        self._lock = threading.Lock()
        self._managers: dict[proxies.Proxy | None, urllib3.PoolManager] = {}  # made under _lock

    def get(
        self, url: str, headers: Mapping[str, str], endpoint: str = STORE_ENDPOINT
    ) -> "StreamedResponse":
        """Send a request; return the response whatever its status. Follow no redirect.

        `endpoint` is the name under which the request is counted.

        Raises:
            TransferInterrupted: there is no response.
            ConnectionFailed: the transfers were stopped, or a proxy or certificate file of the
                environment cannot be used.
            UntrustedCertificate: the store's certificate is rejected.
            ProtocolError: the URL is invalid.
        """
        self.monitor.raise_if_stopped()
        if self.monitor.idle_s() > MAX_IDLE_S:
            self.close_idle()
        self.monitor.touch()
        for _ in range(_MAX_STALE):
            try:
                return self._get(url, headers, endpoint)
            except StaleConnection:
                self.close_idle()  # the others are probably dead too
            except StartupError as error:
                raise errors.ConnectionFailed(str(error), endpoint=STORE_ENDPOINT) from None
        host = urlsplit(url).hostname
        raise TransferInterrupted(
            errors.ConnectionFailed(f"{host} closes every connection", endpoint=STORE_ENDPOINT)
        )

    def _get(self, url: str, headers: Mapping[str, str], endpoint: str) -> "StreamedResponse":
        """Send one request.

        Raises:
            StaleConnection: the idle connection that was used is dead.
        """
        host, outcome, proxy, started_at = "the store", "failed", None, time.time()
        try:
            host = urlsplit(url).hostname or host
            proxy = proxies.proxy_for(url)
            raw = self._pool_for(proxy).urlopen(
                "GET",
                url,
                headers={**_HEADERS, **headers},
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            outcome = str(raw.status)
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            if isinstance(innermost := _innermost(error), StaleConnection):
                raise innermost from None
            raise self._map_urllib3_error(error, host, proxy) from None
        finally:
            self.monitor.record_request(endpoint, outcome)
            if outcome == "failed":
                self.monitor.record_transfer(endpoint, url, outcome, started_at)
        return StreamedResponse(self.monitor, raw, host, endpoint, url, started_at)

    def close(self) -> None:
        """Stop all transfers and close all connections, those in use after their transfer."""
        self.monitor.stop()
        self.close_idle()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the client."""
        self.close()

    def close_idle(self) -> None:
        """Close idle connections; close connections in use after their transfer."""
        with self._lock:
            managers = list(self._managers.values())
        for manager in managers:
            manager.clear()

    def _pool_for(self, proxy: proxies.Proxy | None) -> urllib3.PoolManager:
        """Return the pools for a proxy; None stands for direct connections.

        Raises:
            StartupError: the trusted certificates cannot be read.
        """
        with self._lock:
            if proxy not in self._managers:
                manager = _make_manager(proxy)
                use_deadlines(manager)
                self._managers[proxy] = manager
            return self._managers[proxy]

    def _map_urllib3_error(
        self, error: Exception, host: str, proxy: proxies.Proxy | None
    ) -> TransferInterrupted:
        """Return the error of a failed attempt as an exception of tinkerfs.

        Raises:
            UntrustedCertificate: the certificate of the store or the proxy is rejected.
            ProtocolError: a retry would fail too.
        """
        rejection = tls.describe_refusal(error, host)
        if rejection is not None:
            raise errors.UntrustedCertificate(rejection, endpoint=STORE_ENDPOINT)
        detail = _detail_text(error)
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            return self.monitor.stall_error(host)
        if isinstance(error, urllib3.exceptions.InvalidHeader):  # two different lengths
            return TransferInterrupted(
                errors.ProtocolError(f"no HTTP from {host}: {detail}", endpoint=STORE_ENDPOINT),
                FailureKind.UNUSABLE_RESPONSE,
            )
        if isinstance(error, urllib3.exceptions.ProtocolError):
            return TransferInterrupted(
                errors.ConnectionFailed(f"{host} broke off: {detail}", endpoint=STORE_ENDPOINT)
            )
        if isinstance(error, urllib3.exceptions.ConnectTimeoutError) and not isinstance(
            error, urllib3.exceptions.NewConnectionError
        ):
            message = f"no connection to {host} in time"
            return TransferInterrupted(errors.RequestTimeout(message, endpoint=STORE_ENDPOINT))
        connect_errors = (
            urllib3.exceptions.NewConnectionError,
            urllib3.exceptions.ProxyError,
            urllib3.exceptions.SSLError,
        )
        if isinstance(error, connect_errors):
            route = "" if proxy is None else f" through {proxy}"
            message = f"no connection to {host}{route}: {detail}"
            return TransferInterrupted(errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT))
        raise errors.ProtocolError(
            f"no HTTP from {host}: {detail}", endpoint=STORE_ENDPOINT
        ) from None


class StreamedResponse:
    """A response with its head; the body is streamed. Not thread-safe.

    Attributes:
        headers: by case-insensitive name.
        host: for messages.
    """

    def __init__(
        self,
        monitor: TransferMonitor,
        raw: urllib3.BaseHTTPResponse,
        host: str,
        endpoint: str,
        url: str,
        started_at: float,
    ) -> None:
        self._endpoint, self._url, self._started_at = endpoint, url, started_at
        self.status: int = raw.status
        self.headers: Mapping[str, str] = raw.headers
        self.host = host
        self._monitor = monitor
        self._raw = raw

    def chunks(self) -> Iterator[bytes]:
        """Yield the body as it arrives. After its end the connection can be reused.

        Raises:
            TransferInterrupted: the body broke off, or made almost no progress.
            ConnectionFailed: the transfers were stopped.
        """
        monitor, timeout_s = self._monitor, self._monitor.stall_timeout_s
        window_end, window_bytes = time.monotonic() + timeout_s, 0
        try:
            while chunk := self._raw.read1(CHUNK_BYTES):
                window_bytes += len(chunk)
                monitor.record_chunk(self._endpoint, len(chunk))
                now = time.monotonic()
                if now >= window_end:
                    if window_bytes < MIN_BYTES_PER_S * timeout_s:
                        raise monitor.stall_error(self.host)
                    window_end, window_bytes = now + timeout_s, 0
                yield chunk
                monitor.raise_if_stopped()
        except urllib3.exceptions.ReadTimeoutError:
            raise monitor.stall_error(self.host) from None
        except urllib3.exceptions.HTTPError as error:
            message = f"{self.host} broke off: {_detail_text(error)}"
            raise TransferInterrupted(
                errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT)
            ) from None
        monitor.touch()

    def close(self) -> None:
        """Release the connection; close it unless the body was read to its end."""
        self._raw.close()
        if self._url:
            self._monitor.record_transfer(
                self._endpoint, self._url, str(self.status), self._started_at
            )
            self._url = ""


def _make_manager(proxy: proxies.Proxy | None) -> urllib3.PoolManager:
    """Return new pools for a proxy; None stands for direct connections.

    Raises:
        StartupError: the trusted certificates cannot be read.
    """
    context = tls.trusting_context()
    context.sslsocket_class = TlsSocket
    options: dict[str, Any] = {"maxsize": MAX_IDLE, "ssl_context": context}
    if proxy is None:
        return urllib3.PoolManager(**options)
    if proxy.protocol == "socks5h":
        from urllib3.contrib.socks import SOCKSProxyManager

        username, password = proxy.login or (None, None)
        return SOCKSProxyManager(proxy.url, username=username, password=password, **options)
    headers = urllib3.make_headers(proxy_basic_auth=proxy.login and ":".join(proxy.login))
    return urllib3.ProxyManager(
        proxy.url, proxy_headers=headers, proxy_ssl_context=tls.trusting_context(), **options
    )


def _innermost(error: BaseException) -> BaseException:
    while inner := next((arg for arg in error.args if isinstance(arg, BaseException)), None):
        error = inner
    return error


def _detail_text(error: BaseException) -> str:
    """Return the message of the innermost error; the outer ones add nothing useful."""
    error = _innermost(error)
    if isinstance(error, urllib3.exceptions.HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    detail = getattr(error, "strerror", None) or str(error)
    return errors.redact(detail) or type(error).__name__
