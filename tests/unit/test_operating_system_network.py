"""Tests of what the operating system reports of connections."""

import select
import socket

import pytest

from tinkerfs.operating_system import has_disconnected


@pytest.fixture(params=["POLLRDHUP", "other systems"])
def pair(request, monkeypatch):
    """A connection, on a system with the feature of Linux or without it."""
    if request.param != "POLLRDHUP":
        monkeypatch.delattr(select, "POLLRDHUP")
    own, peer = socket.socketpair()
    own.settimeout(60)  # a check must not wait that long
    with own, peer:
        yield own, peer


def test_has_disconnected_is_false_while_the_peer_is_there(pair):
    own, peer = pair
    assert not has_disconnected(own)
    peer.sendall(b"GET")
    assert not has_disconnected(own)
    assert own.recv(3) == b"GET"


def test_has_disconnected_is_true_after_the_peer_left(pair):
    own, peer = pair
    peer.close()
    assert has_disconnected(own)


def test_has_disconnected_is_true_for_a_closed_socket(pair):
    own, _peer = pair
    own.close()
    assert has_disconnected(own)
