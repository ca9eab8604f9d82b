"""Network backend of the API's HTTP client: one deadline per exchange.

HTTP libraries apply a timeout to each read. A response that arrives byte by byte, or that starts
with endless interim responses (1xx), would block its request forever. Here every connect,
handshake, write and read of an exchange ends at the deadline of the exchange.

An idle connection may be dead without notice: after a suspend, or if a NAT or VPN dropped it. The
first response on such a connection has a short timeout. A request that must not be sent twice never
uses such a connection.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import httpcore

from tinkerfs import network
from tinkerfs.operating_system import time_with_suspend

if TYPE_CHECKING:
    from urllib3.util.ssltransport import SSLTransport

#: A connection is suspect after this idle time, seconds.
IDLE_S = 5.0
#: Minimum timeout of the first response on a suspect connection, seconds. It is at least twice the
#: latency of the slowest recent response, so that no request is sent twice to a slow server.
IDLE_RESPONSE_TIMEOUT_S = 2.0
#: Idle connections are closed after this time, seconds, so that a walk can pause without
#: reconnecting. Most load balancers close them after 60 s.
KEEPALIVE_S = 55.0
#: Maximum size of a response's headers including interim responses, bytes.
MAX_HEAD_BYTES = 256 << 10


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its response, used by the thread that sends the request.

    Attributes:
        deadline: on `time.monotonic`.
        may_repeat: whether the request may be sent again. If not, it uses no suspect connection.
        is_head: whether the headers of the response have not been received yet.
        head_bytes: bytes received before the end of the headers.
        received_bytes: all bytes received.
        is_connection_dead: whether a suspect connection did not respond.
        is_reused: whether the connection served another exchange before.
        opened: connections that were opened for the exchange.
    """

    deadline: float
    may_repeat: bool
    is_head: bool = True
    head_bytes: int = 0
    received_bytes: int = 0
    is_connection_dead: bool = False
    is_reused: bool = False
    opened: "list[_Stream]" = field(default_factory=list)

    def remaining_s(self, timeout_s: float | None = None) -> float:
        """Return the timeout of the next network operation, seconds.

        Raises:
            TimeoutError: the deadline has passed.
        """
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("timed out")
        return remaining_s if timeout_s is None else min(remaining_s, timeout_s)


class DeadlineBackend(httpcore.NetworkBackend):
    """Opens connections that obey the deadline of the current exchange. Thread-safe."""

    def __init__(self) -> None:
        self._local = threading.local()
        #: Connections that were last used before this instant of `_now` are closed.
        self.trusted_since = float("-inf")
        self._slowest_s = 0.0

    def observe(self, response_s: float) -> None:
        """Record the latency of a response to a request that may be sent again."""
        self._slowest_s = max(response_s, self._slowest_s * 0.9)

    @property
    def idle_response_timeout_s(self) -> float:
        """Timeout of the first response on a suspect connection, seconds."""
        return max(IDLE_RESPONSE_TIMEOUT_S, 2 * self._slowest_s)

    @property
    def current(self) -> Exchange | None:
        """The exchange of the calling thread, None outside an exchange."""
        exchange: Exchange | None = getattr(self._local, "exchange", None)
        return exchange

    @contextlib.contextmanager
    def exchange(self, timeout_s: float, *, may_repeat: bool) -> Iterator[Exchange]:
        """Apply one deadline to all network operations of the calling thread in the body.

        Args:
            timeout_s: time until the deadline, seconds.
            may_repeat: whether the request may be sent again.
        """
        exchange = Exchange(time.monotonic() + timeout_s, may_repeat)
        self._local.exchange = exchange
        try:
            yield exchange
        except BaseException:
            # httpcore does not close a connection if a proxy rejects it or does not respond.
            for stream in exchange.opened:
                stream.close()
            raise
        finally:
            self._local.exchange = None
            exchange.opened.clear()  # breaks a reference cycle

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> "_Stream":
        """Open a TCP connection; socket options and the local address are ignored."""
        with _map_socket_errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            deadline = time.monotonic() + self.remaining_s(timeout)
            return _Stream(self, network.connect(host, port, deadline))

    def remaining_s(self, timeout_s: float | None) -> float:
        """Return the timeout of the calling thread's next network operation, seconds.

        Raises:
            TimeoutError: the deadline of the exchange has passed.
        """
        exchange = self.current
        if exchange is not None:
            return exchange.remaining_s(timeout_s)
        return 30.0 if timeout_s is None else timeout_s


class _TimedSocket:
    """A socket with calls that obey the deadline of the current exchange.

    Attributes:
        timeout_s: additional timeout of each call, seconds.
    """

    def __init__(self, backend: DeadlineBackend, sock: socket.socket) -> None:
        self.timeout_s: float | None = None
        self._backend = backend
        self._sock = sock

    def recv(self, size: int) -> bytes:
        self._sock.settimeout(self._backend.remaining_s(self.timeout_s))
        return self._sock.recv(size)

    def sendall(self, data: bytes) -> None:
        # `socket.sendall` applies the timeout to the whole buffer, like a TLS handshake.
        self._sock.settimeout(self._backend.remaining_s(self.timeout_s))
        self._sock.sendall(data)


