"""urllib3 connections with a deadline for every wait.

A socket timeout bounds one wait for more bytes, so a store that sends a byte per second would block
a thread forever. Here the timeout bounds the whole head of a response, and the wait for each
further chunk of its body. An idle connection gets only a short time for its first byte, because
a suspended host, a NAT or a VPN may have dropped it without closing it.
"""

import http.client
import math
import re
import socket
import ssl
import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import urllib3

from tinkerfs import network
from tinkerfs.operating_system import time_with_suspend

#: A connection that was silent for longer must send its first byte within `PROBE_S`, seconds.
IDLE_S = 1.0
PROBE_S = 2.0

#: Maximum number of 1xx responses (RFC 9110, 15.2), and of trailer lines after a chunked body.
MAX_INTERIM = 32
MAX_TRAILERS = 100

#: A chunk size and extensions (RFC 9112, 7.1); `int` would also accept signs and underscores.
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_MAX_LINE_BYTES = 4096

#: Maximum size of a TLS record (RFC 8446, 5.1).
_RECORD_BYTES = 16 << 10


class StaleConnection(ConnectionError):
    """An idle connection is dead: no byte of a response arrived."""


class _DeadlineSocket(socket.socket):
    """A socket with a common deadline of its reads. Not thread-safe.

    Attributes:
        last_received_at: when bytes were last received, on a clock that includes suspend; None if
            none were received yet.
    """

    last_received_at: float | None = None
    _deadline = math.inf
    _first_deadline: float | None = None

    def set_deadline(self, timeout_s: float, first_timeout_s: float | None = None) -> None:
        """Set the deadline of the following reads, and optionally of their first byte."""
        now = time.monotonic()
        self._deadline, self._first_deadline = now + timeout_s, None
        if first_timeout_s is not None:
            self._first_deadline = now + first_timeout_s
        if self.gettimeout() != timeout_s:
            self.settimeout(timeout_s)

    def _receive(self, receive: Callable[..., int], buffer: Any, *more: int) -> int:
        """Call `receive` within the deadline.

        Raises:
            TimeoutError: the deadline has passed.
        """
        deadline = self._deadline if self._first_deadline is None else self._first_deadline
        timeout_s = self.gettimeout()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        # Setting a timeout is a system call, so it is skipped if little time has passed.
        if timeout_s is None or left_s < 0.9 * timeout_s:
            self.settimeout(None if left_s == math.inf else left_s)
        received_bytes = receive(buffer, *more)
        if not received_bytes:
            return 0
        self.last_received_at = time_with_suspend()
        if self._first_deadline is not None:
            self._first_deadline = None
            self.settimeout(max(self._deadline - time.monotonic(), 0.001))
        return received_bytes


class _PlainSocket(_DeadlineSocket):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self._receive(super().recv_into, buffer, nbytes, flags)


class TlsSocket(ssl.SSLSocket, _DeadlineSocket):
    """A TLS socket that reads all available bytes, not one record at a time."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Read once, and then whatever is available without waiting."""
        view = memoryview(buffer).cast("B")
        want_bytes = nbytes or len(view)
        received_bytes = self._receive(super().recv_into, view, want_bytes, flags)
        if want_bytes <= _RECORD_BYTES or not received_bytes:
            return received_bytes
        timeout_s = self.gettimeout()
        try:
            self.settimeout(0)
            while received_bytes < want_bytes and (
                more_bytes := super().recv_into(view[received_bytes:want_bytes])
            ):
                received_bytes += more_bytes
        except OSError:  # nothing available (ssl.SSLWantReadError), or raised by the next read
            pass
        finally:
            self.settimeout(timeout_s)
        return received_bytes


class _Response(http.client.HTTPResponse):
    """A response that is read within deadlines, and parsed more strictly (RFC 9112)."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._timeout_s = sock.gettimeout() or math.inf
        # urllib3 wraps TLS within TLS into another object.
        match = sock if isinstance(sock, _DeadlineSocket) else getattr(sock, "socket", None)
        self._socket = match if isinstance(match, _DeadlineSocket) else None

    def begin(self) -> None:
        """Read the head.

        Raises:
            StaleConnection: the connection has been used before, and is dead.
        """
        sock = self._socket
        if sock is None or self._timeout_s == math.inf:
            super().begin()
            return
        last_received_at, probe_s = sock.last_received_at, None
        if last_received_at is not None and time_with_suspend() - last_received_at > IDLE_S:
            probe_s = min(PROBE_S, self._timeout_s)
        sock.set_deadline(self._timeout_s, probe_s)
        try:
            super().begin()
        except OSError as error:
            if last_received_at is None or sock.last_received_at != last_received_at:
                raise
            raise StaleConnection(f"an idle connection is dead: {error}") from error

    def read1(self, n: int = -1) -> bytes:
        """Return what is available of the body; wait for the first byte."""
        if self._socket is not None and self._timeout_s != math.inf:
            self._socket.set_deadline(self._timeout_s)
        return super().read1(n)

    # http.client has no public methods for the following.

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("endless interim responses")

    def _read_next_chunk_size(self) -> int:
        match = _CHUNK_LINE.fullmatch(self.fp.readline(_MAX_LINE_BYTES))
        if match is None:
            raise ValueError("not the size of a chunk")
        return int(match[1], 16)

    def _read_and_discard_trailer(self) -> None:
        for _ in range(MAX_TRAILERS):
            if self.fp.readline(_MAX_LINE_BYTES) in (b"\r\n", b"\n", b""):
                return
        raise http.client.HTTPException("endless trailers")


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        timeout_s = sock.gettimeout()
        bounded = _PlainSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        bounded.settimeout(timeout_s)
        if timeout_s is not None:  # for the proxy's response to CONNECT
            bounded.set_deadline(timeout_s)
        return bounded


class _DialingConnection(_Connection):
    """A connection that tries the addresses of a host concurrently."""

    def _new_conn(self) -> socket.socket:
        timeout_s = cast("float", self.timeout)
        deadline = time.monotonic() + timeout_s
        try:
            sock = network.connect(self._dns_host, self.port or self.default_port, deadline)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "timed out") from error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        bounded = _PlainSocket(sock.family, sock.type, sock.proto, fileno=sock.detach())
        bounded.set_deadline(timeout_s)
        return bounded


def use_deadlines(manager: urllib3.PoolManager) -> None:
    """Make all new connections of a manager use deadlines.

    The SSL context of the manager must have `TlsSocket` as its `sslsocket_class`.
    """
    manager.pool_classes_by_scheme = {
        scheme: _with_deadlines(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
    }


@cache
def _with_deadlines(
    pool: type[urllib3.HTTPConnectionPool],
) -> type[urllib3.HTTPConnectionPool]:
    connection: Any = pool.ConnectionCls
    # Connections with their own way to a proxy (SOCKS) also connect in their own way.
    is_plain = connection._new_conn is urllib3.connection.HTTPConnection._new_conn
    bounded = type(
        connection.__name__, (_DialingConnection if is_plain else _Connection, connection), {}
    )
    return type(pool.__name__, (pool,), {"ConnectionCls": bounded})
