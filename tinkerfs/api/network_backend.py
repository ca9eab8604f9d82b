"""Network backend of the API's HTTP client: one deadline for a whole exchange.

HTTP libraries bound each read by itself, so a response that arrives a byte a second, or begins with
endless interim responses (1xx), holds its request for good. Here every connect, handshake, write
and read of a request ends at the request's own deadline.

A connection that has been idle may be dead without a sign: after a suspend, or when a NAT or a VPN
has forgotten it. The first response on it is awaited for a short time only. A request that must
not be sent twice uses no such connection at all.
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

if TYPE_CHECKING:
    from urllib3.util.ssltransport import SSLTransport

#: A connection is suspect after this time without use, seconds.
IDLE_S = 5.0
#: How long a response on a suspect connection is awaited, seconds; at least twice as long as the
#: slowest one took lately, so that a slow server does not get its requests twice.
IDLE_RESPONSE_TIMEOUT_S = 2.0
#: Idle connections are dropped after this time, seconds: a walk that pauses goes on without eight
#: new ones. The usual balancers drop one after 60 s; one dropped sooner is noticed by using it.
KEEPALIVE_S = 55.0
#: The most bytes before the end of a response's headers, interim responses included.
MAX_HEAD_BYTES = 256 << 10


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its response, on the thread that sends it.

    Attributes:
        deadline: when it ends, on `time.monotonic`.
        may_repeat: whether it may be sent again, so that a suspect connection may be tried.
        is_head: whether the response's headers are still awaited.
        head_bytes: received until then.
        received_bytes: in all.
        is_connection_dead: set when a suspect connection did not respond.
        is_reused: whether its connection served another exchange before.
        opened: the connections that were made for it.
    """

    deadline: float
    may_repeat: bool
    is_head: bool = True
    head_bytes: int = 0
    received_bytes: int = 0
    is_connection_dead: bool = False
    is_reused: bool = False
    opened: "list[_Stream]" = field(default_factory=list)

    def left_s(self, timeout_s: float | None = None) -> float:
        """Return how long the next step may take, seconds.

        Raises:
            TimeoutError: no time is left.
        """
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        return left_s if timeout_s is None else min(left_s, timeout_s)


class Backend(httpcore.NetworkBackend):
    """Connections whose steps end at the deadline of the exchange they serve. Thread-safe."""

    def __init__(self) -> None:
        self._local = threading.local()
        #: Connections that were last used before are dropped, on the clock of `_now`.
        self.trusted_since = float("-inf")
        self._slowest_s = 0.0

    def observe(self, response_s: float) -> None:
        """Learn how long the server took to respond to a request that may be sent again."""
        self._slowest_s = max(response_s, self._slowest_s * 0.9)

    @property
    def idle_response_timeout_s(self) -> float:
        """How long a response on a suspect connection is awaited, seconds."""
        return max(IDLE_RESPONSE_TIMEOUT_S, 2 * self._slowest_s)

    @property
    def current(self) -> Exchange | None:
        """The exchange of the calling thread, None while it has none."""
        exchange: Exchange | None = getattr(self._local, "exchange", None)
        return exchange

    @contextlib.contextmanager
    def exchange(self, timeout_s: float, *, may_repeat: bool) -> Iterator[Exchange]:
        """Bound all that the calling thread does with connections in the body.

        Args:
            timeout_s: how long it may take in all, seconds.
            may_repeat: whether the request may be sent again.
        """
        exchange = Exchange(time.monotonic() + timeout_s, may_repeat)
        self._local.exchange = exchange
        try:
            yield exchange
        except BaseException:
            # httpcore leaves a connection open on which a proxy refused or did not respond.
            for stream in exchange.opened:
                stream.close()
            raise
        finally:
            self._local.exchange = None
            exchange.opened.clear()  # they refer to the exchange

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> "_Stream":
        """Connect, as `httpcore.NetworkBackend`; options and the local address stay the usual."""
        with _translated(httpcore.ConnectTimeout, httpcore.ConnectError):
            deadline = time.monotonic() + self.left_s(timeout)
            return _Stream(self, network.connect(host, port, deadline))

    def left_s(self, timeout_s: float | None) -> float:
        """Return how long the next step of the calling thread may take, seconds.

        Raises:
            TimeoutError: no time is left.
        """
        exchange = self.current
        if exchange is not None:
            return exchange.left_s(timeout_s)
        return 30.0 if timeout_s is None else timeout_s


