"""A server that answers with given bytes, one connection each, and keeps what it was sent.

For what no HTTP server library would send: answers that are no HTTP, or that end anywhere. For
everything else there is the demo server.
"""

import socket
import threading
from contextlib import contextmanager


class Scripted:
    """Answers the n-th connection with the n-th script, the last one over and over.

    Attributes:
        base_url: where it is.
        requests: head and body of each request, as they came.
    """

    def __init__(self, *scripts):
        self._scripts = scripts
        self.requests = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def request_lines(self):
        return [request.split(b"\r\n")[0].decode("ascii") for request in self.requests]

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                request = self._read(reader)
                if request:
                    script = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
                    self.requests.append(request)
                    connection.sendall(script)

    @staticmethod
    def _read(reader):
        head, length = b"", 0
        while line := reader.readline():
            head += line
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
            if line == b"\r\n":
                return head + reader.read(length)
        return b""

    def close(self):
        # Wakes accept(), which close() alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextmanager
def scripted(*scripts):
    server = Scripted(*scripts)
    try:
        yield server
    finally:
        server.close()


def http(status, body=b"", *headers):
    """Return an answer's bytes; the connection ends after it."""
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body
