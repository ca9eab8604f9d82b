"""The file system, with an interface like `os`, for the adapters.

Paths are absolute and normalized ("/runs/x"), with non-UTF-8 bytes as surrogate escapes. Every
method raises `OSError` with an errno, a message and the path. Failures other than a missing name
are also recorded in the mount's `errors` file. Thread-safe.
"""

import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.operating_system import is_preview
from tinkerfs.validity import Validity
from tinkerfs.vfs.deletion_guard import DeletionGuard
from tinkerfs.vfs.directory_cache import CachedDirectory, DirectoryCache
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.generated_files import GeneratedFileCache
from tinkerfs.vfs.handles import (
    ControlHandle,
    GeneratedFileHandle,
    JournalHandle,
    WeightsHandle,
)
from tinkerfs.vfs.kernel_cache import PageCacheTracker, SizeHintTracker
from tinkerfs.vfs.layout import ROOT
from tinkerfs.vfs.node import Attr, Entry, Handle, StatFs, relative_target
from tinkerfs.vfs.resolver import PathResolver, inode_of
from tinkerfs.vfs.schema import (
    Backend,
    ContentFile,
    ControlFile,
    Directory,
    FileSpec,
    GeneratedFile,
    Node,
    Symlink,
)

_DIRECTORY_MODE = stat.S_IFDIR | 0o755
_SYMLINK_MODE = stat.S_IFLNK | 0o777
_WRITE_BITS = 0o222
_XATTR_NAMESPACE = "user."
_XATTR_UNSUPPORTED = "only user.tinker attributes are supported"
#: Maximum number of symbolic links in one path, as on Linux (path_resolution(7)).
_MAX_SYMLINKS = 40