class _TimedSocket:
    """A socket whose every call ends at the deadline of the exchange it serves.

    Attributes:
        timeout_s: bound on each call besides, seconds.
    """

    def __init__(self, backend: Backend, sock: socket.socket) -> None:
        self.timeout_s: float | None = None
        self._backend = backend
        self._sock = sock

    def recv(self, size: int) -> bytes:
        self._sock.settimeout(self._backend.left_s(self.timeout_s))
        return self._sock.recv(size)

    def sendall(self, data: bytes) -> None:
        # One bound on all of it (socket.sendall), and so is that on a handshake of TLS.
        self._sock.settimeout(self._backend.left_s(self.timeout_s))
        self._sock.sendall(data)


class _Stream(httpcore.NetworkStream):
    """One connection; used by one thread at a time.

    Args:
        backend: whose it is.
        sock: plain, or of TLS.
        inner: makes TLS within the TLS of a proxy from the socket of it; None for none.
    """

    def __init__(
        self,
        backend: Backend,
        sock: socket.socket,
        inner: "Callable[[socket.socket], SSLTransport] | None" = None,
    ) -> None:
        self._backend = backend
        self._sock = sock
        self._timed = _TimedSocket(backend, sock)
        # SSLTransport calls `recv` and `sendall` of what it is given, and nothing else.
        self._inner = None if inner is None else inner(cast("socket.socket", self._timed))
        self._used_at = _now()
        self._is_suspect = False
        self._last: Exchange | None = None
        if backend.current is not None:
            backend.current.opened.append(self)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has arrived, after waiting for some of it."""
        exchange = self._backend.current
        end = self._inner or self._timed
        with _translated(httpcore.ReadTimeout, httpcore.ReadError):
            left_s = self._backend.left_s(timeout)
            idle_timeout_s = self._backend.idle_response_timeout_s
            is_cut_short = self._is_suspect and left_s > idle_timeout_s
            self._timed.timeout_s = idle_timeout_s if is_cut_short else timeout
            try:
                data = cast("bytes", end.recv(max_bytes))
            except TimeoutError:
                if is_cut_short and exchange is not None:
                    exchange.is_connection_dead = True
                    self._backend.trusted_since = _now() - IDLE_S
                raise
        self._is_suspect, self._used_at = False, _now()
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
        """Send all of a buffer."""
        exchange = self._backend.current
        if exchange is not None and exchange is not self._last:
            exchange.is_reused, self._last = self._last is not None, exchange
            self._is_suspect = exchange.is_reused and self._idle_s >= IDLE_S
        self._used_at = _now()
        end = self._inner or self._timed
        with _translated(httpcore.WriteTimeout, httpcore.WriteError):
            self._timed.timeout_s = timeout
            end.sendall(buffer)

    def close(self) -> None:
        """End the connection, and a read of it on another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # close(2) alone wakes no reader
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> "_Stream":
        """Return the same connection with TLS."""
        with _translated(httpcore.ConnectTimeout, httpcore.ConnectError):
            try:
                if isinstance(self._sock, ssl.SSLSocket):
                    # Through a proxy that is itself spoken to in TLS; imported for that alone.
                    from urllib3.util.ssltransport import SSLTransport

                    return _Stream(
                        self._backend,
                        self._sock,
                        lambda sock: SSLTransport(sock, ssl_context, server_hostname),
                    )
                self._sock.settimeout(self._backend.left_s(timeout))
                secured = ssl_context.wrap_socket(self._sock, server_hostname=server_hostname)
                return _Stream(self._backend, secured)
            except BaseException:
                self.close()
                raise

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks of a connection, None for what it does not need."""
        if info == "is_readable":  # of an idle one: whether it must not be used
            return self._is_unfit() or _is_readable(self._sock)
        if info == "ssl_object":
            return self._inner or (self._sock if isinstance(self._sock, ssl.SSLSocket) else None)
        return self._sock if info == "socket" else None

    @property
    def _idle_s(self) -> float:
        return _now() - self._used_at

    def _is_unfit(self) -> bool:
        """Return whether an idle connection must not serve the calling thread."""
        exchange = self._backend.current
        may_try = exchange is None or exchange.may_repeat
        return self._used_at < self._backend.trusted_since or self._idle_s >= (
            KEEPALIVE_S if may_try else IDLE_S
        )


def _now() -> float:
    # A suspend counts as idle time, which `time.monotonic` leaves out (clock_gettime(2)).
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _is_readable(sock: socket.socket) -> bool:
    """Return whether something has arrived, which on an idle connection is its end."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _translated(timed_out: type[Exception], failed: type[Exception]) -> Iterator[None]:
    """Raise an error of a socket as httpcore does."""
    try:
        yield
    except TimeoutError as error:
        raise timed_out(error) from error
    except OSError as error:
        raise failed(error) from error
