"""A hostile HTTP server: sends arbitrary bytes over raw sockets.

`HostileServer` is a `FaultyServer`: it has the same arguments, account, journal, faults and signed
URLs. A mount, a `Client` and a `StoreClient` work on it as long as no script applies. API and
object store are two origins, `server.base_url` and `server.store_url`; signed URLs point to the
store.

    with HostileServer(runs=1) as server:
        server.on("GET training_runs", b"HTTP/1.1 200 OK\\r\\n", endless(b"X-A: 1\\r\\n"))
        server.on("store", genuine(lambda head, body: (head, body[:99], reset)), times=None)
        server.on("/any/path", response(200, b"abc", "Content-Length: 9"), close)
        server.on("GET archive", gate := wait(), genuine())
        ...
        gate.wait_for(1)   # until one request waits there
        gate.release()

A script is a sequence of steps. A request gets the first script with a matching route and with
turns left. Without one it gets the genuine response, modified by `server.faults` if one applies.
After the last step the connection serves its next request; end with `close` if it must not.

Steps:
- bytes: send them as they are. `response(...)` makes the bytes of a whole response.
- `drip(data, every_s, size)`: send `size` bytes, pause `every_s`, and repeat.
- `endless(data, every_s)`: send `data` again and again until the client closes.
- `wait()`: wait until `release()` of the returned step is called; `wait_for(n)` returns once n
  requests wait there.
- `genuine(edit)`: the response of API or store. `edit(head, body)` returns steps to run instead.
- `close`, `reset`: end the connection with FIN, or with RST.
- `hold`: send nothing more until the client closes.
- any function of the `HostileHandler`, for the rest.

Pauses call `server.pace(seconds, is_over)`, which a test may replace: it returns False once
`is_over()`. The default sleeps.

`server.received` has every request with its raw head; `server.journal` counts by endpoint.
"""

import re
import select
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from tests.support.faults import FaultRule
from tests.support.faulty_server import (
    FaultyHandler,
    FaultyListener,
    FaultyServer,
)
from tinkerfs.demo.http import pause


@dataclass(frozen=True)
class Received:
    """One request as it arrived.

    Attributes:
        origin: "api" or "store".
        connection: number of the connection, from 1, over both origins.
        head: request line and headers up to the empty line, raw.
        body: of the request.
    """

    origin: str
    connection: int
    head: bytes
    body: bytes

    @property
    def line(self):
        """The request line."""
        return self.head.split(b"\r\n")[0].decode("latin-1")

    def header(self, name):
        """Return the values of a header, in order, as raw bytes."""
        fields = [line.partition(b":") for line in self.head.split(b"\r\n")[1:]]
        return [value.strip() for key, _, value in fields if key.lower() == name.lower().encode()]


class HostileServer(FaultyServer):
    """A demo server with scripted responses. Thread-safe.

    Args:
        tls: server-side TLS context; both origins are https then.
        pace: pauses for `seconds`; returns False as soon as `is_over()`.
        **options: those of `FaultyServer`.

    Attributes:
        received: every request with its raw head, oldest first.
        connections: number of connections accepted so far, over both origins.
    """

    def __init__(self, *, tls=None, pace=pause, **options):
        super().__init__(**options)
        self.tls, self.pace = tls, pace
        self.scheme = "http" if tls is None else "https"
        self.listener_class = partial(HostileListener, self)
        self.received = []
        self.connections = 0
        self._lock_scripts = threading.Lock()
        self._scripts = []
        self._greetings = []
        self._dead_connections = 0

    @property
    def request_lines(self):
        return [request.line for request in self.received]

    def on(self, route, *steps, times=1, after=0, when=None):
        """Add a script.

        Args:
            route: an endpoint of the journal (`GET archive`), `api`, `store`, `*`, a path prefix
                that begins with a slash, or a pattern for `<method> <path>`.
            steps: what the response consists of.
            times, after, when: as of `FaultPlan.add`.

        Returns:
            the rule: `applied` counts, `remove()` ends it.
        """
        if isinstance(route, str) and route.startswith("/"):
            route = re.compile(rf"^\w+ {re.escape(route)}")
        rule = FaultRule(route, times=times, after=after, when=when)
        with self._lock_scripts:
            self._scripts.append((rule, steps))
        return rule

    def on_connect(self, *steps, times=1):
        """Run steps on each of the next connections before its first request is read.

        With TLS they run before the handshake, on the bare socket.
        """
        with self._lock_scripts:
            self._greetings += [steps] * times

    def kill_silently(self):
        """Stop responding on the open connections without closing them.

        A NAT or VPN that lost its state behaves like this. New connections are served.
        """
        self._dead_connections = self.connections

    def is_dead(self, connection):
        return connection <= self._dead_connections

    def next_connection(self):
        """Return the number of a new connection and the first steps on it."""
        with self._lock_scripts:
            self.connections += 1
            return self.connections, self._greetings.pop(0) if self._greetings else ()

    def script_of(self, entry):
        """Return the steps for a request, None for the genuine response."""
        with self._lock_scripts:
            scripts = list(self._scripts)
        return next((steps for rule, steps in scripts if rule.take(entry)), None)


class Ended(Exception):
    """The connection has ended, and so has the script."""


