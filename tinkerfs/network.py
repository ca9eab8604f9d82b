"""TCP connections with one deadline for name resolution and every address of a host.

For the API and the object store alike. Addresses are tried as RFC 8305 ("Happy Eyeballs") says, so
that a host whose IPv6 leads nowhere costs a quarter of a second and not the whole time-out.
Thread-safe; keeps no state.
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

#: Start the next attempt after this time even if none has failed, seconds (RFC 8305, section 5).
ATTEMPT_DELAY_S = 0.25

#: Family and socket address, as `socket.getaddrinfo` returns them.
Address: TypeAlias = tuple[int, Any]

#: Set on every connection. A peer that is gone without a word is noticed after 15 + 3 x 5 s: a
#: response may be awaited for minutes, and the kernel's own default is 2 hours (tcp(7)).
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a blocking socket that is connected to a host.

    Args:
        host: a name or an IP address, without brackets.
        port: of TCP.
        deadline: when to give up, on `time.monotonic`.

    Raises:
        TimeoutError: no connection by the deadline.
        OSError: the name is unknown, or every address failed: the error of the last one.
    """
    return connect_any(resolve(host, port, deadline), deadline)


def resolve(host: str, port: int, deadline: float) -> list[Address]:
    """Return the addresses of a host, families alternating, in the resolver's order otherwise.

    Raises:
        TimeoutError: no addresses by the deadline; the lookup goes on without effect.
        OSError: the name is unknown, or cannot be looked up now.
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

    # getaddrinfo(3) has no time-out of its own, and takes 20 s where no resolver responds.
    threading.Thread(target=run, name=f"resolve {host}", daemon=True).start()
    try:
        return future.result(max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
        raise TimeoutError("timed out while the host name was looked up") from None


def connect_any(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """Return a blocking socket that is connected to the first of some addresses that accepts.

    Args:
        addresses: one or more; an attempt is made every `ATTEMPT_DELAY_S`, and as soon as the one
            before has failed.
        deadline: when to give up, on `time.monotonic`.

    Raises:
        TimeoutError: no connection by the deadline.
        OSError: every address failed: the error of the last one.
    """
    waiting = deque(addresses)
    attempts: dict[int, socket.socket] = {}
    poll = select.poll()
    next_at = time.monotonic()
    failure = OSError("the host has no address")
    try:
        while waiting or attempts:
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError("timed out")
            if waiting and (not attempts or now >= next_at):
                next_at = now + ATTEMPT_DELAY_S
                try:
                    attempt = _start(*waiting.popleft())
                except OSError as error:  # no route, or no such family here
                    failure, next_at = error, now
                    continue
                attempts[attempt.fileno()] = attempt
                poll.register(attempt, select.POLLOUT)
            until = min(deadline, next_at) if waiting else deadline
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
    except UnicodeError:  # IDNA cannot encode it, so it is as unknown as any other
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    by_family: dict[int, list[Address]] = {}
    for family, *_, address in found:
        by_family.setdefault(family, []).append((family, address))
    turns = zip_longest(*by_family.values())
    return [address for turn in turns for address in turn if address is not None]


def _start(family: int, address: Any) -> socket.socket:
    """Begin to connect, without waiting."""
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
    """Make a socket blocking that has connected.

    Raises:
        OSError: it has not: why.
    """
    number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
    attempt.setblocking(True)
