"""A demo server that logs its requests, and injects the faults of a plan into its responses.

with FaultyServer(runs=3) as server:
    httpx.get(f"{server.base_url}/api/v1/training_runs", headers={"X-API-Key": server.api_key})
    assert server.journal.count("GET training_runs") == 1
"""

import itertools
import json
import socket
import struct
import time
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from tests.support.faults import FaultPlan, FaultRule
from tests.support.request_log import RequestLog, RequestRecord
from tinkerfs.demo.content import Data, iter_chunks
from tinkerfs.demo.http import Handler, Listener, Reply, error_reply, json_reply, pause
from tinkerfs.demo.request import Request
from tinkerfs.demo.server import DemoServer

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_FAULT = FaultRule("*")
_PROXY_PAGE = "<html>\n<head><title>502 Bad Gateway</title></head>\n<body>nginx</body>\n</html>\n"


class FaultyServer(DemoServer):
    """A demo server with a log of its requests and a fault plan. Thread-safe.

    Args:
        faults: The fault plan; empty by default.
        **options: Those of `DemoServer`.

    Attributes:
        journal: The log of requests.
        faults: The fault plan.
    """

    def __init__(self, *args: Any, faults: FaultPlan | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.journal, self.faults = RequestLog(), faults or FaultPlan()
        self.listener_class = partial(FaultyListener, self)


class FaultyHandler(Handler):
    """Serves the requests of one connection, with faults."""

    server: "FaultyListener"
    request_class = RequestRecord
    rule = _NO_FAULT

    def exchange(self, request: Request) -> None:
        """Log a request, and respond to it with the fault of a rule."""
        record, owner = cast("RequestRecord", request), self.server.owner
        owner.journal.begin(record)
        try:
            self.rule = owner.faults.take(record) or _NO_FAULT
            self.respond(record)
        finally:
            owner.journal.end(record)

    def respond(self, record: RequestRecord) -> None:
        """Respond to a logged request."""
        rule = self.rule
        if not pause(rule.latency_s, self.is_over):
            return self.abort()
        due_s = time.monotonic() + self.server.latency_s()
        if rule.call is not None:
            rule.call()
        if (rule.hang or rule.hold_until is not None) and not rule.hold(self.is_over):
            return self.abort()
        if rule.refuse or rule.reset:
            pause(due_s - time.monotonic(), self.is_over)
            return self.reset() if rule.reset else self.abort()
        record.is_range_hidden = rule.ignore_range
        try:
            is_own = rule.replaces_response
            reply = _own_response(rule) if is_own else self.server.origin.respond(record)
        finally:
            record.is_range_hidden = False
        _corrupt_response(reply, rule)
        # The latency includes the processing time, on which benchmarks rely.
        if not pause(due_s - time.monotonic(), self.is_over):
            return self.abort()
        record.status = reply.status
        return self.send_reply(record, reply)

    def headers_of(self, reply: Reply) -> dict[str, str]:
        """Return the headers of a response, changed by the rule."""
        headers = super().headers_of(reply)
        names = {name.lower(): name for name in headers}
        for name, value in self.rule.headers.items():
            headers.pop(names.get(name.lower(), name), None)
            if value is not None:
                headers[name] = value
        return headers

    def send_body(self, request: Request, reply: Reply, head: bytes) -> None:
        """Send the head with the first part, then the rest, as far as the rule lets it."""
        record, rule = cast("RequestRecord", request), self.rule
        if 0 in (rule.cut_after_bytes, rule.stall_after_bytes):
            self.wfile.write(head)
            head = b""
            if rule.cut_after_bytes == 0 or not rule.hold(self.is_over):
                return self.abort()
        for chunk in iter_chunks(reply.content, reply.start, reply.start + reply.length):
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

    def reset(self) -> None:
        """Close the connection after this request with an RST."""
        self.abort()
        # With SO_LINGER of 0, close(2) sends RST, unless the listener has sent FIN before.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.detach(self.connection)


class FaultyListener(Listener):
    """A listening socket of a faulty server."""

    handler_class: type[Handler] = FaultyHandler

    def __init__(self, owner: FaultyServer, *args: Any, **options: Any) -> None:
        self.owner = owner
        super().__init__(*args, **options)

    def detach(self, request: socket.socket) -> None:
        """Exempt a connection from the shutdown that sends FIN."""
        with self._lock:
            self._connections.discard(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, without a shutdown if it was detached."""
        with self._lock:
            is_attached = request in self._connections
        if is_attached:
            super().shutdown_request(request)
        else:
            self.close_request(request)


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
