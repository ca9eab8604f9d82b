"""WsgiDAV provider of the tree. It translates and decides nothing, like the other adapters."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from wsgidav.dav_error import DAVError, PRECONDITION_CODE_PropfindFiniteDepth
from wsgidav.dav_provider import DAVProvider

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.operating_system import has_disconnected
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.followed_links import FollowedLinks
from tinkerfs.webdav.clients import WebDavClient
from tinkerfs.webdav.pages import Pages, has_page
from tinkerfs.webdav.resources import DirectoryResource, FileResource
from tinkerfs.webdav.status import as_responses

Environ = dict[str, Any]
Handler = Callable[..., Iterable[bytes]]

#: Key in the WSGI environment: the socket of the connection, if the server provides it.
CONNECTION: Final = "tinkerfs.connection"
_RESOURCES: Final = "tinkerfs.resources"
#: Duration of every lock: a client that needs it longer refreshes it.
_LOCK_TIMEOUT: Final = "Second-600"


class TreeProvider(DAVProvider):  # type: ignore[misc]
    """Resources of a file system. Thread-safe.

    Args:
        timeout_s: deadline of every wait, except for opening a file.
        is_read_only: whether only methods that read are offered.
        stopping: set when the server is going down; waiting requests then end.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        timeout_s: float,
        is_read_only: bool,
        stopping: threading.Event,
    ) -> None:
        super().__init__()
        self.verbose = 0  # otherwise failures are printed
        self._links = FollowedLinks(filesystem)
        self._timeout_s = timeout_s
        self._is_read_only = is_read_only
        self._stopping = stopping
        self._pages = Pages(self._links, is_read_only=is_read_only)

    def is_readonly(self) -> bool:
        """Return whether only methods that read are offered."""
        return self._is_read_only

    def get_resource_inst(
        self, path: str | None, environ: Environ
    ) -> DirectoryResource | FileResource | None:
        """Return the resource at a path, or None; also for None, the parent of the root."""
        if path is None:
            return None
        path = "/" + path.strip("/")
        resources = environ.setdefault(_RESOURCES, {})
        if path in resources:
            return resources[path]  # type: ignore[no-any-return]
        ctx = self._context(environ)
        with as_responses(path):
            try:
                node = self._links.find(path, ctx)
            except OSError as error:
                if errors.is_missing_or_below_file(error):
                    return None
                raise
        make = DirectoryResource if node.is_directory else FileResource
        resource = resources[path] = make(path, environ, self._links, node, ctx)
        return resource

    def custom_request_handler(
        self, environ: Environ, start_response: Callable[..., Any], default_handler: Handler
    ) -> Iterable[bytes]:
        """Serve a page for a directory, refuse unbounded listings, pass on everything else."""
        method = environ["REQUEST_METHOD"]
        try:
            if method == "PROPFIND" and environ.get("HTTP_DEPTH", "infinity") == "infinity":
                self._check_depth(environ)
            elif method == "LOCK":
                environ["HTTP_TIMEOUT"] = _LOCK_TIMEOUT
            if method in ("GET", "HEAD"):
                resource = self.get_resource_inst(environ["PATH_INFO"], environ)
                if resource is not None and has_page(resource, environ):
                    return self._send_page(resource, environ, start_response)
            return self._closing(environ, default_handler(environ, start_response))
        except BaseException:
            _close(environ)
            raise

    def _send_page(
        self,
        resource: DirectoryResource | FileResource,
        environ: Environ,
        start_response: Callable[..., Any],
    ) -> list[bytes]:
        page = None  # HEAD must not list `files/`, so its length stays unknown
        if environ["REQUEST_METHOD"] == "GET":
            with as_responses(resource.path):
                page = self._pages.render(resource, environ)
        start_response("200 OK", self._pages.headers(page))
        return [page or b""]

    @staticmethod
    def _closing(environ: Environ, body: Iterable[bytes]) -> Iterable[bytes]:
        """Yield a body, and close the files that its request opened."""
        try:
            yield from body
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
            _close(environ)

    def _check_depth(self, environ: Environ) -> None:
        # RFC 4918, section 9.1: a server may refuse to list a whole tree.
        resource = self.get_resource_inst(environ["PATH_INFO"], environ)
        if resource is not None and resource.is_collection:
            raise DAVError(403, err_condition=PRECONDITION_CODE_PropfindFiniteDepth)

    # Contexts of operations.

    def _context(self, environ: Environ) -> RequestContext:
        client = WebDavClient.from_environ(environ)
        connection = environ.get(CONNECTION)

        def is_cancelled() -> bool:
            return self._stopping.is_set() or (
                connection is not None and has_disconnected(connection)
            )

        return RequestContext(self._timeout_s, is_cancelled, lambda: client)


def _close(environ: Environ) -> None:
    for resource in environ.get(_RESOURCES, {}).values():
        if isinstance(resource, FileResource):
            resource.close()
