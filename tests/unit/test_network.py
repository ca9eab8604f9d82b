"""Connections: choice of the address, delay of a silent address, and the deadline."""

import socket
import time
from contextlib import ExitStack

import pytest

from tinkerfs import network


def deadline(seconds=10.0):
    return time.monotonic() + seconds


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listener(stack):
    """A listening socket that accepts."""
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


@pytest.fixture
def silent(stack):
    """The address of a listener with a full queue: it neither accepts nor refuses."""
    full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(8):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    return socket.AF_INET, full.getsockname()


@pytest.fixture
def refusing(stack):
    """An address without a listener."""
    bound = stack.enter_context(socket.socket())
    bound.bind(("127.0.0.1", 0))
    return socket.AF_INET, bound.getsockname()


def address(listener):
    return socket.AF_INET, listener.getsockname()


def test_connect_by_name_and_by_address_is_usable(listener):
    port = listener.getsockname()[1]
    for host in ("localhost", "127.0.0.1"):
        with network.connect(host, port, deadline()) as connection:
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"x")
                assert connection.recv(1) == b"x"
            assert connection.gettimeout() is None
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_connect_past_a_silent_address_is_quick(listener, silent):
    began = time.monotonic()
    with network.connect_any([silent, address(listener)], deadline()) as connection:
        assert connection.getpeername() == listener.getsockname()
    assert network.ATTEMPT_DELAY_S <= time.monotonic() - began < 5


def test_connect_past_a_refusing_address_has_no_delay(listener, refusing, monkeypatch):
    monkeypatch.setattr(network, "ATTEMPT_DELAY_S", 3600.0)
    addresses = [refusing, refusing, address(listener)]
    with network.connect_any(addresses, deadline()) as connection:
        assert connection.getpeername() == listener.getsockname()


def test_connect_past_an_unroutable_address_succeeds(listener):
    nowhere = (socket.AF_INET6, ("ff0e::1", 9, 0, 0))  # TCP to a multicast address
    with network.connect_any([nowhere, address(listener)], deadline()) as connection:
        assert connection.getpeername() == listener.getsockname()


def test_connect_without_success_raises_the_last_error(refusing):
    with pytest.raises(ConnectionRefusedError):
        network.connect_any([refusing, refusing], deadline())


def test_connect_ends_at_the_deadline(silent):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        network.connect_any([silent, silent, silent], deadline(0.3))
    assert time.monotonic() - began < 5


def test_connect_after_the_deadline_raises(listener):
    with pytest.raises(TimeoutError):
        network.connect_any([address(listener)], deadline(-1))


def test_connect_closes_every_other_attempt(listener, silent, monkeypatch):
    made = []
    start = network._start
    monkeypatch.setattr(network, "_start", lambda *of: made.append(start(*of)) or made[-1])
    with network.connect_any([silent, silent, address(listener)], deadline()):
        assert [attempt.fileno() >= 0 for attempt in made] == [False, False, True]


@pytest.mark.parametrize("name", ["nothing.invalid", "a..b", "x" * 70 + ".invalid", "é\udcff"])
def test_resolve_of_an_unknown_name_raises(name):
    with pytest.raises(OSError, match=r"name|host|service|address"):
        network.resolve(name, 80, deadline())


def test_resolve_that_hangs_ends_at_the_deadline(monkeypatch):
    release = network.threading.Event()
    lookup = network._lookup

    def slow(host, port, flags=0):
        if not flags:
            release.wait(10)
        return lookup(host, port, flags)

    monkeypatch.setattr(network, "_lookup", slow)
    try:
        with pytest.raises(TimeoutError):
            network.resolve("localhost", 80, deadline(0.05))
    finally:
        release.set()


def test_resolve_alternates_the_families(monkeypatch):
    four, six = socket.AF_INET, socket.AF_INET6
    found = [(six, 1, 6, "", (f"{n}",)) for n in "abc"] + [(four, 1, 6, "", ("d",))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
    order = [address[0] for _, address in network.resolve("h", 80, deadline())]
    assert order == ["a", "d", "b", "c"]
