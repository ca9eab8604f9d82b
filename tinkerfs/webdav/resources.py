"""WebDAV resources of the tree: a collection or a file for each name.

A link is shown as what it leads to. Properties send no request that stat() would not send. The
length of a file that needs an archive is absent until the file was opened. An archive is requested
for the members of `files/`, but not for `files/` itself.
"""

import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any, Final

from msgspec.structs import replace
from wsgidav.dav_error import DAVError
from wsgidav.dav_provider import DAVCollection, DAVNonCollection

from tinkerfs.context import RequestContext
from tinkerfs.printable import escape_control_chars
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.followed_links import FollowedLinks, Name
from tinkerfs.vfs.node import Handle
from tinkerfs.webdav.paths import href
from tinkerfs.webdav.status import as_responses

#: Types by suffix that a browser may show; anything else is downloaded, because it may be HTML.
_TYPES: Final = {".json": "application/json", ".md": "text/plain; charset=utf-8"}
_TEXT: Final = "text/plain; charset=utf-8"
_BINARY: Final = "application/octet-stream"
#: Clients that take a file without a length for an empty one, and silently read nothing. They get
#: the upper bound that stat() returns: davfs2 reads up to the end, and rclone reports an error.
_NEED_LENGTH: Final = ("davfs2/", "rclone/")
#: The generated files without a suffix.
_TEXT_NAMES: Final = frozenset(
    {
        "archive_url",
        "changes",
        "errors",
        "expires_at",
        "export",
        "published",
        "refresh",
        "tinker_path",
    }
)


class _Resource:
    """What collections and files have in common.

    Attributes:
        node: the name in the tree.
        ctx: the context of the request.
    """

    # Set by the classes of WsgiDAV.
    path: str
    name: str
    is_collection: bool
    environ: dict[str, Any]

    def __init__(
        self,
        path: str,
        environ: dict[str, Any],
        links: FollowedLinks,
        node: Name,
        ctx: RequestContext,
    ) -> None:
        super().__init__(path, environ)  # type: ignore[call-arg]  # of the class of WsgiDAV
        self._links, self.node, self.ctx = links, node, ctx

    @property
    def _tree(self) -> FileSystem:
        return self._links.filesystem

    def get_display_name(self) -> str:
        """Return the name without characters that XML does not allow."""
        return escape_control_chars(self.name)

    def get_last_modified(self) -> float:
        """Return the modification time, seconds."""
        return self.node.mtime_ns / 1e9

    def get_href(self) -> str:
        """Return the path of the URL."""
        return href(self.path, is_directory=self.is_collection)

    def get_ref_url(self) -> str:
        """Return the key of locks."""
        return self.get_href()

    def prevent_locking(self) -> bool:
        """Refuse locks on everything but control files, which a client locks to write them."""
        with as_responses(self.path):
            return not self._links.is_writable(self.node, self.ctx)

    def handle_delete(self) -> bool:
        """Remove like `rm -r`: the tree decides, and the first error stops the removal."""
        with as_responses(self.path):
            self._remove(self.node.path)
        return True

    def _remove(self, path: str) -> None:
        if stat.S_ISDIR(self._tree.stat(path, self.ctx).mode):
            for entry in self._tree.listdir(path, self.ctx):
                self._remove(posixpath.join(path, entry.name))
            self._tree.rmdir(path, self.ctx)
        else:
            self._tree.unlink(path, self.ctx)

    def handle_copy(self, dest_path: str, *, depth_infinity: bool) -> bool:
        """Refuse like the tree: nothing can be created."""
        del depth_infinity
        return self.handle_move(dest_path)

    def handle_move(self, dest_path: str) -> bool:
        """Refuse like the tree: nothing can be renamed."""
        self._refuse_new(dest_path)
        return True

    def _refuse_new(self, path: str) -> None:
        with as_responses(path):
            self._tree.create(self._links.own_path(path.rstrip("/"), self.ctx), self.ctx)
        raise DAVError(403)


class DirectoryResource(_Resource, DAVCollection):  # type: ignore[misc]
    """A directory, or a link to one."""

    def members(self) -> Iterator["DirectoryResource | FileResource"]:
        """Yield the members; this resolves a link."""
        with as_responses(self.path):
            for name, node in self._links.children(self.node, self.ctx):
                path = posixpath.join(self.path, name)
                make = DirectoryResource if node.is_directory else FileResource
                yield make(path, self.environ, self._links, node, self.ctx)

    def get_member_list(self) -> list["DirectoryResource | FileResource"]:
        """Return the members."""
        return list(self.members())

    def get_member_names(self) -> list[str]:
        """Return the names of the members."""
        return [member.name for member in self.members()]

    def get_used_bytes(self) -> int | None:
        """Return the stored bytes of a checkpoint; of the root, the used bytes of the cache."""
        if self.path == "/":
            space = self._tree.statfs()
            return space.total_bytes - space.free_bytes
        return self.node.stored_bytes or None

    def get_available_bytes(self) -> int | None:
        """Return the free bytes of the cache, as df shows them for a mount."""
        return self._tree.statfs().free_bytes if self.path == "/" else None

    def create_collection(self, name: str) -> None:
        """Refuse like the tree."""
        self._refuse_new(posixpath.join(self.path, name))

    def create_empty_resource(self, name: str) -> None:
        """Refuse like the tree."""
        self._refuse_new(posixpath.join(self.path, name))


