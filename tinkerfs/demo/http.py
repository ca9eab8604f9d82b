"""HTTP/1.1 server with a request log and fault injection.

This module reads requests, logs them, gets responses from an `App`, applies the fault plan, and
writes the responses. Each connection has its own thread and may be kept alive.
"""

import contextlib
import itertools
import json
import logging
import select
import socket
import struct
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
from tinkerfs.demo.faults import FaultPlan, FaultRule, pause
from tinkerfs.demo.request_log import RequestLog, RequestRecord

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 20
_NO_FAULT = FaultRule("*")
_NOTHING = Data(b"")
_PROXY_PAGE = "<html>\n<head><title>502 Bad Gateway</title></head>\n<body>nginx</body>\n</html>\n"


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
    return json_reply({"detail": detail or _phrase(status)}, status, headers)


def _phrase(status: int) -> str:
    return next((known.phrase for known in HTTPStatus if known == status), "Unknown")


class App(Protocol):
    """The application behind one origin, as seen by the HTTP server."""

    name: str

    def endpoint(self, method: str, path: str) -> str:
        """Return the endpoint of a request, `?` if the path is unknown."""

    def respond(self, record: RequestRecord) -> Reply:
        """Return the response to a request; called by many threads concurrently."""


class Handler(BaseHTTPRequestHandler):
    """Serves the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def handle(self) -> None:
        """Serve requests until the connection ends."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because requests are in the request log."""

    def _serve(self) -> None:
        listener = self.server
        target = urlsplit(self.path)
        path = unquote(target.path, errors="surrogateescape")
        headers = {name.lower(): value for name, value in self.headers.items()}
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        record = RequestRecord(
            origin=listener.origin.name,
            method=self.command,
            path=path,
            query=dict(parse_qsl(target.query, keep_blank_values=True)),
            endpoint=listener.origin.endpoint(self.command, path),
            headers=headers,
            api_key=headers.get("x-api-key") or bearer or None,
            body=self._read_body(headers.get("content-length", "0")),
        )
        listener.journal.begin(record)
        try:
            self.exchange(record, listener.faults.take(record) or _NO_FAULT)
        finally:
            listener.journal.end(record)

    def _read_body(self, length: str) -> bytes:
        is_chunked = "transfer-encoding" in self.headers
        if not is_chunked and length.isdecimal() and int(length) <= _MAX_BODY_BYTES:
            return self.rfile.read(int(length))
        self.close_connection = True  # the start of the next request is unknown
        return b""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def exchange(self, record: RequestRecord, rule: FaultRule) -> None:
        """Send the response to a logged request, with the fault of a rule."""
        if not pause(rule.latency_s, self.is_over):
            return self.abort()
        due_s = time.monotonic() + self.server.latency_s()
        if rule.call is not None:
            rule.call()
        if (rule.hang or rule.hold_until is not None) and not rule.hold(self.is_over):
            return self.abort()
        if rule.refuse or rule.reset:
            pause(due_s - time.monotonic(), self.is_over)
            return self.abort(reset=rule.reset)
        record.is_range_hidden = rule.ignore_range
        reply = (
            _own_response(rule) if rule.replaces_response else self.server.origin.respond(record)
        )
        _corrupt_response(reply, rule)
        # The latency includes the processing time, on which benchmarks rely.
        if not pause(due_s - time.monotonic(), self.is_over):
            return self.abort()
        record.status = reply.status
        return self._send(record, reply, rule)

    def _send(self, record: RequestRecord, reply: Reply, rule: FaultRule) -> None:
        headers = {
            "Date": formatdate(usegmt=True),
            "Server": "tinkerfs-demo",
            "Content-Length": str(reply.length),
            **reply.headers,
        }
        if reply.status == HTTPStatus.NO_CONTENT:
            del headers["Content-Length"]
        lowered = {name.lower(): name for name in headers}
        for name, value in rule.headers.items():
            headers.pop(lowered.get(name.lower(), name), None)
            if value is not None:
                headers[name] = value
        lines = [f"HTTP/1.1 {reply.status} {_phrase(reply.status)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        if record.method == "HEAD" or not reply.length:
            self.wfile.write(head)
            return
        self._send_body(record, reply, rule, head)

    def _send_body(self, record: RequestRecord, reply: Reply, rule: FaultRule, head: bytes) -> None:
        """Send the head in one packet with the first chunk, then the rest."""
        stop = reply.start + reply.length
        if 0 in (rule.cut_after_bytes, rule.stall_after_bytes):
            self.wfile.write(head)
            head = b""
            if rule.cut_after_bytes == 0 or not rule.hold(self.is_over):
                return self.abort()
        for chunk in iter_chunks(reply.content, reply.start, stop):
            for part in _split_chunk(chunk, record.sent_bytes, rule):
                if rule.bytes_per_s and not pause(len(part) / rule.bytes_per_s, self.is_over):
                    return self.abort()
                self.wfile.write(head + part)
                record.sent_bytes += len(part)
                head = b""
                if record.sent_bytes == rule.cut_after_bytes:
                    return self.abort()
                if record.sent_bytes == rule.stall_after_bytes and not rule.hold(self.is_over):
                    return self.abort()
        return None

    def abort(self, *, reset: bool = False) -> None:
        """Close the connection after this request, with an RST if `reset`."""
        self.close_connection = True
        if reset:
            # With SO_LINGER of 0, close(2) sends RST, unless the listener has sent FIN before.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.server.detach(self.connection)

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
        journal: The log of requests.
        faults: The fault plan.
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
        origin: App,
        journal: RequestLog,
        faults: FaultPlan,
        latency_s: Callable[[], float],
        is_closing: Callable[[], bool],
    ) -> None:
        self.origin, self.journal, self.faults = origin, journal, faults
        self.latency_s = latency_s
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
        """Close a connection, without a shutdown if it was detached."""
        with self._lock:
            is_attached = request in self._connections
            self._connections.discard(request)
        if is_attached:
            super().shutdown_request(request)
        else:
            self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log an internal error; disconnected clients are handled elsewhere."""
        _log.exception("%s request failed", self.origin.name)

    def detach(self, request: socket.socket) -> None:
        """Exempt a connection from the shutdown that sends FIN."""
        with self._lock:
            self._connections.discard(request)

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


def _own_response(rule: FaultRule) -> Reply:
    """Return the response that a rule supplies in place of the app."""
    if rule.redirect_to is not None:
        return Reply(rule.status or HTTPStatus.FOUND, {"Location": rule.redirect_to})
    if rule.html:
        content = Data(_PROXY_PAGE.encode())
        return Reply(rule.status or HTTPStatus.BAD_GATEWAY, {"Content-Type": "text/html"}, content)
    status, body = rule.status or HTTPStatus.OK, rule.body
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        return Reply(status)
    if isinstance(body, bytes):
        return Reply(status, {}, Data(body))
    if isinstance(body, str):
        return Reply(status, {"Content-Type": "text/plain; charset=utf-8"}, Data(body.encode()))
    return error_reply(status) if body is None else json_reply(body, status)


def _corrupt_response(reply: Reply, rule: FaultRule) -> None:
    """Apply the changes of a rule to a response of the app."""
    edits: list[Callable[[Any], Any]] = []
    if rule.page_max is not None:
        edits.append(lambda value: _with_page(value, rule.page_max or 0))
    if rule.total_count is not None or rule.cursor is not None:
        edits.append(lambda value: _with_cursor(value, rule))
    if rule.edit is not None:
        edits.append(rule.edit)
    if edits and reply.status < HTTPStatus.BAD_REQUEST:
        value = json.loads(reply.content.read(0, reply.content.size_bytes))
        for edit in edits:
            value = edit(value)
        reply.content = Data(json.dumps(value).encode())
    if rule.half_json:
        reply.content = Data(reply.content.read(0, reply.content.size_bytes // 2))


def _with_page(value: Any, page_max: int) -> Any:
    return {k: v[:page_max] if isinstance(v, list) else v for k, v in value.items()}


def _with_cursor(value: Any, rule: FaultRule) -> Any:
    cursor = value.get("cursor")
    if rule.cursor == "missing":
        value.pop("cursor", None)
    elif rule.cursor == "null":
        value["cursor"] = None
    elif cursor:
        total = rule.total_count
        cursor["total_count"] = total(cursor["total_count"]) if callable(total) else total
    return value


def _split_chunk(chunk: bytes, offset: int, rule: FaultRule) -> list[bytes]:
    """Split the chunk at `offset` of a body where a rule takes effect."""
    if rule.flip_byte is not None and offset <= rule.flip_byte < offset + len(chunk):
        index = rule.flip_byte - offset
        chunk = chunk[:index] + bytes([chunk[index] ^ 0xFF]) + chunk[index + 1 :]
    marks = {0, len(chunk)}
    for mark in (rule.cut_after_bytes, rule.stall_after_bytes):
        if mark is not None and offset < mark < offset + len(chunk):
            marks.add(mark - offset)
    if rule.bytes_per_s is not None:
        step = max(1, int(rule.bytes_per_s / 20))
        marks.update(range(0, len(chunk), step))
    ordered = sorted(marks)
    return [chunk[begin:end] for begin, end in itertools.pairwise(ordered)]
