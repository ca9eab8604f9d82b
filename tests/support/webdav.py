"""A WebDAV server in this process, and a client that sends requests as they are."""

import errno
import http.client
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from tinkerfs import errors
from tinkerfs.webdav.server import Address, serving

_TYPES = '<D:propfind xmlns:D="DAV:"><D:prop><D:resourcetype/></D:prop></D:propfind>'


@contextmanager
def served(filesystem, **options):
    """Serve a file system on a free port of the loopback interface; yield the server."""
    options = {"timeout_s": 30.0, "is_read_only": False} | options
    with serving(filesystem, Address("127.0.0.1", 0), **options) as server:
        yield server


@dataclass(frozen=True)
class Properties:
    """The properties of a resource that were found; None for the others."""

    is_directory: bool
    size: int | None
    mtime_s: int | None
    etag: str | None
    content_type: str | None


@dataclass(frozen=True)
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self):
        return self.body.decode()


class DavClient:
    """Sends requests over a connection per thread; a failure is an `OSError`."""

    def __init__(self, url, *, agent="tests", headers=(), context=None):
        self.url = url
        self._context = context
        self._headers = {"User-Agent": agent, **dict(headers)}
        self._local = threading.local()
        self._connections = []

    def _connection(self):
        """Return the connection of this thread."""
        if not hasattr(self._local, "connection"):
            parts, options = urlsplit(self.url), {"timeout": 60}
            make = http.client.HTTPConnection
            if parts.scheme == "https":
                make, options["context"] = http.client.HTTPSConnection, self._context
            self._local.connection = make(parts.hostname, parts.port, **options)
            self._connections.append(self._local.connection)
        return self._local.connection

    def close(self):
        for connection in self._connections:
            connection.close()

    def request(self, method, target, body=None, **headers):
        """Send a request to a target that is sent as it is; header names have `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = self._connection()
        connection.request(method, target, body, self._headers | named)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())

    def send(self, method, path, body=None, **headers):
        """Send a request for a path, and return the response.

        Raises:
            OSError: the errno that the body of a failure starts with; EROFS if the method is not
                offered because the server is read-only.
        """
        response = self.request(method, _target(path), body, **headers)
        if response.status < 400:
            return response
        name = "ENOENT" if response.status == 404 else response.text.partition(":")[0]
        if response.status == 405 and not hasattr(errno, name):
            allowed = set(self.request("OPTIONS", "/").headers["Allow"].split(", "))
            assert not allowed & {"PUT", "DELETE"}, response
            name = "EROFS"
        number = getattr(errno, name, None)
        assert number is not None, (method, path, response)
        raise OSError(number, response.text.strip(), path)

    def get(self, path, **headers):
        """Return the content of a file; its length must be announced."""
        response = self.send("GET", path, **headers)
        if response.headers.get_content_type() == "text/html":
            raise errors.is_a_directory(path)
        assert response.headers["Content-Length"] == str(len(response.body))
        return response.body

    def properties(self, path):
        """Return the properties of a path."""
        [(_name, properties)] = self._propfind(path, "0")
        return properties

    def listing(self, path):
        """Return the properties of each member of a directory by name, in order."""
        return dict(self._propfind(path, "1")[1:])

    def listdir(self, path):
        """Return the names in a directory, without their properties."""
        (_own, found), *members = self._propfind(path, "1", _TYPES)
        if not found.is_directory:
            raise errors.not_a_directory(path)
        return [name for name, _properties in members]

    def _propfind(self, path, depth, body=None):
        response = self.send("PROPFIND", path, body, Depth=depth)
        assert response.status == 207
        root = ElementTree.fromstring(response.body)
        return [_parse(element) for element in root]


def _target(path):
    return quote(path or "/", errors="surrogateescape")


def _parse(element):
    href = unquote(element.findtext("{DAV:}href"), errors="surrogateescape")
    [found] = [
        each.find("{DAV:}prop")
        for each in element.iter("{DAV:}propstat")
        if "200" in each.findtext("{DAV:}status")
    ]
    size, time = found.findtext("{DAV:}getcontentlength"), found.findtext("{DAV:}getlastmodified")
    is_directory = found.find("{DAV:}resourcetype/{DAV:}collection") is not None
    assert href.endswith("/") == is_directory
    return href.rstrip("/").rpartition("/")[2], Properties(
        is_directory,
        None if size is None else int(size),
        None if time is None else int(parsedate_to_datetime(time).timestamp()),
        found.findtext("{DAV:}getetag"),
        found.findtext("{DAV:}getcontenttype"),
    )
