"""What is read from a connection at a time, of httpx itself."""

import socket
import threading

import httpx
import pytest

from tinkerfs.weights.stream import read_more_at_once

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BODY = bytes(100 << 10)  # more than httpcore reads by itself, less than a socket holds


@pytest.fixture
def served():
    """A server of one connection, which answers with a head and, when that was taken, a body."""
    taken = threading.Semaphore(0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                while connection.recv(65536):
                    connection.sendall(HEAD % len(BODY))
                    assert taken.acquire(timeout=10)
                    connection.sendall(BODY)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/", taken
        thread.join(10)


def test_what_has_come_is_read_at_once_in_each_answer_of_a_connection(served):
    url, taken = served
    streams = set()
    with httpx.Client(trust_env=False) as client:
        for _ in range(3):
            with client.stream("GET", url) as response:
                stream = response.extensions["network_stream"]
                streams.add(stream)
                read_more_at_once(stream)
                taken.release()
                flags = socket.MSG_PEEK | socket.MSG_WAITALL  # until all of it is there
                stream.get_extra_info("socket").setblocking(True)
                stream.get_extra_info("socket").recv(len(BODY), flags)
                assert list(response.iter_raw()) == [BODY]
    assert len(streams) == 1


def test_an_answer_that_does_not_tell_its_connection_is_left_alone():
    read_more_at_once(None)
