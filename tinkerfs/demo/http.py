"""HTTP/1.1 server: reads requests, gets responses from an `Application`, and writes them.

Each connection has its own thread and may be kept alive.
"""

import contextlib
import itertools
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from tinkerfs.demo.content import Content, Data, iter_chunks
from tinkerfs.demo.request import Request

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 20
_NOTHING = Data(b"")
_request_numbers = itertools.count(1)
#: Longest time until a waiting thread notices that its client has disconnected.
_POLL_S = 0.1


@dataclass(slots=True)
class Reply:
    """An HTTP response; its body is the range `[start, stop)` of a content."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: Content = _NOTHING
    start: int = 0
    stop: int | None = None

    @property
    def length(self) -> int:
        """Length of the body in bytes."""
        return (self.content.size_bytes if self.stop is None else self.stop) - self.start


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return a response with a JSON body."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Reply(status, {"Content-Type": "application/json", **(headers or {})}, Data(body))


def error_reply(status: int, detail: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Return an API error; without a detail, the error of the API's framework."""
    return json_reply({"detail": detail or phrase(status)}, status, headers)


def phrase(status: int) -> str:
    """Return the reason phrase of a status."""
    return next((known.phrase for known in HTTPStatus if known == status), "Unknown")


class Application(Protocol):
    """The application behind one origin, as seen by the HTTP server."""

    name: str

    def endpoint(self, method: str, path: str) -> str:
        """Return the endpoint of a request, `?` if the path is unknown."""

    def respond(self, request: Request) -> Reply:
        """Return the response to a request; called by many threads concurrently."""


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"
    #: The class of its requests.
    request_class: type[Request] = Request

    def handle(self) -> None:
        """Serve requests until the connection ends."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because standard error belongs to the command."""

    def _serve(self) -> None:
        listener = self.server
        target = urlsplit(self.path)
        path = unquote(target.path, errors="surrogateescape")
        headers = {name.lower(): value for name, value in self.headers.items()}
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        request = self.request_class(
            origin=listener.origin.name,
            method=self.command,
            path=path,
            query=dict(parse_qsl(target.query, keep_blank_values=True)),
            endpoint=listener.origin.endpoint(self.command, path),
            headers=headers,
            api_key=headers.get("x-api-key") or bearer or None,
            body=self._read_body(headers.get("content-length", "0")),
        )
        self.exchange(request)

    def _read_body(self, length: str) -> bytes:
        is_chunked = "transfer-encoding" in self.headers
        if not is_chunked and length.isdecimal() and int(length) <= _MAX_BODY_BYTES:
            return self.rfile.read(int(length))
        self.close_connection = True  # the start of the next request is unknown
        return b""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def exchange(self, request: Request) -> None:
        """Respond to a request; the latency includes the processing time."""
        due_s = time.monotonic() + self.server.latency_s()
        reply = self.server.origin.respond(request)
        if pause(due_s - time.monotonic(), self.is_over):
            self.send_reply(request, reply)
        else:
            self.abort()

    def send_reply(self, request: Request, reply: Reply) -> None:
        """Send a response."""
        lines = [f"HTTP/1.1 {reply.status} {phrase(reply.status)}"]
        lines += [f"{name}: {value}" for name, value in self.headers_of(reply).items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        if request.method == "HEAD" or not reply.length:
            self.wfile.write(head)
        else:
            self.send_body(request, reply, head)

    def headers_of(self, reply: Reply) -> dict[str, str]:
        """Return the headers of a response."""
        headers = {
            "Date": formatdate(usegmt=True),
            "Server": "tinkerfs-demo",
            "Content-Length": str(reply.length),
            "X-Request-Id": f"{next(_request_numbers):x}",
            **reply.headers,
        }
        if reply.status == HTTPStatus.NO_CONTENT:
            del headers["Content-Length"]
        return headers

    def send_body(self, request: Request, reply: Reply, head: bytes) -> None:  # noqa: ARG002
        """Send the head in one packet with the first chunk, then the rest."""
        for chunk in iter_chunks(reply.content, reply.start, reply.start + reply.length):
            self.wfile.write(head + chunk)
            head = b""

    def abort(self) -> None:
        """Close the connection after this request."""
        self.close_connection = True

    def is_over(self) -> bool:
        """Return whether the server is closing or the client has closed its end."""
        if self.server.is_closing():
            return True
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True


class Listener(ThreadingHTTPServer):
    """A listening socket with its connections.

    Args:
        address: Host and port; port 0 for a free one.
        origin: The app that responds.
        latency_s: Returns the minimum time from a request to its response. The effect of the
            request is not delayed.
        is_closing: Returns whether waiting requests should be aborted.
    """

    #: The class that serves a connection.
    handler_class: type[Handler] = Handler

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    # Allow to bind the port again while old connections are in TIME_WAIT.
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        origin: Application,
        latency_s: Callable[[], float],
        is_closing: Callable[[], bool],
    ) -> None:
        self.origin, self.latency_s = origin, latency_s
        self._is_server_closing = is_closing
        self._is_stopped = False
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()  # guarded by _lock
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, self.handler_class)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.02,), name=f"demo-{origin.name}", daemon=True
        )
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without the DNS lookup of the base class, which may take seconds."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.server_address = (self.server_name, self.server_port)

    def is_closing(self) -> bool:
        """Return whether waiting requests should be aborted."""
        return self._is_stopped or self._is_server_closing()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection."""
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an internal error; disconnected clients are handled elsewhere."""
        _log.exception("%s request failed", self.origin.name)

    def drop_connections(self) -> None:
        """Close all connections, idle or not."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Stop listening and close all connections, without waiting for them."""
        self._is_stopped = True
        self.shutdown()
        self.server_close()
        self.drop_connections()


def pause(seconds: float, is_over: Callable[[], bool]) -> bool:
    """Sleep; return False if `is_over` returned True before the end."""
    end = time.monotonic() + seconds
    while (remaining_s := end - time.monotonic()) > 0:
        if is_over():
            return False
        time.sleep(min(remaining_s, _POLL_S))
    return True
