"""HTTP server of the WebDAV adapter: WsgiDAV on cheroot.

cheroot serves one connection per thread while a request is being served, and idle connections
without a thread. It supports TLS, and streams a body without storing it.
"""

import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple, Self

from cheroot.ssl.builtin import BuiltinSSLAdapter
from cheroot.wsgi import Gateway_10, Server
from wsgidav.lock_man.lock_storage import LockStorageDict
from wsgidav.request_resolver import RequestResolver
from wsgidav.wsgidav_app import WsgiDAVApp

from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import StartupError
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.webdav.authentication import Accounts
from tinkerfs.webdav.gate import Gate, allowed_hosts
from tinkerfs.webdav.provider import CONNECTION, TreeProvider

log = logging.getLogger(__name__)

#: Maximum number of requests that are served at a time; further ones wait.
THREADS: Final = 128
#: A client that neither sends nor receives during a request is disconnected after this time.
_SOCKET_TIMEOUT_S: Final = 60
#: Interval at which the server checks whether to stop, and which idle connections to close.
_STOP_POLL_S: Final = 0.1
#: Time for responses in progress to be sent after a signal.
_GRACE_S: Final = 1.0
#: The bodies of requests are control values, properties and locks.
_MAX_BODY_BYTES: Final = 1 << 20
_MAX_HEADER_BYTES: Final = 65_536
#: Size of the parts of a file that are read and sent.
_BLOCK_BYTES: Final = 1 << 20


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `ADDRESS:PORT`, with an IPv6 address in brackets.

        Raises:
            ValueError: the text has another form.
        """
        host, colon, port = text.strip().rpartition(":")
        is_bracketed = host.startswith("[") and host.endswith("]")
        is_port = port.isascii() and port.isdecimal() and int(port) <= 65535
        if not colon or not is_port or (":" in host) != is_bracketed:
            raise ValueError(f"not ADDRESS:PORT: {text!r} (hint: 127.0.0.1:8080 or [::1]:8080)")
        return cls(host.strip("[]"), int(port))

    def resolve(self) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """Return the addresses of the host.

        Raises:
            StartupError: the name is unknown.
        """
        try:
            found = socket.getaddrinfo(self.host or "0.0.0.0", None, type=socket.SOCK_STREAM)  # noqa: S104
        except (OSError, UnicodeError):
            raise StartupError(
                f"cannot listen on {self.host}: unknown host (hint: --listen 127.0.0.1:8080)"
            ) from None
        return [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]


class Certificate(NamedTuple):
    """Files of the server's certificate and its private key, in PEM."""

    certificate: str
    key: str