class _Stream(httpcore.NetworkStream):
    """One connection, used by one thread at a time.

    Args:
        sock: plain or TLS socket.
        inner: wraps the socket for TLS inside the TLS of a proxy; None for a single layer.
    """

    def __init__(
        self,
        backend: DeadlineBackend,
        sock: socket.socket,
        inner: "Callable[[socket.socket], SSLTransport] | None" = None,
    ) -> None:
        self._backend = backend
        self._sock = sock
        self._timed = _TimedSocket(backend, sock)
        # SSLTransport uses only the methods `recv` and `sendall` of its socket.
        self._inner = None if inner is None else inner(cast("socket.socket", self._timed))
        # A suspend counts as idle time, unlike on `time.monotonic`.
        self._used_at = time_with_suspend()
        self._is_suspect = False
        self._last: Exchange | None = None
        if backend.current is not None:
            backend.current.opened.append(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Wait for data and return it."""
        exchange = self._backend.current
        sock = self._inner or self._timed
        with _map_socket_errors(httpcore.ReadTimeout, httpcore.ReadError):
            remaining_s = self._backend.remaining_s(timeout)
            idle_timeout_s = self._backend.idle_response_timeout_s
            is_shortened = self._is_suspect and remaining_s > idle_timeout_s
            self._timed.timeout_s = idle_timeout_s if is_shortened else timeout
            try:
                data = cast("bytes", sock.recv(max_bytes))
            except TimeoutError:
                if is_shortened and exchange is not None:
                    exchange.is_connection_dead = True
                    self._backend.trusted_since = time_with_suspend() - IDLE_S
                raise
        self._is_suspect, self._used_at = False, time_with_suspend()
        if exchange is not None:
            exchange.received_bytes += len(data)
        if exchange is not None and exchange.is_head:
            exchange.head_bytes += len(data)
            if exchange.head_bytes > MAX_HEAD_BYTES:
                raise httpcore.RemoteProtocolError(
                    f"more than {MAX_HEAD_BYTES >> 10} KiB before the end of the headers"
                )
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send the whole buffer."""
        exchange = self._backend.current
        if exchange is not None and exchange is not self._last:
            exchange.is_reused, self._last = self._last is not None, exchange
            self._is_suspect = exchange.is_reused and self._idle_s >= IDLE_S
        self._used_at = time_with_suspend()
        sock = self._inner or self._timed
        with _map_socket_errors(httpcore.WriteTimeout, httpcore.WriteError):
            self._timed.timeout_s = timeout
            sock.sendall(buffer)

    def close(self) -> None:
        """Close the connection and end a pending read on another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # close(2) alone does not wake a reader
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> "_Stream":
        """Start TLS on the connection and return its new stream."""
        with _map_socket_errors(httpcore.ConnectTimeout, httpcore.ConnectError):
            try:
                if isinstance(self._sock, ssl.SSLSocket):
                    # TLS through an https proxy, the only use of this import.
                    from urllib3.util.ssltransport import SSLTransport

                    return _Stream(
                        self._backend,
                        self._sock,
                        lambda sock: SSLTransport(sock, ssl_context, server_hostname),
                    )
                self._sock.settimeout(self._backend.remaining_s(timeout))
                secured = ssl_context.wrap_socket(self._sock, server_hostname=server_hostname)
                return _Stream(self._backend, secured)
            except BaseException:
                self.close()
                raise

    def get_extra_info(self, info: str) -> Any:
        """Return a property of the connection to httpcore, None if unsupported."""
        if info == "is_readable":  # httpcore then discards an idle connection
            return self._is_unusable() or _is_readable(self._sock)
        if info == "ssl_object":
            return self._inner or (self._sock if isinstance(self._sock, ssl.SSLSocket) else None)
        return self._sock if info == "socket" else None

    @property
    def _idle_s(self) -> float:
        return time_with_suspend() - self._used_at

    def _is_unusable(self) -> bool:
        """Return whether the calling thread must not use this idle connection."""
        exchange = self._backend.current
        may_use_suspect = exchange is None or exchange.may_repeat
        return self._used_at < self._backend.trusted_since or self._idle_s >= (
            KEEPALIVE_S if may_use_suspect else IDLE_S
        )


def _is_readable(sock: socket.socket) -> bool:
    """Return whether a socket is readable or closed.

    An idle connection becomes readable when its peer closes it.
    """
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _map_socket_errors(
    timeout_error: type[Exception], other_error: type[Exception]
) -> Iterator[None]:
    """Raise errors of a socket as the given errors of httpcore."""
    try:
        yield
    except TimeoutError as error:
        raise timeout_error(error) from error
    except OSError as error:
        raise other_error(error) from error
