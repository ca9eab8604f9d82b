"""Connections of urllib3 whose every wait for a store ends by a deadline.

A time-out of a socket bounds one wait for more bytes, so a store that sends a byte a second holds
a thread for ever. Here the time-out bounds the head of a response as a whole, and the wait for each
further part of its body. A connection that was idle is tried for a short time only, because a
suspended host, a NAT or a VPN forgets connections without closing them.
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

#: A connection that was silent for longer is tried for `PROBE_S` only, seconds.
IDLE_S = 1.0
PROBE_S = 2.0

#: The most 1xx responses before a response (RFC 9110, 15.2), and lines after a chunked body.
MAX_INTERIM = 32
MAX_TRAILERS = 100

#: A chunk's size and extensions (RFC 9112, 7.1); `int` would take a sign and underscores too.
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
_MAX_LINE_BYTES = 4096

#: What a record of TLS holds at the most (RFC 8446, 5.1).
_RECORD_BYTES = 16 << 10


class StaleConnection(ConnectionError):
    """An idle connection is dead: it ended, or stayed silent, without a byte of a response."""


class _Bounded(socket.socket):
    """What both kinds of sockets have in common. One thread's.

    Attributes:
        heard_at: when bytes were last received, on the clock that runs on while the host is
            suspended; None before the first.
    """

    heard_at: float | None = None
    _deadline = math.inf
    _first_deadline: float | None = None

    def limit(self, timeout_s: float, first_timeout_s: float | None = None) -> None:
        """Bound all reads from now on together.

        Args:
            timeout_s: for all of them, seconds.
            first_timeout_s: for the first byte.
        """
        now = time.monotonic()
        self._deadline, self._first_deadline = now + timeout_s, None
        if first_timeout_s is not None:
            self._first_deadline = now + first_timeout_s
        if self.gettimeout() != timeout_s:
            self.settimeout(timeout_s)

    def _receive(self, receive: Callable[..., int], buffer: Any, *more: int) -> int:
        """Read by `receive` within the deadline.

        Raises:
            TimeoutError: the deadline has passed.
        """
        deadline = self._deadline if self._first_deadline is None else self._first_deadline
        timeout_s = self.gettimeout()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        # To set a time-out is a system call: not for each of the reads that take no time.
        if timeout_s is None or left_s < 0.9 * timeout_s:
            self.settimeout(None if left_s == math.inf else left_s)
        received_bytes = receive(buffer, *more)
        if not received_bytes:
            return 0
        self.heard_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        if self._first_deadline is not None:
            self._first_deadline = None
            self.settimeout(max(self._deadline - time.monotonic(), 0.001))
        return received_bytes


class _PlainSocket(_Bounded):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self._receive(super().recv_into, buffer, nbytes, flags)


class TlsSocket(ssl.SSLSocket, _Bounded):
    """TLS that hands out all that was received, not one record of 16 KiB at a time."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Read once, and on while there is more without a wait."""
        view = memoryview(buffer).cast("B")
        want_bytes = nbytes or len(view)
        have = self._receive(super().recv_into, view, want_bytes, flags)
        if want_bytes <= _RECORD_BYTES or not have:
            return have
        timeout_s = self.gettimeout()
        try:
            self.settimeout(0)
            while have < want_bytes and (got := super().recv_into(view[have:want_bytes])):
                have += got
        except OSError:  # nothing yet (ssl.SSLWantReadError); or it broke, and the next read ends
            pass
        finally:
            self.settimeout(timeout_s)
        return have


class _Response(http.client.HTTPResponse):
    """A response that is read within deadlines, by a stricter reading of RFC 9112."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._timeout_s = sock.gettimeout() or math.inf
        # urllib3 puts TLS within TLS into an object of its own.
        found = sock if isinstance(sock, _Bounded) else getattr(sock, "socket", None)
        self._socket = found if isinstance(found, _Bounded) else None

    def send(self) -> None:
        """Read the head.

        Raises:
            StaleConnection: the connection has served before, and is dead.
        """
        sock = self._socket
        if sock is None or self._timeout_s == math.inf:
            super().begin()
            return
        heard_at, probe_s = sock.heard_at, None
        if heard_at is not None and time.clock_gettime(time.CLOCK_BOOTTIME) - heard_at > IDLE_S:
            probe_s = min(PROBE_S, self._timeout_s)
        sock.limit(self._timeout_s, probe_s)
        try:
            super().begin()
        except OSError as error:
            if heard_at is None or sock.heard_at != heard_at:
                raise
            raise StaleConnection(f"an idle connection is dead: {error}") from error

    def read1(self, n: int = -1) -> bytes:
        """Read what is there of the body, waiting for the first of it."""
        if self._socket is not None and self._timeout_s != math.inf:
            self._socket.limit(self._timeout_s)
        return super().read1(n)

    # http.client has no public place for the following.

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INTERIM):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("interim responses without end")

    def _read_next_chunk_size(self) -> int:
        found = _CHUNK_LINE.fullmatch(self.fp.readline(_MAX_LINE_BYTES))
        if found is None:
            raise ValueError("not the size of a chunk")
        return int(found[1], 16)

    def _read_and_discard_trailer(self) -> None:
        for _ in range(MAX_TRAILERS):
            if self.fp.readline(_MAX_LINE_BYTES) in (b"\r\n", b"\n", b""):
                return
        raise http.client.HTTPException("trailers without end")


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        made = super()._new_conn()
        timeout_s = made.gettimeout()
        bounded = _PlainSocket(made.family, made.type, made.proto, fileno=made.detach())
        bounded.settimeout(timeout_s)
        if timeout_s is not None:  # for what a proxy has to say first
            bounded.limit(timeout_s)
        return bounded


class _Dialling(_Connection):
    """A connection that tries the addresses of a host side by side."""

    def _new_conn(self) -> socket.socket:
        timeout_s = cast("float", self.timeout)
        deadline = time.monotonic() + timeout_s
        try:
            made = network.connect(self._dns_host, self.port or self.default_port, deadline)
        except socket.gaierror as error:
            raise urllib3.exceptions.NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "timed out") from error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        bounded = _PlainSocket(made.family, made.type, made.proto, fileno=made.detach())
        bounded.limit(timeout_s)
        return bounded


def use_deadlines(manager: urllib3.PoolManager) -> None:
    """Let every connection that a manager makes from now on keep to deadlines.

    The certificates' context of the manager has `TlsSocket` as its `sslsocket_class`.
    """
    manager.pool_classes_by_scheme = {
        scheme: _with_deadlines(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
    }


@cache
def _with_deadlines(
    pool: type[urllib3.HTTPConnectionPool],
) -> type[urllib3.HTTPConnectionPool]:
    connection: Any = pool.ConnectionCls
    # What reaches a proxy in a way of its own (SOCKS) connects by itself.
    is_plain = connection._new_conn is urllib3.connection.HTTPConnection._new_conn
    bounded = type(connection.__name__, (_Dialling if is_plain else _Connection, connection), {})
    return type(pool.__name__, (pool,), {"ConnectionCls": bounded})
