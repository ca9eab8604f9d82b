"""HTTP client of the API: one request, one response, or the reason why there is none.

The one place where the client is built: its connections, proxies and certificates. Retries and the
key are the business of `transport`, what a status means that of `failures`.
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
from tinkerfs.api.network_backend import KEEPALIVE_S, Backend, Exchange
from tinkerfs.errors import ApiError, StartupError
from tinkerfs.telemetry import Telemetry

CONNECT_TIMEOUT_S = 5.0

#: How many bytes that are not of the body a response may have, and how many more for each byte of
#: the body: chunks of a byte each would keep a processor busy until the deadline.
MAX_OVERHEAD_BYTES, MAX_OVERHEAD_RATIO = 64 << 10, 1

#: How much of the body of an error is read at least, bytes.
MAX_ERROR_BYTES = 1 << 20

#: The content codings that are decoded. One at a time: of three over each other, 288 bytes are 3 GB
#: before any bound on the decoded body can apply (RFC 9110, 8.4 allows any number).
_CODINGS = frozenset({"", "identity", "gzip", "deflate"})

#: How httpcore and h11 tell a connection that ended too early from a response that is not HTTP;
#: both are RemoteProtocolError.
_CUT_WORDS = ("Server disconnected", "peer closed connection")


@dataclass(frozen=True, slots=True, repr=False)
class Response:
    """A response; a Location is a secret, so no repr.

    Attributes:
        status: of HTTP.
        headers: names in any case.
        body: all of it, decoded from its content coding.
        url: what was asked.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class ExchangeError(Exception):
    """There is no whole response.

    Attributes:
        error: what the caller gets if no other try succeeds.
        is_unsent: whether the request never arrived.
        is_final: whether another try would end the same.
    """

    def __init__(self, error: ApiError, *, is_unsent: bool = False, is_final: bool = False) -> None:
        super().__init__(str(error))
        error.is_unsent = is_unsent
        self.error = error
        self.is_unsent = is_unsent
        self.is_final = is_final


