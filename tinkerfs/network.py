"""TCP connections with one deadline for the lookup and every address.

Used for the API and the object store. Addresses are tried according to RFC 8305 ("Happy
Eyeballs"), so that a host with broken IPv6 costs a quarter of a second and not the whole timeout.
Thread-safe and stateless.
"""

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any, TypeAlias

from tinkerfs.operating_system import keepalive_options

#: Delay before the next attempt unless the last one failed, seconds (RFC 8305, section 5).
ATTEMPT_DELAY_S = 0.25

#: Family and socket address, in the format of `socket.getaddrinfo`.
Address: TypeAlias = tuple[int, Any]

#: Options of every connection. A vanished peer is detected after 15 + 3 x 5 s. A response may take
#: minutes, and the kernel's default for the detection is 2 hours (tcp(7)).
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *keepalive_options(idle_s=15, interval_s=5, count=3),
)


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a blocking socket that is connected to a host.

    Args:
        host: a name or an IP address, without brackets.
        port: TCP port.
        deadline: on the clock `time.monotonic`.

    Raises:
        TimeoutError: no connection by the deadline.
        OSError: the name is unknown, or every address failed; the error of the last address.
    """
    return connect_any(resolve(host, port, deadline), deadline)


def resolve(host: str, port: int, deadline: float) -> list[Address]:
    """Return the addresses of a host, with alternating address families.

    Raises:
        TimeoutError: no addresses by the deadline; the lookup continues without effect.
        OSError: the name is unknown, or the lookup fails temporarily.
    """
    try:
        return _lookup(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    future: Future[list[Address]] = Future()

    def run() -> None:
        try:
            future.set_result(_lookup(host, port))
        except OSError as error:
            future.set_exception(error)

    # getaddrinfo(3) has no timeout parameter, and takes 20 s if no resolver responds.
    threading.Thread(target=run, name=f"resolve {host}", daemon=True).start()
    try:
        return future.result(max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
        raise TimeoutError("timed out looking up the host name") from None


def connect_any(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """Return a blocking socket that is connected to the first address that accepts.

    Args:
        addresses: tried every `ATTEMPT_DELAY_S`, or as soon as the previous one has failed.
        deadline: on the clock `time.monotonic`.

    Raises:
        TimeoutError: no connection by the deadline.
        OSError: every address failed; the error of the last address.
    """
    remaining = deque(addresses)
    attempts: dict[int, socket.socket] = {}
    poll = select.poll()
    next_at = time.monotonic()
    failure = OSError("the host has no address")
    try:
        while remaining or attempts:
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError("timed out")
            if remaining and (not attempts or now >= next_at):
                next_at = now + ATTEMPT_DELAY_S
                try:
                    attempt = _start(*remaining.popleft())
                except OSError as error:  # no route, or the address family is unsupported
                    failure, next_at = error, now
                    continue
                attempts[attempt.fileno()] = attempt
                poll.register(attempt, select.POLLOUT)
            until = min(deadline, next_at) if remaining else deadline
            for fd, _ in poll.poll(math.ceil(max(until - now, 0.0) * 1000)):
                poll.unregister(fd)
                try:
                    _finish(attempts[fd])
                except OSError as error:
                    attempts.pop(fd).close()
                    failure, next_at = error, now
                else:
                    return attempts.pop(fd)
        raise failure
    finally:
        for attempt in attempts.values():
            attempt.close()


def _lookup(host: str, port: int, flags: int = 0) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError:  # a name that IDNA cannot encode does not exist
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    by_family: dict[int, list[Address]] = {}
    for family, *_, address in found:
        by_family.setdefault(family, []).append((family, address))
    turns = zip_longest(*by_family.values())
    return [address for turn in turns for address in turn if address is not None]


def _start(family: int, address: Any) -> socket.socket:
    """Start to connect without blocking."""
    attempt = socket.socket(family, socket.SOCK_STREAM)
    try:
        attempt.setblocking(False)
        for option in _OPTIONS:
            attempt.setsockopt(*option)
        with contextlib.suppress(BlockingIOError):
            attempt.connect(address)
    except BaseException:
        attempt.close()
        raise
    return attempt


def _finish(attempt: socket.socket) -> None:
    """Make a connected socket blocking.

    Raises:
        OSError: the socket failed to connect.
    """
    number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
    attempt.setblocking(True)