class FileResource(_Resource, DAVNonCollection):  # type: ignore[misc]
    """A file, or a link to one."""

    def __init__(
        self,
        path: str,
        environ: dict[str, Any],
        links: FollowedLinks,
        node: Name,
        ctx: RequestContext,
    ) -> None:
        super().__init__(path, environ, links, node, ctx)
        self._opened: Handle | None = None
        self._is_written = False

    def get_content_length(self) -> int | None:
        """Return the length, or None if unknown; GET opens the file, which determines it."""
        with as_responses(self.path):
            method = self.environ["REQUEST_METHOD"]
            if method == "GET":
                return self._open().size_bytes
            size_bytes = self._links.validator(self.node, self.ctx).size_bytes
            agent = self.environ.get("HTTP_USER_AGENT", "")
            if size_bytes is None and method == "PROPFIND" and agent.startswith(_NEED_LENGTH):
                target = self._links.target(self.node, self.ctx)
                return self._tree.stat(target, self.ctx).size_bytes
            return size_bytes

    def get_content_type(self) -> str:
        """Return the type by the name, never one that a browser executes."""
        if self.name in _TEXT_NAMES:
            return _TEXT
        return _TYPES.get(posixpath.splitext(self.name)[1], _BINARY)

    def get_etag(self) -> str | None:
        """Return the entity tag; None if only opening the file would determine it.

        The response to a write has none, because the content is not what the client sent.
        """
        if self._is_written:
            return None
        with as_responses(self.path):
            return self._links.validator(self.node, self.ctx).tag

    def get_property_value(self, name: str) -> Any:
        """Return a property; the entity tag is quoted, like in the header that clients compare."""
        value = super().get_property_value(name)
        return f'"{value}"' if name == "{DAV:}getetag" else value

    def support_etag(self) -> bool:
        """Return whether there is an entity tag now."""
        return self.get_etag() is not None

    def support_ranges(self) -> bool:
        """Return True."""
        return True

    def finalize_headers(self, _environ: dict[str, Any], headers: list[tuple[str, str]]) -> None:
        """Forbid caches to store a signed URL, and browsers to show what may be HTML."""
        stored = "no-store" if self.name == "archive_url" else "private, no-cache"
        headers.append(("Cache-Control", stored))
        if self.get_content_type() == _BINARY:
            headers.append(("Content-Disposition", "attachment"))

    def get_content(self) -> "_BodyReader":
        """Return a stream of the content."""
        with as_responses(self.path):
            reader = _BodyReader(self._open(), self.ctx)
        self._opened = None  # the stream closes it
        return reader

    def _open(self) -> Handle:
        if self._opened is None:
            target = self._links.target(self.node, self.ctx)
            # Opening waits for an archive, which has a deadline of its own.
            ctx = replace(self.ctx, timeout_s=None)
            self._opened = self._tree.open(target, os.O_RDONLY, ctx)
        return self._opened

    def close(self) -> None:
        """Close the file if it was opened but not read."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def begin_write(self, *, content_type: str | None = None) -> "_ValueWriter":
        """Open a control file for one whole value; other files fail here."""
        del content_type
        with as_responses(self.path):
            target = self._links.target(self.node, self.ctx)
            handle = self._tree.open(target, os.O_WRONLY | os.O_TRUNC, self.ctx)
        self._is_written = True
        return _ValueWriter(handle, self.path, self.ctx, self.environ.get("CONTENT_LENGTH", ""))


class _BodyReader:
    """A stream over an open file, for one response."""

    def __init__(self, handle: Handle, ctx: RequestContext) -> None:
        self._handle = handle
        self._ctx = ctx
        self._offset = 0

    def seek(self, offset: int) -> None:
        self._offset = offset

    def read(self, size: int) -> bytes:
        with as_responses(self._handle.path):
            data = self._handle.read(size, self._offset, self._ctx)
        self._offset += len(data)
        return data

    def close(self) -> None:
        self._handle.close()


class _ValueWriter:
    """Collects the body of a PUT, and writes it as one value when it is complete."""

    def __init__(self, handle: Handle, path: str, ctx: RequestContext, length: str) -> None:
        self._handle = handle
        self._path = path
        self._ctx = ctx
        self._length = length
        self._value = b""

    def write(self, data: bytes) -> None:
        self._value += data

    def close(self) -> None:
        with as_responses(self._path):
            if self._length and len(self._value) != int(self._length):
                raise DAVError(400, "the body is incomplete")
            # Clients create a file with an empty body first. Like truncation, this changes nothing.
            if self._value:
                self._handle.write(self._value, self._ctx)
            self._handle.close()
