"""HTTP client of the API: sends a request once and returns its response.

Connections, proxies and certificates are configured here. `transport` adds the API key and retries,
and `error_mapping` interprets the status.
"""

import logging
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpcore
import httpx

from tinkerfs import __version__, errors, proxies, tls
from tinkerfs.api.network_backend import KEEPALIVE_S, DeadlineBackend, Exchange
from tinkerfs.errors import ApiError, StartupError
from tinkerfs.operation_log import RequestRecord
from tinkerfs.telemetry import Telemetry

CONNECT_TIMEOUT_S = 5.0

#: Maximum number of bytes of a response besides its body: a constant, and a number per body byte.
#: Without it chunks of one byte each would keep a processor busy until the deadline.
MAX_OVERHEAD_BYTES, MAX_OVERHEAD_RATIO = 64 << 10, 1

#: The body of an error response is read up to this size, bytes.
MAX_ERROR_BYTES = 1 << 20

_MAX_REQUEST_ID_CHARS = 100

#: Supported content codings. Stacked codings (RFC 9110, 8.4) are rejected: 288 bytes under three
#: codings decode to 3 GB before the limit on the decoded body applies.
_CODINGS = frozenset({"", "identity", "gzip", "deflate"})

#: Prefixes by which httpcore and h11 distinguish a connection that ended early from a response that
#: is not HTTP. Both are a RemoteProtocolError.
_CONNECTION_CLOSED_MESSAGES = ("Server disconnected", "peer closed connection")