class FileSystem:
    """The account as files.

    Args:
        backend: the services of the mount.
    """

    def __init__(self, backend: Backend) -> None:
        settings = backend.settings
        self._backend = backend
        #: An adapter that serves a request from its own cache reports it to the guard.
        self.guard = DeletionGuard(backend.clock, backend.settings)
        self._resolver = PathResolver(ROOT, backend, self.guard)
        self._generated_files = GeneratedFileCache(backend.clock, self.check_and_touch)
        self._directories = DirectoryCache(self.check_and_touch)
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._size_hints = SizeHintTracker()
        self._page_caches = PageCacheTracker()
        self._mode_mask = ~(settings.umask | (_WRITE_BITS if settings.read_only else 0))

    # Metadata.

    @property
    def generation(self) -> int:
        """The generation of the metadata, to be read before a lookup for `check_and_touch`."""
        return self._backend.catalog.generation

    @property
    def local_mutation_count(self) -> int:
        """A counter that every change through this mount increases."""
        return self._backend.catalog.local_mutation_count + self.guard.hide_count

    def check_and_touch(self, validity: Validity, generation: int) -> bool:
        """Return whether a result is still valid; if so, mark its cached values as used."""
        return not self.guard.has_hidden_files and self._backend.check_and_touch(
            validity, generation
        )

    def wait_idle(self, ctx: RequestContext) -> None:
        """Wait until no metadata is being loaded in the background.

        Raises:
            OSError: EINTR or ETIMEDOUT if the wait ended before that.
        """
        self._backend.catalog.wait_idle(ctx)

    # stat, scandir, readlink and open avoid `_reporting_errors`: a tree walk makes thousands of
    # these calls, and a context manager is measurably slower than `try`.

    def stat(self, path: str, ctx: RequestContext) -> Attr:
        """Return the attributes of a path without following symbolic links.

        The validity of the attributes, or of the absence of the path, is added to `ctx`.
        """
        entry = self._directories.entry(path, ctx)
        if entry is not None and entry.attr is not None:
            return entry.attr
        try:
            return self._attr(self._resolver.resolve(path, ctx), ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "stat")

    def cached_directory(self, path: str) -> CachedDirectory | None:
        """Return the cached listing of a directory, or None if it is absent or expired."""
        return self._directories.get(path)

    def listdir(self, path: str, ctx: RequestContext) -> tuple[Entry, ...]:
        """Return the entries of a directory in table order, without `.` and `..`."""
        return self.scandir(path, ctx).read_all()

    def scandir(self, path: str, ctx: RequestContext) -> DirectoryStream:
        """Open a stream of the entries of a directory, without `.` and `..`.

        The call returns as soon as the first page of a long listing has arrived. A failure before
        that is raised here; a later one is raised by the stream.
        """
        self.guard.on_list(path, ctx.caller)
        cached = self.cached_directory(path)
        if cached is not None:
            return DirectoryStream(cached.entries)
        generation = self.generation
        try:
            directory = self._resolver.resolve(path, ctx)
            if not isinstance(directory.spec, Directory):
                raise errors.not_a_directory(path)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "list")
        stream = self._directories.stream(directory, ctx, self._entries, generation)
        stream.wait_for_first()
        return stream

    def readlink(self, path: str, ctx: RequestContext) -> str:
        """Return the target of a symbolic link, relative to its directory."""
        self.guard.on_readlink(path, ctx.caller)
        return self._readlink(path, ctx)

    def _readlink(self, path: str, ctx: RequestContext) -> str:
        entry = self._directories.entry(path, ctx)
        if entry is not None and entry.target is not None:
            return entry.target
        try:
            node = self._resolver.resolve(path, ctx)
            if not isinstance(node.spec, Symlink):
                raise errors.not_a_link(path)
            return self._target(node, ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "readlink")

    def fstat(self, handle: Handle, ctx: RequestContext) -> Attr:
        """Return the attributes of an open file, also if unlinked, with the exact size."""
        path = handle.path
        with self._reporting_errors(path, "stat"):
            attr = self._attr(self._resolver.resolve(path, ctx, include_hidden=True), ctx)
            size_bytes = handle.size_bytes
            return attr if size_bytes is None else replace(attr, size_bytes=size_bytes)

    def realpath(self, path: str, ctx: RequestContext) -> str:
        """Return the canonical path, with every symbolic link followed."""
        resolved, pending, links = "/", [name for name in path.split("/") if name], 0
        while pending:
            resolved = posixpath.normpath(posixpath.join(resolved, pending.pop(0)))
            if stat.S_ISLNK(self.stat(resolved, ctx).mode):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise errors.not_a_link(path)
                target = self._readlink(resolved, ctx)
                pending = [name for name in target.split("/") if name] + pending
                resolved = posixpath.dirname(resolved)
        return resolved

    def resolve(self, path: str, ctx: RequestContext) -> Node:
        """Return the node of a path."""
        with self._reporting_errors(path, "lookup"):
            return self._resolver.resolve(path, ctx)

    def statfs(self) -> StatFs:
        """Return the maximum size of the block cache, and how much of it is free.

        The cache directory may have been deleted; the next block recreates it.
        """
        total_bytes = self._backend.settings.cache_size_bytes
        left_bytes = max(total_bytes - self._backend.weights.usage_bytes(), 0)
        return StatFs(total_bytes, min(left_bytes, self._backend.weights.free_bytes()))

    # Reading and writing.

    def open(self, path: str, flags: int, ctx: RequestContext) -> Handle:
        """Open a file and load its content, unless it is read block by block.

        Raises:
            OSError: EPERM if the file is not writable, EROFS on a read-only mount, EOPNOTSUPP for
                O_NOATIME on a file whose content needs an archive, or a failure to load it.
        """
        access = flags & os.O_ACCMODE
        if access == os.O_RDONLY:
            shared = self._generated_files.shared_handle(path)
            if shared is not None:
                self.guard.on_open(path, flags, ctx.caller)
                return shared
        generation = self.generation
        try:
            node = self._resolver.resolve(path, ctx)
            spec = node.spec
            if isinstance(spec, Directory):
                raise errors.is_a_directory(path)
            if isinstance(spec, Symlink):
                raise errors.not_a_file(path)
            if access != os.O_RDONLY:
                self.guard.check_open_to_write(node, ctx.caller)
            elif is_preview(flags) and _has_size_hint(spec):
                # GIO (Thunar, Nautilus, `gio info`) opens a file with this flag to guess its type,
                # if the suffix is unknown. An icon is not worth building an archive; after any
                # errno but EPERM, GIO uses the name.
                raise errors.not_supported(
                    path, "cannot be opened with O_NOATIME, which file managers use for previews"
                )
            if isinstance(spec, ContentFile):
                return self._open_content(node, spec, ctx)
            if isinstance(spec, GeneratedFile) and spec.journal is not None:
                return JournalHandle(path, spec.journal(node), waits=spec.waits)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "open")
        try:
            if access != os.O_WRONLY:
                self.guard.on_open(path, flags, ctx.caller)
            if access != os.O_RDONLY:
                data = None if access == os.O_WRONLY else self._render(node, ctx)
                return ControlHandle(
                    path,
                    data,
                    lambda ctx: self.render(path, ctx),
                    lambda text, ctx: self._write_control(node, text, ctx),
                )
            if isinstance(spec, GeneratedFile) and spec.is_cacheable:
                return self._generated_files.open(node, generation, ctx)
            data = self._render(node, ctx)
            return GeneratedFileHandle(path, data, True, self._size_hints.reported_at(path))
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "read")

    def _open_content(self, node: Node, spec: ContentFile, ctx: RequestContext) -> Handle:
        path = node.path
        hint = spec.size_hint(node)
        file = spec.open(node, ctx)
        if not spec.awaits_exact_size and file.size_bytes != hint.size_bytes:
            self._size_hints.record(path)  # the opened version differs from the listed one
        return WeightsHandle(
            path,
            file,
            lambda error: self._raise_os_error(error, path, "read"),
            page_cache=self._page_caches,
            size_hint_reported_at=self._size_hints.reported_at(path),
        )

    def truncate(self, path: str, size: int, ctx: RequestContext) -> None:
        """Accept truncation of a control file without an effect; refuse other files."""
        del size
        self.setattr(path, ctx)

    def setattr(self, path: str, ctx: RequestContext) -> None:
        """Accept chmod, chown and utimens of a control file; refuse other files."""
        with self._reporting_errors(path, "change attributes"):
            self.guard.check_writable(self._resolver.resolve(path, ctx))

    def create(self, path: str, ctx: RequestContext) -> None:
        """Refuse to create, rename or link: EPERM, or EROFS on a read-only mount."""
        with self._reporting_errors(path, "create"):
            if self._backend.settings.read_only:
                raise errors.read_only(path)
            directory = self._resolver.resolve(posixpath.dirname(path), ctx)
            raise self.guard.refuse_new(directory, path, ctx.caller)

    # Extended attributes.

    def getxattr(self, path: str, name: str, ctx: RequestContext) -> bytes:
        """Return the value of an extended attribute.

        Raises:
            OSError: ENODATA if the attribute is absent; EOPNOTSUPP outside of `user.*`, after which
                `ls -l` requests access lists and security labels of no other file.
        """
        if not name.startswith(_XATTR_NAMESPACE):
            raise errors.not_supported(path, _XATTR_UNSUPPORTED)
        values = self._xattrs(path, ctx)
        try:
            return values[name].encode("utf-8", "surrogateescape")
        except KeyError:
            raise errors.no_attribute(path, name) from None

    def listxattr(self, path: str, ctx: RequestContext) -> list[str]:
        """Return the names of a path's extended attributes."""
        return list(self._xattrs(path, ctx))

    def setxattr(self, path: str, name: str) -> None:
        """Refuse to set or remove an attribute: EPERM for `user.*`, else EOPNOTSUPP."""
        if not name.startswith(_XATTR_NAMESPACE):
            raise errors.not_supported(path, _XATTR_UNSUPPORTED)
        if self._backend.settings.read_only:
            raise errors.read_only(path)
        with self._reporting_errors(path, "set attribute"):
            raise errors.not_permitted(path, "extended attributes cannot be changed")

    def _xattrs(self, path: str, ctx: RequestContext) -> dict[str, str]:
        with self._reporting_errors(path, "attributes"):
            node = self._resolver.resolve(path, ctx)
            if not isinstance(node.spec, Directory | ContentFile) or node.spec.xattrs is None:
                return {}
            values = node.spec.xattrs(node, ctx)
            return {f"{_XATTR_NAMESPACE}{name}": value for name, value in values.items()}

    # Removal.

    def unlink(self, path: str, ctx: RequestContext) -> None:
        """Hide a file of a checkpoint's directory from the caller; refuse other files."""
        with self._reporting_errors(path, "unlink"):
            node = self._resolver.resolve(path, ctx)
            if isinstance(node.spec, Directory):
                raise errors.is_a_directory(path)
            self.guard.unlink(node, ctx.caller)

    def rmdir(self, path: str, ctx: RequestContext) -> None:
        """Delete the checkpoint of an empty directory, or move it to the trash.

        If the request fails, the files that the caller had unlinked are visible again.

        Raises:
            OSError: ENOTEMPTY if the directory is not empty, EPERM if it is not a checkpoint's, or
                the failure of the request.
        """
        with self._reporting_errors(path, "rmdir"):
            caller = self.guard.check_removal(path, ctx.caller)
            node = self._resolver.resolve(path, ctx)
            if not isinstance(node.spec, Directory):
                raise errors.not_a_directory(path)
            self.guard.check_rmdir(node, caller)
            if any(True for _child in self._resolver.children(node, ctx)):
                raise errors.not_empty(path, "the directory is not empty (hint: rm -r)")
            if node.is_checkpoint:
                with self.guard.deleting(node, caller):
                    self._backend.mutations.remove(node.entity, path, ctx)

    # Attributes and content.

    def _entries(self, directory: Node, ctx: RequestContext) -> Iterator[Entry]:
        try:
            mtime_ns = self._mtime_ns(directory, ctx)
            for name, node in self._resolver.children(directory, ctx):
                spec = node.spec
                if (
                    isinstance(spec, GeneratedFile)
                    and spec.is_expensive
                    and not self._generated_files.has(node)
                ):
                    yield Entry(name, inode_of(node), self._file_mode(spec), None)
                else:
                    target = self._target(node, ctx) if isinstance(spec, Symlink) else None
                    attr = self._attr(node, ctx, mtime_ns, target)
                    yield Entry(name, attr.ino, attr.mode, attr, target)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, directory.path, "list")

    def _attr(
        self,
        node: Node,
        ctx: RequestContext,
        parent_mtime_ns: int | None = None,
        target: str | None = None,
    ) -> Attr:
        # The last two arguments save work if the caller has the values already.
        spec = node.spec
        nlink, size_bytes = 1, 0
        if isinstance(spec, Directory):
            mode = _DIRECTORY_MODE & self._mode_mask
            nlink = spec.nlink
            size_bytes = spec.stored_bytes(node) if spec.stored_bytes is not None else 0
        elif isinstance(spec, Symlink):
            mode = _SYMLINK_MODE
            target = self._target(node, ctx) if target is None else target
            size_bytes = len(target.encode("utf-8", "surrogateescape"))
        else:
            mode = self._file_mode(spec)
            size_bytes = self._size_bytes(node, spec, ctx)
        if spec.mtime_ns is not None:
            mtime_ns = spec.mtime_ns(node, ctx)
        elif parent_mtime_ns is not None and not isinstance(spec, Directory):
            mtime_ns = parent_mtime_ns
        else:
            mtime_ns = self._mtime_ns(node, ctx)
        ino = inode_of(node)
        return Attr(mode, size_bytes, mtime_ns, ino, nlink, self._uid, self._gid)

    def _size_bytes(self, node: Node, spec: FileSpec, ctx: RequestContext) -> int:
        if isinstance(spec, GeneratedFile) and spec.journal is not None:
            ctx.mark_uncacheable()
            return spec.journal(node).size_bytes
        if isinstance(spec, ControlFile) or spec.size_hint is None:
            return len(self._render(node, ctx))
        ctx.mark_uncacheable()
        hint = spec.size_hint(node)
        if spec.awaits_exact_size:
            if hint.is_exact:
                self._size_hints.on_exact(node.path)
            else:
                self._size_hints.record(node.path)
        return hint.size_bytes

    def _mtime_ns(self, node: Node, ctx: RequestContext) -> int:
        if node.spec.mtime_ns is not None:
            return int(node.spec.mtime_ns(node, ctx))
        if isinstance(node.spec, Directory) or node.parent is None:
            return self._backend.started_ns
        return self._mtime_ns(node.parent, ctx)

    def _file_mode(self, spec: FileSpec) -> int:
        return stat.S_IFREG | (spec.mode & self._mode_mask)

    def _target(self, node: Node, ctx: RequestContext) -> str:
        assert isinstance(node.spec, Symlink)
        target = node.spec.target(node, ctx)
        if target is None:
            raise errors.not_found(node.path)
        return relative_target(target, node.path)

    def _render(self, node: Node, ctx: RequestContext) -> bytes:
        """Return the content of a file; expensive content is cached.

        Other content need not be cached for stat(), because the directory cache stores its length.
        """
        spec = node.spec
        if isinstance(spec, GeneratedFile):
            if not spec.is_cacheable:
                ctx.mark_uncacheable()
            elif spec.is_expensive:
                return self._generated_files.get(node, ctx)
        return spec.render(node, ctx)  # type: ignore[no-any-return]

    def render(self, path: str, ctx: RequestContext) -> bytes:
        """Return the current content of a generated file, which may be unlinked, without open()."""
        with self._reporting_errors(path, "read"):
            return self._render(self._resolver.resolve(path, ctx, include_hidden=True), ctx)

    def _write_control(self, node: Node, text: str, ctx: RequestContext) -> None:
        assert isinstance(node.spec, ControlFile)
        with self._reporting_errors(node.path, "write"):
            self.guard.check_control_write(node, ctx.caller)
            node.spec.on_write(node, text, ctx)

    # Errors.

    @contextmanager
    def _reporting_errors(self, path: str, operation: str) -> Iterator[None]:
        """Convert failures in the block as `_raise_os_error` does."""
        try:
            yield
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, operation)

    def _raise_os_error(
        self, error: errors.ApiError | OSError, path: str, operation: str
    ) -> NoReturn:
        """Raise a failure as an OSError with a path, and record it unless it is routine."""
        if isinstance(error, errors.ApiError):
            failure = errors.os_error_from_api(error, path)
            self._backend.telemetry.record_error(path, operation, failure)
            raise failure from error
        if not error.filename:
            error.filename = path
        if errors.should_report(error):
            self._backend.telemetry.record_error(path, operation, error)
        raise error


def _has_size_hint(spec: FileSpec) -> bool:
    if isinstance(spec, ContentFile):
        return spec.awaits_exact_size
    return isinstance(spec, GeneratedFile) and spec.size_hint is not None
