"""FileSystem: the tree behind an interface like `os`, for every adapter.

Paths are absolute and normal ("/runs/x"), bytes that are no UTF-8 as surrogate escapes.
Thread-safe. Every method raises `OSError` with an errno, a sentence and the path; each failure that
says more than "no such name" also lands in the mount's `errors`.
"""

import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.eviction import free_bytes
from tinkerfs.context import RequestContext, Validity
from tinkerfs.vfs.deletion_guard import DeletionGuard
from tinkerfs.vfs.directory_cache import CachedDirectory, DirectoryCache
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.generated_files import GeneratedFileCache
from tinkerfs.vfs.handles import GeneratedFileHandle, JournalHandle, PageCacheTracker, WeightsHandle
from tinkerfs.vfs.kernel_cache import SizeHintTracker
from tinkerfs.vfs.layout import ROOT
from tinkerfs.vfs.node import FOLDER_RANK, Attr, Entry, Handle, StatFs, inode_for_path
from tinkerfs.vfs.resolver import Node, PathResolver, is_checkpoint
from tinkerfs.vfs.schema import (
    Backend,
    ContentFile,
    ControlFile,
    Directory,
    GeneratedFile,
    NodeContext,
    NodeSpec,
    Symlink,
)

_FOLDER_MODE = stat.S_IFDIR | 0o755
_LINK_MODE = stat.S_IFLNK | 0o777
_WRITE_BITS = 0o222
_XATTR_NAMESPACE = "user."
#: In the order of inode numbers a deletion meets what cannot be removed before and after the
#: checkpoints of a run, and a copy what cannot be written before the files whose writes act.
_RANKS = {GeneratedFile: 0, ContentFile: 0, Directory: FOLDER_RANK, Symlink: 2, ControlFile: 3}
#: As many links as Linux follows in one path (path_resolution(7)).
_MAX_LINKS = 40