class _Tee:
    """A line reader that records the lines."""

    def __init__(self, reader):
        self._reader = reader
        self.data = b""

    def readline(self, *args):
        line = self._reader.readline(*args)
        self.data += line
        return line


class HostileHandler(FaultyHandler):
    """One connection; a step gets it as its argument.

    Attributes:
        entry: the journal's entry of the current request.
        number: of the connection.
    """

    def setup(self):
        self.number, greeting = self.server.owner.next_connection()
        self.bare = self.request
        try:
            self.run(greeting)
            if self.server.owner.tls is not None:
                # Of a copy: the listener ends the connection through the descriptor it knows.
                self.request = self.server.owner.tls.wrap_socket(self.bare.dup(), server_side=True)
        except (OSError, Ended):
            self.close_at_once = True
        super().setup()

    def handle(self):
        if getattr(self, "close_at_once", False):
            return
        with suppress(OSError, Ended):
            super().handle()

    def finish(self):
        with suppress(OSError):
            super().finish()
            if self.request is not self.bare:
                self.request.close()

    def parse_request(self):
        reader = self.rfile
        self.rfile = tee = _Tee(reader)
        try:
            return super().parse_request()
        finally:
            self.rfile = reader
            self.head = self.raw_requestline + tee.data

    def respond(self, entry):
        owner, self.entry = self.server.owner, entry
        owner.received.append(Received(entry.origin, self.number, self.head, entry.body))
        if owner.is_dead(self.number):
            hold(self)
        steps = owner.script_of(entry)
        if steps is None:
            super().respond(entry)
        else:
            self.run(steps)

    def run(self, steps):
        """Run steps in order.

        Raises:
            Ended: the connection is over.
        """
        for step in steps:
            if isinstance(step, bytes):
                self.send(step)
            elif isinstance(step, FaultRule):
                if not step.hold(self.is_over):
                    self.end()
            else:
                step(self)

    def send(self, data):
        try:
            self.request.sendall(data)
        except OSError:
            self.end()

    def pause(self, seconds):
        if not self.server.owner.pace(seconds, self.is_over):
            self.end()

    def end(self, *, is_reset=False):
        """End the connection, and the script."""
        self.connection = self.bare
        if is_reset:
            self.reset()
        else:
            self.abort()
        raise Ended

    def is_over(self):
        if self.server.is_closing():
            return True
        try:
            readable, _, _ = select.select([self.bare], [], [], 0)
            # The request is read already, so a TLS client can only send its close notification.
            return bool(readable) and (
                self.request is not self.bare or not self.bare.recv(1, socket.MSG_PEEK)
            )
        except (OSError, ValueError):
            return True


class HostileListener(FaultyListener):
    handler_class = HostileHandler


# --- steps ---------------------------------------------------------------------------------------


def response(status, body=b"", *headers, is_chunked=False):
    """Return the bytes of a response; a given header replaces the default one.

    Args:
        status: a number, or a whole status line.
        body: sent as it is.
        headers: lines such as "ETag: x".
        is_chunked: no Content-Length, the body in one chunk.
    """
    line = status if isinstance(status, str) else f"HTTP/1.1 {status} X"
    if is_chunked:
        headers = ("Transfer-Encoding: chunked", *headers)
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    names = {header.partition(":")[0].lower() for header in headers}
    if not names & {"content-length", "transfer-encoding"}:
        headers = (f"Content-Length: {len(body)}", *headers)
    return _head(line, headers) + body


def _head(line, headers):
    return "\r\n".join([line, *headers]).encode("latin-1") + b"\r\n\r\n"


def drip(data, every_s=0.02, size=1):
    """Send `size` bytes, pause, and repeat."""

    def step(handler):
        for start in range(0, len(data), size):
            handler.send(data[start : start + size])
            handler.pause(every_s)

    return step


def endless(data, every_s=0.0):
    """Send the same bytes again and again until the client closes the connection."""

    def step(handler):
        while not handler.is_over():
            handler.send(data)
            if every_s:
                handler.pause(every_s)
        handler.end()

    return step


def wait():
    """Wait until `release()` is called; see `FaultRule.wait_for`."""
    return FaultRule("*")


def genuine(edit=lambda head, body: (head + body,)):
    """Send the response of API or store, or the steps that `edit(head, body)` returns."""

    def step(handler):
        entry = handler.entry
        reply = handler.server.origin.respond(entry)
        entry.status = reply.status
        lines = [f"{name}: {value}" for name, value in reply.headers.items()]
        body = reply.content.read(reply.start, reply.start + reply.length)
        if reply.status != HTTPStatus.NO_CONTENT:
            lines.append(f"Content-Length: {len(body)}")
        entry.sent_bytes = len(body)
        handler.run(edit(_head(f"HTTP/1.1 {reply.status} X", lines), body))

    return step


def close(handler):
    """End the connection."""
    handler.end()


def reset(handler):
    """End the connection with an RST: what was sent and not yet read is lost."""
    handler.end(is_reset=True)


def hold(handler):
    """Send nothing more, until the client closes the connection or the server is closed."""
    wait().hold(handler.is_over)
    handler.end()


def tls_context(identity):
    """Return a server's TLS context for a PEM file with key and certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity)
    return context