@dataclass(frozen=True, slots=True, repr=False)
class Response:
    """A complete HTTP response.

    It has no repr, because a Location header is a secret.

    Attributes:
        headers: lookups ignore the case of header names.
        body: the whole body, with its content coding removed.
        url: URL of the request.
        age_s: seconds since the request; 0 unless another host made it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    age_s: float = 0.0


class ExchangeError(Exception):
    """A request for which no complete response was received.

    Attributes:
        error: error for the caller if no other attempt succeeds.
        request_not_sent: whether the request never reached the server.
        is_final: whether a retry would fail in the same way.
    """

    def __init__(
        self, error: ApiError, *, request_not_sent: bool = False, is_final: bool = False
    ) -> None:
        super().__init__(str(error))
        error.request_not_sent = request_not_sent
        self.error = error
        self.request_not_sent = request_not_sent
        self.is_final = is_final


class HttpClient:
    """Sends requests to one API. Thread-safe.

    Args:
        root: base URL of all paths, with a trailing slash.
        max_idle: maximum number of idle connections.
        max_body_bytes: maximum size of a decoded response body.

    Raises:
        StartupError: the URL is invalid, or the environment names an invalid proxy or certificate
            bundle.
    """

    def __init__(
        self, root: str, telemetry: Telemetry, *, max_idle: int, max_body_bytes: int
    ) -> None:
        # httpx logs URLs and httpcore logs headers: a Location header is a secret.
        for name in ("httpx", "httpcore"):
            logger = logging.getLogger(name)
            if logger.level < logging.WARNING:
                logger.setLevel(logging.WARNING)
        self._root = root
        self._host = urlsplit(root).hostname or root
        self._telemetry = telemetry
        self._max_body_bytes = max_body_bytes
        self._backend = DeadlineBackend()
        #: None for direct connections. Its string form has no login.
        self._proxy = proxies.proxy_for(root)
        try:
            httpx.URL(root)
        except httpx.InvalidURL:
            raise StartupError("invalid URL of the API (hint: correct --base-url)") from None
        self._http = httpx.Client(
            trust_env=False,  # `proxies` and `tls` support more variables than httpx
            follow_redirects=False,
            transport=_PoolTransport(self._backend, self._proxy, _ssl_context(root), max_idle),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
                "User-Agent": f"tinkerfs/{__version__}",
            },
        )

    def close(self) -> None:
        """Close every connection; requests in flight raise ConnectionFailed."""
        self._http.close()

    def send(
        self,
        label: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_s: float,
        *,
        may_repeat: bool,
    ) -> Response:
        """Send a request once and return its response of any status.

        Args:
            label: label of the endpoint; starts with the method.
            path: percent-encoded path and query, relative to the root.
            headers: in addition to the default headers.
            body: JSON; None for no body.
            timeout_s: timeout of the whole exchange, seconds.
            may_repeat: whether the request may be retried.

        Raises:
            ExchangeError: no complete response was received.
        """
        outcome, started_at, request_id = "failed", time.monotonic(), ""
        with self._backend.exchange(timeout_s, may_repeat=may_repeat) as exchange:
            try:
                with self._http.stream(
                    label.partition(" ")[0],
                    self._root + path,
                    content=body,
                    headers=headers,
                    timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
                ) as response:
                    exchange.is_head = False
                    if may_repeat:
                        self._backend.observe(time.monotonic() - started_at)
                    self._check_order(exchange, label)
                    try:
                        content = self._read(response, exchange, label)
                    finally:
                        self._telemetry.count("bytes_received", response.num_bytes_downloaded)
                    request_id = request_id_of(response.headers)
                    outcome = str(response.status_code)
                    return Response(
                        response.status_code, response.headers, content, str(response.url)
                    )
            except ExchangeError as error:
                outcome = _outcome_label(error.error)
                raise
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, RuntimeError) as error:
                failure = self._map_error(error, label, timeout_s, exchange)
                outcome = _outcome_label(failure.error)
                raise failure from None
            finally:
                duration_s = time.monotonic() - started_at
                self._telemetry.record_request(label, outcome, duration_s)
                self._telemetry.operations.record_request(
                    RequestRecord(
                        endpoint=label,
                        url=self._root + path,
                        outcome=outcome,
                        started_at=time.time() - duration_s,
                        duration_s=duration_s,
                        request_id=request_id,
                    )
                )

    def _check_order(self, exchange: Exchange, label: str) -> None:
        """Reject surplus bytes of the previous response on the same connection.

        Raises:
            ExchangeError: the response was received before the request was sent.
        """
        if not exchange.head_bytes:
            message = f"{self._host} sent a response before the request"
            raise ExchangeError(errors.ConnectionFailed(message, endpoint=label))

    def _read(self, response: httpx.Response, exchange: Exchange, label: str) -> bytes:
        """Return the whole body with its content coding removed."""
        coding = response.headers.get("content-encoding", "").strip().lower()
        if coding not in _CODINGS:
            message = f"{self._host} sent an unsupported content coding: {coding}"
            raise _final(errors.ProtocolError(errors.redact(message), endpoint=label))
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            body_bytes = response.num_bytes_downloaded
            allowed_bytes = MAX_OVERHEAD_BYTES + (1 + MAX_OVERHEAD_RATIO) * body_bytes
            if exchange.received_bytes - exchange.head_bytes > allowed_bytes:
                message = f"{self._host} sent mostly chunk framing"
                raise _final(errors.ProtocolError(message, endpoint=label))
            if response.status_code >= 400 and len(body) > MAX_ERROR_BYTES:
                break  # the message is complete by now; the connection is closed
            if len(body) > self._max_body_bytes:
                message = f"{self._host} sent more than {self._max_body_bytes >> 20} MiB"
                raise _final(errors.ProtocolError(message, endpoint=label))
        return bytes(body)

    def _map_error(
        self, error: Exception, label: str, timeout_s: float, exchange: Exchange
    ) -> ExchangeError:
        """Map an error of httpx to the error of this exchange."""
        host = self._host
        reason = errors.redact(str(error)) or type(error).__name__
        if exchange.is_connection_dead:
            message = f"{host} did not respond on an idle connection"
            return ExchangeError(errors.ConnectionFailed(message, endpoint=label))
        certificate_error = tls.describe_refusal(error, host)
        if certificate_error is not None:
            untrusted = errors.UntrustedCertificate(certificate_error, endpoint=label)
            return ExchangeError(untrusted, request_not_sent=True, is_final=True)
        if isinstance(error, httpx.ConnectTimeout):
            failure: ApiError = errors.RequestTimeout(
                f"no connection to {host} in time", endpoint=label
            )
            return ExchangeError(failure, request_not_sent=True)
        if isinstance(error, httpx.TimeoutException):
            message = f"no response from {host} within {round(timeout_s, 1):g} s"
            return ExchangeError(errors.RequestTimeout(message, endpoint=label))
        if isinstance(error, httpx.ConnectError | httpx.ProxyError):
            route = "" if self._proxy is None else f" through {self._proxy}"
            failure = errors.ConnectionFailed(
                f"no connection to {host}{route}: {reason}", endpoint=label
            )
            return ExchangeError(failure, request_not_sent=True)
        if self._http.is_closed:
            return _final(errors.ConnectionFailed("the client is closed", endpoint=label))
        if isinstance(error, httpx.NetworkError) or (
            isinstance(error, httpx.RemoteProtocolError)
            and reason.startswith(_CONNECTION_CLOSED_MESSAGES)
        ):
            return ExchangeError(
                errors.ConnectionFailed(f"{host} broke off: {reason}", endpoint=label)
            )
        # On a reused connection the bytes may be surplus of the previous response.
        not_http = errors.ProtocolError(f"no HTTP from {host}: {reason}", endpoint=label)
        return ExchangeError(not_http, is_final=not exchange.is_reused)

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


def request_id_of(headers: Mapping[str, str]) -> str:
    """Return the server's id of a request, by which its operators find it; empty without one."""
    return errors.redact(headers.get("x-request-id", ""), limit=_MAX_REQUEST_ID_CHARS)