class FileSystem:
    """The account as files.

    Args:
        model: what the tree shows.
        cache_dir: the folder whose disk `space` tells of.
    """

    def __init__(self, model: Backend, cache_dir: Path) -> None:
        settings = model.settings
        self._model = model
        self._cache_dir = cache_dir
        #: Also told of what an adapter does without asking here.
        self.guard = DeletionGuard(model.clock, model.settings)
        self._nodes = PathResolver(ROOT, model, self.guard.removals)
        self._renderings = GeneratedFileCache(model.clock)
        self._listings = DirectoryCache(model)
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._bounds = SizeHintTracker()
        self._versions = PageCacheTracker()
        self._mode_mask = ~(settings.umask | (_WRITE_BITS if settings.read_only else 0))

    # Looking.

    @property
    def epoch(self) -> int:
        """As `Catalogue.epoch`: to be asked before a look, for `holds`."""
        return self._model.catalogue.epoch

    @property
    def local_mutations(self) -> int:
        """A number that becomes another one with each change that is made here."""
        return self._model.catalogue.amendments + self.guard.removals.hide_count

    def is_valid(self, lease: Validity, epoch: int) -> bool:
        """Tell whether what a look told, with this lease since this epoch, holds still."""
        return (
            epoch == self._model.catalogue.epoch
            and not self.guard.removals.has_tombstones
            and lease.check_and_touch(self._model.clock.monotonic())
        )

    # Of the first four every walk makes thousands: they do without `_telling`, which costs 2 us.

    def stat(self, path: str, ctx: RequestContext) -> Attr:
        """Return the attributes of a path; links are not followed.

        The call is told how long they hold, or that there is nothing.
        """
        entry = self._known_entry(path, ctx)
        if entry is not None and entry.attr is not None:
            return entry.attr
        try:
            return self._attr(self._nodes.resolve(path, ctx), ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "stat")

    def cached_directory(self, path: str) -> CachedDirectory | None:
        """Return what a folder holds where that was listed before and holds still."""
        return None if self.guard.removals.has_tombstones else self._listings.get(path)

    def _known_entry(self, path: str, ctx: RequestContext) -> Entry | None:
        return None if self.guard.removals.has_tombstones else self._listings.entry(path, ctx)

    def listdir(self, path: str, ctx: RequestContext) -> tuple[Entry, ...]:
        """Return what a folder holds, without `.` and `..`, in the table's order."""
        return self.scandir(path, ctx).read_all()

    def scandir(self, path: str, ctx: RequestContext) -> DirectoryStream:
        """Begin to list what a folder holds, without `.` and `..`, in the table's order.

        Where a listing takes the server a while its first part will do; what cannot be listed at
        all fails here, what breaks off later fails where it does.
        """
        self.guard.on_list(path, ctx.caller)
        known = self.cached_directory(path)
        if known is not None:
            return DirectoryStream(known.entries, listing=known)
        epoch = self.epoch
        try:
            folder = self._nodes.resolve(path, ctx)
            if not isinstance(folder.row, Directory):
                raise errors.not_a_directory(path)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "list")
        if self.guard.removals.has_tombstones:
            scan = DirectoryStream(source=lambda: self._entries(folder, ctx))
        else:
            scan = self._listings.scan(folder, ctx, self._entries, epoch)
        scan.read(0, 1)
        return scan

    def readlink(self, path: str, ctx: RequestContext) -> str:
        """Return where a symbolic link points, relative to its folder."""
        self.guard.on_readlink(path, ctx.caller)
        return self._readlink(path, ctx)

    def _readlink(self, path: str, ctx: RequestContext) -> str:
        entry = self._known_entry(path, ctx)
        if entry is not None and entry.target is not None:
            return entry.target
        try:
            node = self._nodes.resolve(path, ctx)
            if not isinstance(node.row, Symlink):
                raise errors.not_a_link(path)
            return self._target(node, ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "readlink")

    def fstat(self, path: str, handle: Handle, ctx: RequestContext) -> Attr:
        """Return the attributes of an open file, with its exact length; also of an unlinked one."""
        with self._reporting_errors(path, "stat"):
            attr = self._attr(self._nodes.resolve(path, ctx, include_hidden=True), ctx)
            size_bytes = handle.size_bytes
            return attr if size_bytes is None else replace(attr, size_bytes=size_bytes)

    def realpath(self, path: str, ctx: RequestContext) -> str:
        """Return the path that is meant once every link is followed, as a kernel does."""
        done, pending, links = "/", [part for part in path.split("/") if part], 0
        while pending:
            part = pending.pop(0)
            done = posixpath.normpath(posixpath.join(done, part))
            if stat.S_ISLNK(self.stat(done, ctx).mode):
                links += 1
                if links > _MAX_LINKS:
                    raise errors.not_a_link(path)
                pending = [p for p in self._readlink(done, ctx).split("/") if p] + pending
                done = posixpath.dirname(done)
        return done

    def resolve(self, path: str, ctx: RequestContext) -> tuple[NodeSpec, NodeContext]:
        """Return the row of the table that a path stands for, and what it is about there."""
        with self._reporting_errors(path, "look"):
            node = self._nodes.resolve(path, ctx)
            return node.row, self._nodes.context_for(node, ctx)

    def statfs(self) -> StatFs:
        """Return the block cache's bound, and what is free of it and on its disk.

        The cache directory may be gone by now: it is made again with the next block.
        """
        total_bytes = self._model.settings.cache_size_bytes
        left_bytes = max(total_bytes - self._model.weights.kept_bytes(), 0)
        return StatFs(total_bytes, min(left_bytes, free_bytes(self._cache_dir)))

    # Reading and writing.

    def open(self, path: str, flags: int, ctx: RequestContext) -> Handle:
        """Open a file; what is to be read is resolved before this returns.

        The call is told how long one that is only read gives the same bytes.

        Raises:
            OSError: EPERM for writing what cannot be written, EROFS on a read-only mount,
                EOPNOTSUPP for a glance at what costs the server something, and what resolving its
                bytes raises.
        """
        is_for_writing = (flags & os.O_ACCMODE) != os.O_RDONLY
        is_for_reading = (flags & os.O_ACCMODE) != os.O_WRONLY
        try:
            node = self._nodes.resolve(path, ctx)
            row = node.row
            if isinstance(row, Directory):
                raise errors.is_a_directory(path)
            if isinstance(row, Symlink):
                raise errors.not_a_file(path)
            if is_for_writing:
                self.guard.check_open_to_write(node, ctx.caller)
            elif flags & os.O_NOATIME and _has_size_hint(row):
                # GIO, and so Thunar, Nautilus or `gio info`, opens what has no known ending with
                # this flag to name its type. No archive is built for an icon; on any errno but
                # EPERM they go by the name.
                raise errors.not_supported(path, "not read with O_NOATIME, as file managers look")
            if isinstance(row, ContentFile):
                return self._open_stream(node, row, ctx)
            if isinstance(row, GeneratedFile) and row.journal is not None:
                return JournalHandle(path, row.journal(self._nodes.context_for(node, ctx)))
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "open")
        try:
            if is_for_reading:
                self.guard.on_open(path, flags, ctx.caller)
            data = self._rendering(node, ctx) if is_for_reading else None
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, "read")
        return GeneratedFileHandle(
            path,
            data,
            lambda ctx: self._read_again(path, ctx),
            (lambda text, ctx: self._store(node, text, ctx)) if is_for_writing else None,
            direct_io=not self._renderings.may_use_page_cache(node),
            size_hint_reported_at=self._bounds.reported_at(path),
        )

    def _open_stream(self, node: Node, row: ContentFile, ctx: RequestContext) -> Handle:
        path = node.path
        ctx.mark_uncacheable()  # each open of weights holds what it reads from
        site = self._nodes.context_for(node, ctx)
        told_bytes = row.size_hint(site)
        file = row.open(site)
        if row.is_size_exact is None and file.size_bytes != told_bytes:
            self._bounds.record(path)  # it was opened as another version than was listed
        return WeightsHandle(
            path,
            file,
            lambda error: self._raise_os_error(error, path, "read"),
            versions=self._versions,
            size_hint_reported_at=self._bounds.reported_at(path),
        )

    def truncate(self, path: str, size: int, ctx: RequestContext) -> None:
        """Do nothing to a control, whose value only a write changes; refuse anything else."""
        del size
        self.setattr(path, ctx)

    def setattr(self, path: str, ctx: RequestContext) -> None:
        """Accept chmod, chown and utimens of a control, changing nothing; refuse anything else."""
        with self._reporting_errors(path, "change attributes"):
            self.guard.check_writable(self._nodes.resolve(path, ctx))

    def create(self, path: str, ctx: RequestContext) -> None:
        """Refuse to make, rename or link anything: EPERM, or EROFS on a read-only mount."""
        with self._reporting_errors(path, "create"):
            if self._model.settings.read_only:
                raise errors.read_only(path)
            folder = self._nodes.resolve(posixpath.dirname(path), ctx)
            raise self.guard.refuse_new(folder, path, ctx.caller)

    # Extended attributes.

    def getxattr(self, path: str, name: str, ctx: RequestContext) -> bytes:
        """Return the value of an extended attribute.

        Raises:
            OSError: ENODATA where there is none; EOPNOTSUPP for all but `user.*`: `ls -l` then asks
                for access lists and security labels once, and not of every file.
        """
        if not name.startswith(_XATTR_NAMESPACE):
            raise errors.not_supported(path, "only user.tinker attributes are kept here")
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
            raise errors.not_supported(path, "only user.tinker attributes are kept here")
        if self._model.settings.read_only:
            raise errors.read_only(path)
        with self._reporting_errors(path, "set attribute"):
            raise errors.not_permitted(path, "extended attributes cannot be changed")

    def _xattrs(self, path: str, ctx: RequestContext) -> dict[str, str]:
        with self._reporting_errors(path, "attributes"):
            node = self._nodes.resolve(path, ctx)
            if not isinstance(node.row, Directory | ContentFile) or node.row.xattrs is None:
                return {}
            values = node.row.xattrs(self._nodes.context_for(node, ctx))
            return {f"{_XATTR_NAMESPACE}{name}": value for name, value in values.items()}

    # Removing.

    def unlink(self, path: str, ctx: RequestContext) -> None:
        """Hide a generated file of a checkpoint's folder; refuse to remove any other."""
        with self._reporting_errors(path, "unlink"):
            caller = self.guard.check_removal(path, ctx.caller)
            node = self._nodes.resolve(path, ctx)
            if isinstance(node.row, Directory):
                raise errors.is_a_directory(path)
            self.guard.unlink(node, caller)

    def rmdir(self, path: str, ctx: RequestContext) -> None:
        """Remove the checkpoint whose directory shows no file any more, as `Mutations.remove` does.

        Raises:
            OSError: ENOTEMPTY while something is left, EPERM for what is no checkpoint, and what
                the API's delete raises, after which all its files are back.
        """
        with self._reporting_errors(path, "rmdir"):
            caller = self.guard.check_removal(path, ctx.caller)
            node = self._nodes.resolve(path, ctx)
            if not isinstance(node.row, Directory):
                raise errors.not_a_directory(path)
            self.guard.check_rmdir(node, caller)
            if any(True for _child in self._nodes.children(node, ctx)):
                raise errors.not_empty(path, "it still shows something; rm -r removes that first")
            if is_checkpoint(node):
                with self.guard.deleting(node, caller):
                    self._model.mutations.remove(node.subject, path, ctx)

    # Attributes and bytes.

    def _entries(self, folder: Node, ctx: RequestContext) -> Iterator[Entry]:
        try:
            mtime_ns = self._mtime_ns(folder, ctx)
            for name, node in self._nodes.children(folder, ctx):
                row = node.row
                if (
                    isinstance(row, GeneratedFile)
                    and row.is_expensive
                    and not self._renderings.has(node)
                ):
                    yield Entry(name, _inode(node), self._file_mode(row), None)
                else:
                    target = self._target(node, ctx) if isinstance(row, Symlink) else None
                    attr = self._attr(node, ctx, mtime_ns, target)
                    yield Entry(name, attr.ino, attr.mode, attr, target)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, folder.path, "list")

    def _attr(
        self,
        node: Node,
        ctx: RequestContext,
        folder_ns: int | None = None,
        target: str | None = None,
    ) -> Attr:
        """Return a node's attributes.

        Args:
            node: whose.
            ctx: as in all of these.
            folder_ns: its folder's time, where that is known.
            target: a link's, where that is known.
        """
        row, site = node.row, self._nodes.context_for(node, ctx)
        nlink, size_bytes = 1, 0
        if isinstance(row, Directory):
            mode = _FOLDER_MODE & self._mode_mask
            nlink = row.nlink
            size_bytes = row.stored_bytes(site) if row.stored_bytes is not None else 0
        elif isinstance(row, Symlink):
            mode = _LINK_MODE
            target = self._target(node, ctx) if target is None else target
            size_bytes = len(target.encode("utf-8", "surrogateescape"))
        else:
            mode = self._file_mode(row)
            size_bytes = self._size_bytes(node, row, ctx)
        if row.mtime_ns is not None:
            mtime_ns = row.mtime_ns(site)
        elif folder_ns is not None and not isinstance(row, Directory):
            mtime_ns = folder_ns
        else:
            mtime_ns = self._mtime_ns(node, ctx)
        ino = _inode(node)
        return Attr(mode, size_bytes, mtime_ns, ino, nlink, self._uid, self._gid)

    def _size_bytes(
        self, node: Node, row: GeneratedFile | ContentFile | ControlFile, ctx: RequestContext
    ) -> int:
        if isinstance(row, ControlFile) or row.size_hint is None:
            return len(self._rendering(node, ctx, is_read=False))
        ctx.mark_uncacheable()
        site = self._nodes.context_for(node, ctx)
        if row.is_size_exact is None:
            return row.size_hint(site)
        # It may become known, or another, in between: exact is what was so before and after.
        was_exact = row.is_size_exact(site)
        size_bytes = row.size_hint(site)
        if was_exact and row.is_size_exact(site):
            self._bounds.on_exact(node.path)
        else:
            self._bounds.record(node.path)
        return size_bytes

    def _mtime_ns(self, node: Node, ctx: RequestContext) -> int:
        if node.row.mtime_ns is not None:
            return int(node.row.mtime_ns(self._nodes.context_for(node, ctx)))
        if isinstance(node.row, Directory) or node.parent is None:
            return self._model.started_ns
        return self._mtime_ns(node.parent, ctx)

    def _file_mode(self, row: GeneratedFile | ContentFile | ControlFile) -> int:
        return stat.S_IFREG | (row.mode & self._mode_mask)

    def _target(self, node: Node, ctx: RequestContext) -> str:
        assert isinstance(node.row, Symlink)
        target = node.row.target(self._nodes.context_for(node, ctx))
        if target is None:
            raise errors.not_found(node.path)
        return _relative(target, node.path)

    def _rendering(self, node: Node, ctx: RequestContext, *, is_read: bool = True) -> bytes:
        """Return a file's bytes, made for this node or before.

        What costs nothing to make is not kept for its length alone, which the listing keeps: of
        100,000 `tinker_path`s that took 38 MB.
        """
        row, site = node.row, self._nodes.context_for(node, ctx)
        if isinstance(row, GeneratedFile):
            if row.is_volatile or row.size_hint is not None:
                ctx.mark_uncacheable()
            elif is_read or row.is_expensive:
                return self._renderings.get(node, site)
        return row.render(site)  # type: ignore[no-any-return]

    def _read_again(self, path: str, ctx: RequestContext) -> bytes:
        """Return the bytes of what is there now, also where it was unlinked."""
        with self._reporting_errors(path, "read"):
            return self._rendering(self._nodes.resolve(path, ctx, include_hidden=True), ctx)

    def _store(self, node: Node, text: str, ctx: RequestContext) -> None:
        assert isinstance(node.row, ControlFile)
        with self._reporting_errors(node.path, "write"):
            self.guard.check_control_write(node, ctx.caller)
            node.row.store(self._nodes.context_for(node, ctx), text)

    # Refusing and telling.

    @contextmanager
    def _reporting_errors(self, path: str, operation: str) -> Iterator[None]:
        """Make every failure an OSError with a path, and tell those that are worth it."""
        try:
            yield
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error, path, operation)

    def _raise_os_error(
        self, error: errors.ApiError | OSError, path: str, operation: str
    ) -> NoReturn:
        """Raise a failure as an OSError with a path; tell it where it is worth it."""
        if isinstance(error, errors.ApiError):
            failure = errors.os_error_from_api(error, path)
            self._model.telemetry.record_error(path, operation, failure)
            raise failure from error
        if not error.filename:
            error.filename = path
        if errors.should_report(error):
            self._model.telemetry.record_error(path, operation, error)
        raise error


def _has_size_hint(row: GeneratedFile | ContentFile | ControlFile) -> bool:
    if isinstance(row, ContentFile):
        return row.is_size_exact is not None
    return isinstance(row, GeneratedFile) and row.size_hint is not None


def _inode(node: Node) -> int:
    return inode_for_path(node.path, _RANKS[type(node.row)])


def _relative(target: str, link: str) -> str:
    """Return a path from the mount's root as one from the folder of a link, both normal."""
    ups, common = link.count("/") - 1, 0
    for index, (mine, theirs) in enumerate(zip(link, target, strict=False)):
        if mine != theirs:
            break
        if mine == "/":
            common, ups = index, ups - (index > 0)
    return "../" * ups + target[common + 1 :]
