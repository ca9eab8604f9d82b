"""The outermost WSGI application: it admits requests, and completes responses.

A page of another origin cannot use this server through a browser:

- `Host` must name the address that the server listens on, so that no foreign name leads here (DNS
  rebinding). Without passwords the server listens on the loopback interface only.
- A browser reports the origin of a request in `Origin` or `Sec-Fetch-Site`. Another origin may only
  link to a page or a file, which sends a GET request that the user sees.
- A response runs no script, is not framed, and is not included by another origin.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final
from urllib.parse import urlsplit

from wsgidav.dav_error import DAVError

from tinkerfs import errors
from tinkerfs.printable import escape_control_chars
from tinkerfs.webdav.authentication import Accounts
from tinkerfs.webdav.pages import FILE_POLICY
from tinkerfs.webdav.paths import path_from_target
from tinkerfs.webdav.status import FileError

log = logging.getLogger(__name__)

Environ = dict[str, Any]
Headers = list[tuple[str, str]]

_READING: Final = frozenset({"GET", "HEAD"})
_HEADERS: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def allowed_hosts(
    host: str, addresses: Iterable[IPv4Address | IPv6Address]
) -> frozenset[str] | None:
    """Return the names that `Host` may have; None for every name.

    A server on all addresses has passwords, which a browser does not send to a foreign name.

    Args:
        host: the name or address that the server listens on.
        addresses: the addresses of that name.
    """
    names = {host.lower()}
    for address in addresses:
        if address.is_unspecified:
            return None
        names.add(str(address))
        if address.is_loopback:
            names |= _LOOPBACK_NAMES
    return frozenset(names)


class Gate:
    """Admits requests to an application.

    Args:
        application: the WSGI application behind the gate.
        hosts: as returned by `allowed_hosts`.
        accounts: who may use the server; None for everybody.
    """

    def __init__(
        self,
        application: Callable[..., Iterable[bytes]],
        hosts: frozenset[str] | None,
        accounts: Accounts | None,
    ) -> None:
        self._application = application
        self._hosts = hosts
        self._accounts = accounts

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterator[bytes]:
        """Serve a request."""
        response = _PendingResponse(environ, start_response)
        body: Iterable[bytes] = ()
        try:
            self._admit(environ)
            body = self._application(environ, response.start)
            for chunk in body:
                response.send()
                yield chunk
            response.send()
        except GeneratorExit:
            raise
        except Exception as error:
            if response.is_sent:
                # The connection is closed before the announced length is reached.
                log.info("%s: interrupted: %s", response.label, type(error).__name__)
                raise
            yield response.fail(error)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()

    def _admit(self, environ: Environ) -> None:
        """Check a request and decode its path; raise the `DAVError` of its refusal."""
        host = _host_name(environ.get("HTTP_HOST", ""))
        if self._hosts is not None and host not in self._hosts:
            raise DAVError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this is not a name of this server (hint: --listen NAME:PORT)",
            )
        _check_origin(environ)
        user = "anonymous"
        if self._accounts is not None:
            found = self._accounts.user(environ.get("HTTP_AUTHORIZATION", ""))
            if found is None:
                challenge = [("WWW-Authenticate", 'Basic realm="tinkerfs", charset="UTF-8"')]
                raise DAVError(HTTPStatus.UNAUTHORIZED, "log in", add_headers=challenge)
            user = found
        environ["wsgidav.auth.user_name"] = user
        # WsgiDAV and its locks see neither the password nor names that only a proxy may set.
        for name in ("HTTP_AUTHORIZATION", "HTTP_X_FORWARDED_HOST", "HTTP_X_FORWARDED_PROTO"):
            environ.pop(name, None)
        try:
            target = environ["REQUEST_URI"]
            # OPTIONS for the whole server; WsgiDAV fails for the asterisk.
            environ["PATH_INFO"] = "/" if target == "*" else path_from_target(target)
            urlsplit(environ.get("HTTP_DESTINATION", ""))
        except ValueError as error:
            raise DAVError(HTTPStatus.BAD_REQUEST, str(error)) from None


def _host_name(host: str) -> str:
    """Return the name in a `Host` header, without the port, which a tunnel changes."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _check_origin(environ: Environ) -> None:
    origin, site = environ.get("HTTP_ORIGIN"), environ.get("HTTP_SEC_FETCH_SITE", "none")
    is_link = (
        environ["REQUEST_METHOD"] in _READING
        and environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
        and environ.get("HTTP_SEC_FETCH_DEST") == "document"
    )
    own = f"{environ['wsgi.url_scheme']}://{environ.get('HTTP_HOST', '')}".lower()
    if (origin is not None and origin.lower() != own) or (
        site not in ("none", "same-origin") and not is_link
    ):
        raise DAVError(HTTPStatus.FORBIDDEN, "requests of other origins are refused")


class _PendingResponse:
    """Completes the status line and the headers of one response.

    Attributes:
        label: client, method and path for the log, without query and headers.
        is_sent: whether the headers were passed to the server.
    """

    def __init__(self, environ: Environ, start_response: Callable[..., Any]) -> None:
        path = escape_control_chars(environ.get("REQUEST_URI", "").partition("?")[0])
        method = escape_control_chars(environ["REQUEST_METHOD"])
        self.label = f"{environ.get('REMOTE_ADDR', '?')} {method} {path}"
        self.is_sent = False
        self._is_head = environ["REQUEST_METHOD"] == "HEAD"
        self._start_response = start_response
        self._started: tuple[int, Headers] | None = None

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> None:
        """Keep the status and the headers until the first part of the body."""
        del exc_info
        self._started = int(status.split(" ", 1)[0]), headers

    def send(self) -> None:
        """Pass the status and the headers to the server, once."""
        if self._started is None or self.is_sent:
            return
        code, headers = self._started
        names = {name.lower() for name, _value in headers}
        policy = ("Content-Security-Policy", FILE_POLICY)
        added = [each for each in (*_HEADERS, policy) if each[0].lower() not in names]
        self.is_sent = True
        log.info("%s: %d", self.label, code)
        self._start_response(f"{code} {HTTPStatus(code).phrase}", [*headers, *added])

    def fail(self, error: Exception) -> bytes:
        """Start the response for an error, and return its body: one line of text, or XML."""
        if not isinstance(error, DAVError):
            log.error("%s failed", self.label, exc_info=error)
            error = FileError(errors.internal_error(error, self.label))
        code = HTTPStatus(error.value)
        if code in (HTTPStatus.NOT_MODIFIED, HTTPStatus.NO_CONTENT):
            kind, body = "", b""
        elif isinstance(error, FileError) or error.err_condition:
            kind, body = error.get_response_page()
        else:
            words = escape_control_chars(error.context_info or code.description)
            kind, body = "text/plain; charset=utf-8", f"{code.phrase}: {words}\n".encode()
        headers = [("Content-Length", str(len(body))), *(error.add_headers or ())]
        self.start(f"{code.value}", headers + ([("Content-Type", kind)] if kind else []))
        self.send()
        return b"" if self._is_head else body
