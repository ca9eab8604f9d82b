"""An HTTP proxy that lets litmus use an existing directory as its own.

litmus stops unless it may create `/litmus/`. The proxy responds to that one request itself, and
forwards every other one for the directory.
"""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_OWN = "/litmus/"
_CONNECTION = frozenset({"connection", "content-length", "host", "transfer-encoding"})


@contextmanager
def proxied(url: str, directory: str) -> Iterator[str]:
    """Run the proxy for a directory of a server, and yield its URL."""
    address = urlsplit(url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if (self.command, self.path) == ("MKCOL", _OWN):
                self.send_response(201)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = {
                name: value.replace(_OWN, directory)
                for name, value in self.headers.items()
                if name.lower() not in _CONNECTION
            }
            # The proxy passes the name on, so that destinations are on the same host.
            headers["Host"] = self.headers["Host"]
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            connection.request(self.command, self.path.replace(_OWN, directory), body, headers)
            response = connection.getresponse()
            data = response.read().replace(directory.encode(), _OWN.encode())
            self.send_response_only(response.status, response.reason)
            for name, value in response.getheaders():
                if name.lower() not in _CONNECTION:
                    self.send_header(name, value)
            if response.status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # litmus does not read every body
                    self.wfile.write(data)
            connection.close()

        def log_message(self, *_args: object) -> None:
            pass

    for method in (
        *("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PROPFIND", "PROPPATCH"),
        *("MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK"),
    ):
        setattr(Handler, f"do_{method}", Handler.forward)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