class HttpClient:
    """Sends requests to one API. Thread-safe.

    Args:
        root: URL that all paths are appended to, with a slash at its end.
        telemetry: counts every request, and bytes.
        max_idle: how many idle connections are kept open.
        max_body_bytes: the largest body that is read, decoded.

    Raises:
        SetupError: the URL, or a proxy or bundle that the environment names, cannot be used.
    """

    def __init__(
        self, root: str, telemetry: Telemetry, *, max_idle: int, max_body_bytes: int
    ) -> None:
        # Both log URLs, and httpcore headers as well: a Location is a secret.
        for name in ("httpx", "httpcore"):
            logger = logging.getLogger(name)
            if logger.level < logging.WARNING:
                logger.setLevel(logging.WARNING)
        self._root = root
        self._host = urlsplit(root).hostname or root
        self._telemetry = telemetry
        self._max_body_bytes = max_body_bytes
        self._backend = Backend()
        #: None for direct connections; shown without its login.
        self._proxy = proxies.proxy_for(root)
        try:
            httpx.URL(root)
        except httpx.InvalidURL:
            raise StartupError("the API's URL cannot be used: correct --base-url") from None
        self._http = httpx.Client(
            trust_env=False,  # httpx reads less of the environment than `proxies` and `tls` do
            follow_redirects=False,
            transport=_PoolTransport(self._backend, self._proxy, _context(root), max_idle),
            headers={
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
                "User-Agent": f"tinkerfs/{__version__}",
            },
        )

    def close(self) -> None:
        """Close every connection; requests in flight end as Unreachable."""
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
        """Send a request once, and return its response whatever the status.

        Args:
            label: of the endpoint; begins with the method.
            path: below the root, percent-encoded, with its query.
            headers: besides the usual ones.
            body: JSON to send; None for no body.
            timeout_s: bound on the whole exchange, seconds.
            may_repeat: whether the request may be sent again.

        Raises:
            ExchangeError: there is no whole response.
        """
        outcome, began = "failed", time.monotonic()
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
                        self._backend.observe(time.monotonic() - began)
                    self._check_order(exchange, label)
                    try:
                        content = self._read(response, exchange, label)
                    finally:
                        self._telemetry.count("bytes_received", response.num_bytes_downloaded)
                    outcome = str(response.status_code)
                    return Response(
                        response.status_code, response.headers, content, str(response.url)
                    )
            except ExchangeError as error:
                outcome = _outcome_label(error.error)
                raise
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, RuntimeError) as error:
                failure = self._failure_of(error, label, timeout_s, exchange)
                outcome = _outcome_label(failure.error)
                raise failure from None
            finally:
                self._telemetry.record_request(label, outcome)

    def _check_order(self, exchange: Exchange, label: str) -> None:
        """Refuse a response that was left over of the one before, which was longer than it said.

        Raises:
            ExchangeError: it is one.
        """
        if not exchange.head_bytes:
            message = f"{self._host} sent a response before the request"
            raise ExchangeError(errors.ConnectionFailed(message, endpoint=label))

    def _read(self, response: httpx.Response, exchange: Exchange, label: str) -> bytes:
        """Return the whole body, decoded."""
        coding = response.headers.get("content-encoding", "").strip().lower()
        if coding not in _CODINGS:
            message = f"{self._host} sent a content coding that is not decoded: {coding}"
            raise _final(errors.ProtocolError(errors.redact(message), endpoint=label))
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            body_bytes = response.num_bytes_downloaded
            allowed_bytes = MAX_OVERHEAD_BYTES + (1 + MAX_OVERHEAD_RATIO) * body_bytes
            if exchange.received_bytes - exchange.head_bytes > allowed_bytes:
                message = f"{self._host} sent little but the framing of chunks"
                raise _final(errors.ProtocolError(message, endpoint=label))
            if response.status_code >= 400 and len(body) > MAX_ERROR_BYTES:
                break  # what it says is said by now; its connection is closed
            if len(body) > self._max_body_bytes:
                message = f"{self._host} sent more than {self._max_body_bytes >> 20} MiB"
                raise _final(errors.ProtocolError(message, endpoint=label))
        return bytes(body)

    def _failure_of(
        self, error: Exception, label: str, timeout_s: float, exchange: Exchange
    ) -> ExchangeError:
        """Return what it means that there is no response."""
        host = self._host
        words = errors.redact(str(error)) or type(error).__name__
        if exchange.is_connection_dead:
            message = f"{host} did not respond on an idle connection"
            return ExchangeError(errors.ConnectionFailed(message, endpoint=label))
        refusal = tls.describe_refusal(error, host)
        if refusal is not None:
            untrusted = errors.UntrustedCertificate(refusal, endpoint=label)
            return ExchangeError(untrusted, is_unsent=True, is_final=True)
        if isinstance(error, httpx.ConnectTimeout):
            failure: ApiError = errors.RequestTimeout(
                f"no connection to {host} in time", endpoint=label
            )
            return ExchangeError(failure, is_unsent=True)
        if isinstance(error, httpx.TimeoutException):
            message = f"no response from {host} within {round(timeout_s, 1):g} s"
            return ExchangeError(errors.RequestTimeout(message, endpoint=label))
        if isinstance(error, httpx.ConnectError | httpx.ProxyError):
            way = "" if self._proxy is None else f" through {self._proxy}"
            failure = errors.ConnectionFailed(
                f"no connection to {host}{way}: {words}", endpoint=label
            )
            return ExchangeError(failure, is_unsent=True)
        if self._http.is_closed:
            return _final(errors.ConnectionFailed("the client is closed", endpoint=label))
        if isinstance(error, httpx.NetworkError) or (
            isinstance(error, httpx.RemoteProtocolError) and words.startswith(_CUT_WORDS)
        ):
            return ExchangeError(
                errors.ConnectionFailed(f"{host} broke off: {words}", endpoint=label)
            )
        # What is left over of a response before this one says nothing of this request.
        not_http = errors.ProtocolError(f"no HTTP from {host}: {words}", endpoint=label)
        return ExchangeError(not_http, is_final=not exchange.is_reused)

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


def _final(error: ApiError) -> ExchangeError:
    return ExchangeError(error, is_final=True)


def _outcome_label(error: ApiError) -> str:
    if isinstance(error, errors.RequestTimeout):
        return "timed out"
    return "unreachable" if isinstance(error, errors.ConnectionFailed) else "not understood"


def _context(root: str) -> ssl.SSLContext:
    """Return what verifies the server; without TLS no bundle is read: that takes 0.05 s."""
    if root.startswith("https:"):
        return tls.trusting_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class _PoolTransport(httpx.BaseTransport):
    """Connections of httpcore with a network backend of our own, which httpx does not pass on."""

    def __init__(
        self,
        backend: Backend,
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
        """Send a request, and return its response with the body still to come."""
        assert isinstance(request.stream, httpx.SyncByteStream)
        with _translated():
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
    """The body of a response, as it arrives."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _translated():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


#: Errors of httpcore and those of httpx, which bear the same names; the most specific first.
_ERRORS = tuple(
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
def _translated() -> Iterator[None]:
    """Raise an error of httpcore as httpx does."""
    try:
        yield
    except Exception as error:
        for theirs, ours in _ERRORS:
            if isinstance(error, theirs):
                raise ours(str(error)) from error
        raise


def _as_httpcore(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
