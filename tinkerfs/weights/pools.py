"""Pools of connections to object stores, and what comes from them.

The only module of this package that imports an HTTP library. It is urllib3, not httpx as for the
API: of a body httpx makes five copies, urllib3 two. 1 GB in blocks of 4 MiB by 8 connections, from
a store on the same machine of two cores, checked and written down: 1.2 s of user time and 410 MB/s
by httpx, 0.7 s and 760 MB/s by urllib3. No URL is in any message or log: they are secrets.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import urllib3

from tinkerfs import __version__, errors, proxies, tls
from tinkerfs.weights.connections import READ_BYTES, STORE_ENDPOINT, ObjectStoreClient
from tinkerfs.weights.retry import TransferInterrupted
from tinkerfs.weights.store_connection import StaleConnection, TlsSocket, use_deadlines

CONNECT_TIMEOUT_S = 5.0

#: A transfer that moves less than this in `timeout_s` is as good as dead, bytes a second.
MIN_BYTES_PER_S = 1024

#: Idle connections to one store that are kept.
MAX_IDLE = 32

#: How often one request is sent again because an idle connection was dead.
_MAX_STALE = 3

_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"tinkerfs/{__version__}"}


class ConnectionPools:
    """The ways to stores: the direct one, and those through proxies. Thread-safe.

    Args:
        client: whose they are: what bounds transfers, counts them and ends them.
    """

    def __init__(self, client: ObjectStoreClient) -> None:
        for name in ("connection", "connectionpool", "response"):
            logger = logging.getLogger(f"urllib3.{name}")  # it logs URLs, in warnings too
            if logger.level < logging.ERROR:
                logger.setLevel(logging.ERROR)
        self._client = client
        timeout_s = client.timeout_s
        self._timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, timeout_s), read=timeout_s)
        self._lock = threading.Lock()
        self._ways: dict[proxies.Proxy | None, urllib3.PoolManager] = {}  # made under _lock

    def get(self, url: str, headers: Mapping[str, str]) -> "Response":
        """As `StoreClient.get`."""
        for _ in range(_MAX_STALE):
            try:
                return self._get(url, headers)
            except StaleConnection:
                self.drop_idle()  # what put an end to one did so to all of them
        host = urlsplit(url).hostname
        raise TransferInterrupted(
            errors.ConnectionFailed(f"{host} ends every connection", endpoint=STORE_ENDPOINT)
        )

    def _get(self, url: str, headers: Mapping[str, str]) -> "Response":
        """Send one request.

        Raises:
            StaleConnection: an idle connection was tried, and is dead.
        """
        host, outcome, proxy = "the store", "failed", None
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
            self._client.telemetry.record_request(STORE_ENDPOINT, outcome)
        return Response(self._client, raw, host)

    def drop_idle(self) -> None:
        """Close every idle connection, and each other one with its transfer."""
        with self._lock:
            ways = list(self._ways.values())
        for pools in ways:
            pools.clear()

    def _pool_for(self, proxy: proxies.Proxy | None) -> urllib3.PoolManager:
        """Return the way to stores through a proxy, None for the direct one.

        Raises:
            SetupError: the certificates to trust cannot be read.
        """
        with self._lock:
            if proxy not in self._ways:
                way = _made_way(proxy)
                use_deadlines(way)
                self._ways[proxy] = way
            return self._ways[proxy]

    def _map_urllib3_error(
        self, error: Exception, host: str, proxy: proxies.Proxy | None
    ) -> TransferInterrupted:
        """Return what it means that there is no answer.

        Raises:
            UntrustedCertificate: the store's certificate, or the proxy's, is refused.
            ProtocolError: nor will there be one.
        """
        refusal = tls.describe_refusal(error, host)
        if refusal is not None:
            raise errors.UntrustedCertificate(refusal, endpoint=STORE_ENDPOINT)
        words = _words_of(error)
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            return self._client.stall_error(host)
        if isinstance(error, urllib3.exceptions.InvalidHeader):  # two lengths that differ
            return TransferInterrupted(
                errors.ProtocolError(f"no HTTP from {host}: {words}", endpoint=STORE_ENDPOINT)
            )
        if isinstance(error, urllib3.exceptions.ProtocolError):
            return TransferInterrupted(
                errors.ConnectionFailed(f"{host} broke off: {words}", endpoint=STORE_ENDPOINT)
            )
        if isinstance(error, urllib3.exceptions.ConnectTimeoutError) and not isinstance(
            error, urllib3.exceptions.NewConnectionError
        ):
            message = f"no connection to {host} in time"
            return TransferInterrupted(errors.RequestTimeout(message, endpoint=STORE_ENDPOINT))
        unconnected = (
            urllib3.exceptions.NewConnectionError,
            urllib3.exceptions.ProxyError,
            urllib3.exceptions.SSLError,
        )
        if isinstance(error, unconnected):
            way = "" if proxy is None else f" through {proxy}"
            message = f"no connection to {host}{way}: {words}"
            return TransferInterrupted(errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT))
        raise errors.ProtocolError(
            f"no HTTP from {host}: {words}", endpoint=STORE_ENDPOINT
        ) from None


class Response:
    """An answer: its head, and its body on the way. One thread's.

    Attributes:
        status: of HTTP.
        headers: names in any case.
        host: who answered, for messages.
    """

    def __init__(self, client: ObjectStoreClient, raw: urllib3.BaseHTTPResponse, host: str) -> None:
        self.status: int = raw.status
        self.headers: Mapping[str, str] = raw.headers
        self.host = host
        self._client = client
        self._raw = raw

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes. Read to its end, its connection serves again.

        Raises:
            Lost: it broke off, or hardly moves.
            Unreachable: the client was stopped.
        """
        client = self._client
        window_end, window_bytes = time.monotonic() + client.timeout_s, 0
        try:
            while piece := self._raw.read1(READ_BYTES):
                window_bytes += len(piece)
                client.telemetry.count("bytes_received", len(piece))
                now = time.monotonic()
                if now >= window_end:
                    if window_bytes < MIN_BYTES_PER_S * client.timeout_s:
                        raise client.stall_error(self.host)
                    window_end, window_bytes = now + client.timeout_s, 0
                yield piece
                client.raise_if_stopped()
        except urllib3.exceptions.ReadTimeoutError:
            raise client.stall_error(self.host) from None
        except urllib3.exceptions.HTTPError as error:
            message = f"{self.host} broke off: {_words_of(error)}"
            raise TransferInterrupted(
                errors.ConnectionFailed(message, endpoint=STORE_ENDPOINT)
            ) from None
        client.touch()

    def close(self) -> None:
        """Let go of the connection; it ends where the body was not read to its end."""
        self._raw.close()


def _made_way(proxy: proxies.Proxy | None) -> urllib3.PoolManager:
    """Return the pools of a way.

    Raises:
        SetupError: the certificates to trust cannot be read.
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


def _words_of(error: BaseException) -> str:
    """Return what the innermost error says; those around it say only where it was met."""
    error = _innermost(error)
    if isinstance(error, urllib3.exceptions.HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    words = getattr(error, "strerror", None) or str(error)
    return errors.redact(words) or type(error).__name__
