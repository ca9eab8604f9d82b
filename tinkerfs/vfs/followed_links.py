"""The tree with its links followed, for adapters of protocols that have no symbolic links.

The target of a link is not resolved before its content is requested: whether it is a directory,
its time and its facts come from the link. So a listing of links sends no request per target.
"""

import hashlib
import posixpath
import stat

import msgspec

from tinkerfs.context import RequestContext
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.node import Attr
from tinkerfs.vfs.schema import ContentFile, ControlFile, Directory, Symlink


class Name(msgspec.Struct, frozen=True):
    """A name in the tree.

    Attributes:
        path: of the name itself, with the links in its directories followed.
        is_directory: whether it is a directory, or a link to one.
        is_link: whether it is a link.
        mtime_ns: nanoseconds since 1970; of a link itself.
        stored_bytes: the number of bytes that the server stores for a directory; 0 if unknown.
    """

    path: str
    is_directory: bool
    is_link: bool
    mtime_ns: int
    stored_bytes: int


class Validator(msgspec.Struct, frozen=True):
    """What is known of a file's content without opening it.

    Attributes:
        size_bytes: the exact length; None if only open() determines it.
        tag: differs for different content of a path; None if only open() identifies the content.
    """

    size_bytes: int | None
    tag: str | None


class FollowedLinks:
    """Names of a file system. Thread-safe, with the errors of `FileSystem`."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.filesystem = filesystem

    def find(self, path: str, ctx: RequestContext) -> Name:
        """Return the name at a path, without following it if it is a link itself."""
        own = self.own_path(path, ctx)
        return self._name(own, self.filesystem.stat(own, ctx), ctx)

    def own_path(self, path: str, ctx: RequestContext) -> str:
        """Return a path in the tree with the links in its directories followed."""
        directory, name = posixpath.split(path)
        return posixpath.join(self.filesystem.realpath(directory, ctx), name)

    def target(self, name: Name, ctx: RequestContext) -> str:
        """Return the path in the tree that has the content of a name."""
        return self.filesystem.realpath(name.path, ctx) if name.is_link else name.path

    def children(self, directory: Name, ctx: RequestContext) -> list[tuple[str, Name]]:
        """Return the names in a directory; a link to expensive files is resolved only here."""
        target = self.target(directory, ctx)
        found = []
        for entry in self.filesystem.listdir(target, ctx):
            path = posixpath.join(target, entry.name)
            if entry.attr is None:  # the attributes would cost a request
                found.append((entry.name, Name(path, False, False, directory.mtime_ns, 0)))
            else:
                found.append((entry.name, self._name(path, entry.attr, ctx)))
        return found

    def facts(self, name: Name, ctx: RequestContext) -> dict[str, str]:
        """Return values of what a name leads to, such as `tinker.base_model`; sends no request."""
        spec = (node := self.filesystem.resolve(name.path, ctx)).spec
        if isinstance(spec, Symlink):
            return spec.facts(node, ctx) if spec.facts is not None else {}
        if isinstance(spec, Directory):
            return spec.xattrs(node, ctx) if spec.xattrs is not None else {}
        return {}

    def doc(self, name: Name, ctx: RequestContext) -> str:
        """Return the description of a fixed name; empty for a name of the account."""
        spec = self.filesystem.resolve(name.path, ctx).spec
        return str(spec.doc) if spec.name == posixpath.basename(name.path) else ""

    def is_writable(self, name: Name, ctx: RequestContext) -> bool:
        """Return whether a name is a control file."""
        return isinstance(self.filesystem.resolve(name.path, ctx).spec, ControlFile)

    def validator(self, name: Name, ctx: RequestContext) -> Validator:
        """Return what is known of a file's content; sends no request that stat() does not send."""
        path = self.target(name, ctx)
        node = self.filesystem.resolve(path, ctx)
        spec = node.spec
        if isinstance(spec, ControlFile) or spec.size_hint is None:
            data = self.filesystem.render(path, ctx)
            return Validator(len(data), _tag(data))
        hint = spec.size_hint(node)
        if not hint.is_exact:
            return Validator(None, None)
        version = spec.version(node) if isinstance(spec, ContentFile) else None
        identity = f"{path}\0{version}\0{hint.size_bytes}".encode("utf-8", "surrogateescape")
        return Validator(hint.size_bytes, None if version is None else _tag(identity))

    def _name(self, path: str, attr: Attr, ctx: RequestContext) -> Name:
        is_link, is_directory = stat.S_ISLNK(attr.mode), stat.S_ISDIR(attr.mode)
        if is_link:
            is_directory = not self.filesystem.resolve(path, ctx).spec.leads_to_file
        stored_bytes = attr.size_bytes if stat.S_ISDIR(attr.mode) else 0
        return Name(path, is_directory, is_link, attr.mtime_ns, stored_bytes)


def _tag(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()