def _final(error: ApiError) -> ExchangeError:
    return ExchangeError(error, is_final=True)


def _outcome_label(error: ApiError) -> str:
    if isinstance(error, errors.RequestTimeout):
        return "timed out"
    return "unreachable" if isinstance(error, errors.ConnectionFailed) else "not understood"


def _ssl_context(root: str) -> ssl.SSLContext:
    """Return the TLS context of a URL, without certificates for http."""
    if root.startswith("https:"):
        return tls.trusting_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class _PoolTransport(httpx.BaseTransport):
    """Transport of httpx with a custom network backend."""

    def __init__(
        self,
        backend: DeadlineBackend,
        proxy: proxies.Proxy | None,
        context: ssl.SSLContext,
        max_idle: int,
    ) -> None:
        options: Any = {
            "ssl_context": context,
            "max_connections": None,
            "max_keepalive_connections": max_idle,
            "keepalive_expiry": KEEPALIVE_S,
            "network_backend": backend,
        }
        self._pool: httpcore.ConnectionPool
        if proxy is None:
            self._pool = httpcore.ConnectionPool(**options)
            return
        options |= {"proxy_url": proxy.url}
        if proxy.login is not None:
            user, password = proxy.login
            options["proxy_auth"] = (user.encode(), password.encode())
        if proxy.protocol == "socks5h":
            self._pool = httpcore.SOCKSProxy(**options)
        else:
            is_secured = proxy.protocol == "https"
            secured = tls.trusting_context() if is_secured else None
            self._pool = httpcore.HTTPProxy(**options, proxy_ssl_context=secured)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response before the body is received."""
        assert isinstance(request.stream, httpx.SyncByteStream)
        with _map_httpcore_errors():
            response = self._pool.handle_request(
                httpcore.Request(
                    method=request.method,
                    url=_as_httpcore(request.url),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """Streams the body of a response."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _map_httpcore_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


#: Errors of httpcore and the httpx errors of the same names, the most specific first.
_HTTPX_ERRORS = tuple(
    (getattr(httpcore, name), getattr(httpx, name))
    for name in (
        "ConnectTimeout",
        "ReadTimeout",
        "WriteTimeout",
        "PoolTimeout",
        "TimeoutException",
        "ConnectError",
        "ReadError",
        "WriteError",
        "NetworkError",
        "ProxyError",
        "UnsupportedProtocol",
        "LocalProtocolError",
        "RemoteProtocolError",
        "ProtocolError",
    )
)


@contextmanager
def _map_httpcore_errors() -> Iterator[None]:
    """Raise errors of httpcore as the corresponding errors of httpx."""
    try:
        yield
    except Exception as error:
        for httpcore_error, httpx_error in _HTTPX_ERRORS:
            if isinstance(error, httpcore_error):
                raise httpx_error(str(error)) from error
        raise


def _as_httpcore(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
