"""A proxy server for HTTP with CONNECT and for SOCKS 5, on one local port.

It resolves every name to this machine. So a local server can have a name that is not local, because
requests to this machine itself never use a proxy.
"""

import base64
import contextlib
import re
import socket
import struct
import threading


class ProxyServer:
    """A running proxy; a context manager.

    Args:
        login: the required "user:password"; None for no login.
        tls: server-side TLS context; None for a proxy without TLS.

    Attributes:
        targets: the requested targets, (protocol, "host:port"), in order.
    """

    def __init__(self, login=None, tls=None):
        self.login = login
        self.tls = tls
        self.targets = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open = [self._listening]

    @property
    def address(self):
        """The address of the proxy, "host:port"."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc):
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError, EOFError):
            if self.tls is not None:
                client = self.tls.wrap_socket(client, server_side=True)
                self._open.append(client)
            first = _exactly(client, 1)
            onward = self._socks(client) if first == b"\x05" else self._http(client, first)
            if onward is not None:
                self._open.append(onward)
                threading.Thread(target=_pump, args=(onward, client), daemon=True).start()
                _pump(client, onward)
        client.close()

    def _http(self, client, head):
        while b"\r\n\r\n" not in head:
            head += client.recv(65536) or _ended()
        head, _, body = head.partition(b"\r\n\r\n")
        line, *headers = head.decode().split("\r\n")
        method, target, _ = line.split(" ")
        if self.login is not None:
            word = base64.b64encode(self.login.encode()).decode()
            wanted = ["proxy-authorization", f"Basic {word}"]
            if wanted not in [[n.lower(), v] for n, v in (h.split(": ", 1) for h in headers)]:
                client.sendall(b"HTTP/1.1 407 Login\r\nContent-Length: 0\r\n\r\n")
                return None
        if method == "CONNECT":
            self.targets.append(("CONNECT", target))
            onward = _connect(target)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            return onward
        host, path = re.fullmatch(r"http://([^/]*)(/.*)", target).groups()
        self.targets.append(("http", host))
        onward = _connect(host)
        # One request per connection, because later requests would not be rewritten.
        kept = [each for each in headers if not each.lower().startswith(("proxy-", "connection"))]
        lines = [f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]
        onward.sendall("\r\n".join(lines).encode() + body)
        return onward

    def _socks(self, client):
        methods = _exactly(client, _exactly(client, 1)[0])
        if self.login is not None:
            assert 2 in methods
            client.sendall(b"\x05\x02")
            _exactly(client, 1)
            words = [_exactly(client, _exactly(client, 1)[0]).decode() for _ in range(2)]
            is_right = ":".join(words) == self.login
            client.sendall(b"\x01\x00" if is_right else b"\x01\x01")
            if not is_right:
                return None
        else:
            client.sendall(b"\x05\x00")
        _, _, _, kind = _exactly(client, 4)
        if kind == 3:
            host = _exactly(client, _exactly(client, 1)[0]).decode()
        else:
            family, length = (socket.AF_INET, 4) if kind == 1 else (socket.AF_INET6, 16)
            host = socket.inet_ntop(family, _exactly(client, length))
        (port,) = struct.unpack(">H", _exactly(client, 2))
        self.targets.append(("SOCKS", f"{host}:{port}"))
        onward = _connect(f":{port}")
        client.sendall(b"\x05\x00\x00\x01" + bytes(6))
        return onward


def _connect(target):
    return socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2])))


def _ended():
    raise EOFError


def _exactly(sock, length):
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data)) or _ended()
    return data


def _pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