class _Server(Server):
    """Tracks the connections with a request in progress. Thread-safe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_idle = threading.Condition()
        #: Guarded by _is_idle.
        self._busy: set[socket.socket] = set()

    @contextmanager
    def serving(self, connection: socket.socket) -> Iterator[None]:
        """Record that a request of a connection is being served."""
        with self._is_idle:
            self._busy.add(connection)
        try:
            yield
        finally:
            with self._is_idle:
                self._busy.discard(connection)
                self._is_idle.notify_all()

    def end_requests(self, timeout_s: float) -> None:
        """Wait for the requests in progress; then disconnect clients that do not read."""
        with self._is_idle:
            self._is_idle.wait_for(lambda: not self._busy, timeout_s)
            for connection in self._busy:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Gateway(Gateway_10):
    """Adds the connection to the environment, so that a wait ends when the client leaves."""

    def get_environ(self) -> dict[str, Any]:  # type: ignore[override]
        environ: dict[str, Any] = super().get_environ()  # type: ignore[no-untyped-call]
        return {**environ, CONNECTION: self.req.conn.socket}

    def respond(self) -> None:
        with self.req.server.serving(self.req.conn.socket):
            super().respond()


class WebDavServer:
    """A server that listens when it is created, and serves until `stop`.

    Args:
        accounts: who may use the server; without, it listens on the loopback interface only.

    Raises:
        StartupError: the address or the certificate cannot be used.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        address: Address,
        *,
        accounts: Accounts | None = None,
        certificate: Certificate | None = None,
        timeout_s: float,
        is_read_only: bool,
    ) -> None:
        found = address.resolve()
        self.is_loopback = all(each.is_loopback for each in found)
        if accounts is None and not self.is_loopback:
            raise StartupError(
                f"cannot listen on {address.host or 'all addresses'}: other hosts could read and"
                " delete everything (hint: --auth-file FILE, or --listen 127.0.0.1:8080)"
            )
        self._stopping = threading.Event()
        provider = TreeProvider(
            filesystem, timeout_s=timeout_s, is_read_only=is_read_only, stopping=self._stopping
        )
        application = Gate(_dav_application(provider), allowed_hosts(address.host, found), accounts)
        self._server = _listen(address, application, certificate)
        scheme = "http" if certificate is None else "https"
        host = f"[{address.host}]" if ":" in address.host else address.host or "0.0.0.0"  # noqa: S104
        self.url = f"{scheme}://{host}:{self._server.bind_addr[1]}/"
        self._serving = run_in_thread(self._server.serve, "webdav")

    def stop(self) -> None:
        """End waiting requests, let others end for a moment, and stop serving."""
        self._stopping.set()
        self._server.end_requests(_GRACE_S)
        self._server.stop()
        self._serving.result()


@contextmanager
def serving(filesystem: FileSystem, address: Address, **options: Any) -> Iterator[WebDavServer]:
    """Serve until the end of the block; the options are those of `WebDavServer`."""
    server = WebDavServer(filesystem, address, **options)
    try:
        yield server
    finally:
        server.stop()


def _dav_application(provider: TreeProvider) -> Callable[..., Any]:
    # The gate and the provider report failures. WsgiDAV would log the expected ones as errors.
    logging.getLogger("wsgidav").setLevel(logging.CRITICAL)
    return WsgiDAVApp(  # type: ignore[no-any-return]
        {
            "provider_mapping": {"/": provider},
            "middleware_stack": [RequestResolver],
            "lock_storage": None if provider.is_readonly() else LockStorageDict(),
            "property_manager": None,
            "block_size": _BLOCK_BYTES,
            "hotfixes": {"re_encode_path_info": False},
            "logging": {"enable": False},
            "verbose": 0,
            "suppress_version_info": True,
        }
    )


def _listen(
    address: Address, application: Callable[..., Any], certificate: Certificate | None
) -> _Server:
    server = _Server(
        (address.host or "0.0.0.0", address.port),  # noqa: S104
        application,
        numthreads=THREADS,
        server_name="tinkerfs",
        request_queue_size=128,
        timeout=_SOCKET_TIMEOUT_S,
        shutdown_timeout=2,
    )
    server.gateway = _Gateway
    server.expiration_interval = _STOP_POLL_S
    server.max_request_body_size = _MAX_BODY_BYTES
    server.max_request_header_size = _MAX_HEADER_BYTES
    server.error_log = _log_server_error  # type: ignore[method-assign]
    if certificate is not None:
        try:
            server.ssl_adapter = BuiltinSSLAdapter(certificate.certificate, certificate.key)
        except (OSError, ssl.SSLError) as error:
            raise StartupError(
                f"cannot use the certificate {certificate.certificate}: {error.strerror or error}"
                " (hint: --cert FILE in PEM, and --key FILE if the key is in another file)"
            ) from None
    try:
        server.prepare()
    except OSError as error:
        raise StartupError(
            f"cannot listen on {address.host}:{address.port}: {error.strerror or error}"
            " (hint: --listen ADDRESS:PORT)"
        ) from None
    return server


def _log_server_error(msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
    # Lost connections and malformed requests; failures of the application are logged by the gate.
    del level
    log.debug("%s", msg.strip(), exc_info=traceback)
