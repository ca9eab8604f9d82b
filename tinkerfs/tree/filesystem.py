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
from tinkerfs.call import Call, Lease
from tinkerfs.tree.bounds import Bounds
from tinkerfs.tree.deletion_guard import DeletionGuard
from tinkerfs.tree.handles import JournalHandle, RenderedHandle, Versions, WeightsHandle
from tinkerfs.tree.layout import ROOT
from tinkerfs.tree.listings import Listing, Listings
from tinkerfs.tree.node import FOLDER_RANK, Attr, Entry, Handle, Space, inode
from tinkerfs.tree.nodes import Node, Nodes, is_checkpoint
from tinkerfs.tree.renderings import Renderings
from tinkerfs.tree.rows import Control, File, Folder, Link, Model, Row, Site, Stream
from tinkerfs.tree.scan import Scan

__all__ = ["FileSystem"]

_FOLDER_MODE = stat.S_IFDIR | 0o755
_LINK_MODE = stat.S_IFLNK | 0o777
_WRITE_BITS = 0o222
_XATTR_NAMESPACE = "user."
#: In the order of inode numbers a deletion meets what cannot be removed before and after the
#: checkpoints of a run, and a copy what cannot be written before the files whose writes act.
_RANKS = {File: 0, Stream: 0, Folder: FOLDER_RANK, Link: 2, Control: 3}
#: As many links as Linux follows in one path (path_resolution(7)).
_MAX_LINKS = 40


class FileSystem:
    """The account as files.

    Args:
        model: what the tree shows.
        cache_dir: the folder whose disk `space` tells of.
    """

    def __init__(self, model: Model, cache_dir: Path) -> None:
        settings = model.settings
        self._model = model
        self._cache_dir = cache_dir
        #: Also told of what an adapter does without asking here.
        self.guard = DeletionGuard(model.clock, model.settings)
        self._nodes = Nodes(ROOT, model, self.guard.removals)
        self._renderings = Renderings(model.clock)
        self._listings = Listings(model)
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._bounds = Bounds()
        self._versions = Versions()
        self._mode_mask = ~(settings.umask | (_WRITE_BITS if settings.read_only else 0))

    # Looking.

    @property
    def epoch(self) -> int:
        """As `Catalogue.epoch`: to be asked before a look, for `holds`."""
        return self._model.catalogue.epoch

    @property
    def changes(self) -> int:
        """A number that becomes another one with each change that is made here."""
        return self._model.catalogue.amendments + self.guard.removals.hides

    def holds(self, lease: Lease, epoch: int) -> bool:
        """Tell whether what a look told, with this lease since this epoch, holds still."""
        return (
            epoch == self._model.catalogue.epoch
            and not self.guard.removals.is_anything_hidden
            and lease.holds(self._model.clock.monotonic())
        )

    # Of the first four every walk makes thousands: they do without `_telling`, which costs 2 us.

    def stat(self, path: str, call: Call) -> Attr:
        """Return the attributes of a path; links are not followed.

        The call is told how long they hold, or that there is nothing.
        """
        entry = self._known_entry(path, call)
        if entry is not None and entry.attr is not None:
            return entry.attr
        try:
            return self._attr(self._nodes.resolve(path, call), call)
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, "stat")

    def known(self, path: str) -> Listing | None:
        """Return what a folder holds where that was listed before and holds still."""
        return None if self.guard.removals.is_anything_hidden else self._listings.kept(path)

    def _known_entry(self, path: str, call: Call) -> Entry | None:
        return None if self.guard.removals.is_anything_hidden else self._listings.entry(path, call)

    def listdir(self, path: str, call: Call) -> tuple[Entry, ...]:
        """Return what a folder holds, without `.` and `..`, in the table's order."""
        return self.scandir(path, call).all()

    def scandir(self, path: str, call: Call) -> Scan:
        """Begin to list what a folder holds, without `.` and `..`, in the table's order.

        Where a listing takes the server a while its first part will do; what cannot be listed at
        all fails here, what breaks off later fails where it does.
        """
        self.guard.on_list(path, call.caller)
        known = self.known(path)
        if known is not None:
            return Scan(known.entries, listing=known)
        epoch = self.epoch
        try:
            folder = self._nodes.resolve(path, call)
            if not isinstance(folder.row, Folder):
                raise errors.not_a_directory(path)
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, "list")
        if self.guard.removals.is_anything_hidden:
            scan = Scan(more=lambda: self._entries(folder, call))
        else:
            scan = self._listings.scan(folder, call, self._entries, epoch)
        scan.since(0, 1)
        return scan

    def readlink(self, path: str, call: Call) -> str:
        """Return where a symbolic link points, relative to its folder."""
        self.guard.on_readlink(path, call.caller)
        return self._readlink(path, call)

    def _readlink(self, path: str, call: Call) -> str:
        entry = self._known_entry(path, call)
        if entry is not None and entry.target is not None:
            return entry.target
        try:
            node = self._nodes.resolve(path, call)
            if not isinstance(node.row, Link):
                raise errors.not_a_link(path)
            return self._target(node, call)
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, "readlink")

    def handle_stat(self, path: str, handle: Handle, call: Call) -> Attr:
        """Return the attributes of an open file, with its exact length; also of an unlinked one."""
        with self._telling(path, "stat"):
            attr = self._attr(self._nodes.resolve(path, call, with_hidden=True), call)
            size_bytes = handle.size_bytes
            return attr if size_bytes is None else replace(attr, size_bytes=size_bytes)

    def follow(self, path: str, call: Call) -> str:
        """Return the path that is meant once every link is followed, as a kernel does."""
        done, pending, links = "/", [part for part in path.split("/") if part], 0
        while pending:
            part = pending.pop(0)
            done = posixpath.normpath(posixpath.join(done, part))
            if stat.S_ISLNK(self.stat(done, call).mode):
                links += 1
                if links > _MAX_LINKS:
                    raise errors.not_a_link(path)
                pending = [p for p in self._readlink(done, call).split("/") if p] + pending
                done = posixpath.dirname(done)
        return done

    def look(self, path: str, call: Call) -> tuple[Row, Site]:
        """Return the row of the table that a path stands for, and what it is about there."""
        with self._telling(path, "look"):
            node = self._nodes.resolve(path, call)
            return node.row, self._nodes.site(node, call)

    def space(self) -> Space:
        """Return the block cache's bound, and what is free of it and on its disk.

        The cache directory may be gone by now: it is made again with the next block.
        """
        total_bytes = self._model.settings.cache_size_bytes
        left_bytes = max(total_bytes - self._model.weights.kept_bytes(), 0)
        return Space(total_bytes, min(left_bytes, free_bytes(self._cache_dir)))

    # Reading and writing.

    def open(self, path: str, flags: int, call: Call) -> Handle:
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
            node = self._nodes.resolve(path, call)
            row = node.row
            if isinstance(row, Folder):
                raise errors.is_a_directory(path)
            if isinstance(row, Link):
                raise errors.not_a_file(path)
            if is_for_writing:
                self.guard.check_open_to_write(node, call.caller)
            elif flags & os.O_NOATIME and _is_resolved_by_open(row):
                # GIO, and so Thunar, Nautilus or `gio info`, opens what has no known ending with
                # this flag to name its type. No archive is built for an icon; on any errno but
                # EPERM they go by the name.
                raise errors.not_supported(path, "not read with O_NOATIME, as file managers look")
            if isinstance(row, Stream):
                return self._open_stream(node, row, call)
            if isinstance(row, File) and row.journal is not None:
                return JournalHandle(path, row.journal(self._nodes.site(node, call)))
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, "open")
        try:
            if is_for_reading:
                self.guard.on_open(path, flags, call.caller)
            data = self._rendering(node, call) if is_for_reading else None
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, "read")
        return RenderedHandle(
            path,
            data,
            lambda call: self._read_again(path, call),
            (lambda text, call: self._store(node, text, call)) if is_for_writing else None,
            direct_io=not self._renderings.is_settled(node),
            told_at=self._bounds.told_at(path),
        )

    def _open_stream(self, node: Node, row: Stream, call: Call) -> Handle:
        path = node.path
        call.is_momentary()  # each open of weights holds what it reads from
        site = self._nodes.site(node, call)
        told_bytes = row.told_bytes(site)
        file = row.open(site)
        if row.is_exact is None and file.size_bytes != told_bytes:
            self._bounds.told(path)  # it was opened as another version than was listed
        return WeightsHandle(
            path,
            file,
            lambda error: self._fail(error, path, "read"),
            versions=self._versions,
            told_at=self._bounds.told_at(path),
        )

    def truncate(self, path: str, size: int, call: Call) -> None:
        """Do nothing to a control, whose value only a write changes; refuse anything else."""
        del size
        self.set_attributes(path, call)

    def set_attributes(self, path: str, call: Call) -> None:
        """Accept chmod, chown and utimens of a control, changing nothing; refuse anything else."""
        with self._telling(path, "change attributes"):
            self.guard.check_writable(self._nodes.resolve(path, call))

    def create(self, path: str, call: Call) -> None:
        """Refuse to make, rename or link anything: EPERM, or EROFS on a read-only mount."""
        with self._telling(path, "create"):
            if self._model.settings.read_only:
                raise errors.read_only(path)
            folder = self._nodes.resolve(posixpath.dirname(path), call)
            raise self.guard.refuse_new(folder, path, call.caller)

    # Extended attributes.

    def getxattr(self, path: str, name: str, call: Call) -> bytes:
        """Return the value of an extended attribute.

        Raises:
            OSError: ENODATA where there is none; EOPNOTSUPP for all but `user.*`: `ls -l` then asks
                for access lists and security labels once, and not of every file.
        """
        if not name.startswith(_XATTR_NAMESPACE):
            raise errors.not_supported(path, "only user.tinker attributes are kept here")
        values = self._xattrs(path, call)
        try:
            return values[name].encode("utf-8", "surrogateescape")
        except KeyError:
            raise errors.no_attribute(path, name) from None

    def listxattr(self, path: str, call: Call) -> list[str]:
        """Return the names of a path's extended attributes."""
        return list(self._xattrs(path, call))

    def setxattr(self, path: str, name: str) -> None:
        """Refuse to set or remove an attribute: EPERM for `user.*`, else EOPNOTSUPP."""
        if not name.startswith(_XATTR_NAMESPACE):
            raise errors.not_supported(path, "only user.tinker attributes are kept here")
        if self._model.settings.read_only:
            raise errors.read_only(path)
        with self._telling(path, "set attribute"):
            raise errors.not_permitted(path, "extended attributes cannot be changed")

    def _xattrs(self, path: str, call: Call) -> dict[str, str]:
        with self._telling(path, "attributes"):
            node = self._nodes.resolve(path, call)
            if not isinstance(node.row, Folder | Stream) or node.row.xattrs is None:
                return {}
            values = node.row.xattrs(self._nodes.site(node, call))
            return {f"{_XATTR_NAMESPACE}{name}": value for name, value in values.items()}

    # Removing.

    def unlink(self, path: str, call: Call) -> None:
        """Hide a generated file of a checkpoint's folder; refuse to remove any other."""
        with self._telling(path, "unlink"):
            node = self._nodes.resolve(path, call)
            if isinstance(node.row, Folder):
                raise errors.is_a_directory(path)
            self.guard.unlink(node, call.caller)

    def rmdir(self, path: str, call: Call) -> None:
        """Remove the checkpoint whose directory shows no file any more, as `Mutations.remove` does.

        Raises:
            OSError: ENOTEMPTY while something is left, EPERM for what is no checkpoint, and what
                the API's delete raises, after which all its files are back.
        """
        with self._telling(path, "rmdir"):
            caller = self.guard.check_removal(path, call.caller)
            node = self._nodes.resolve(path, call)
            if not isinstance(node.row, Folder):
                raise errors.not_a_directory(path)
            self.guard.check_rmdir(node, caller)
            if any(True for _child in self._nodes.children(node, call)):
                raise errors.not_empty(path, "it still shows something; rm -r removes that first")
            if is_checkpoint(node):
                with self.guard.deleting(node, caller):
                    self._model.mutations.remove(node.subject, path, call)

    # Attributes and bytes.

    def _entries(self, folder: Node, call: Call) -> Iterator[Entry]:
        try:
            mtime_ns = self._mtime_ns(folder, call)
            for name, node in self._nodes.children(folder, call):
                row = node.row
                if isinstance(row, File) and row.is_costly and not self._renderings.has(node):
                    yield Entry(name, _inode(node), self._file_mode(row), None)
                else:
                    target = self._target(node, call) if isinstance(row, Link) else None
                    attr = self._attr(node, call, mtime_ns, target)
                    yield Entry(name, attr.ino, attr.mode, attr, target)
        except (errors.ApiError, OSError) as error:
            self._fail(error, folder.path, "list")

    def _attr(
        self, node: Node, call: Call, folder_ns: int | None = None, target: str | None = None
    ) -> Attr:
        """Return a node's attributes.

        Args:
            node: whose.
            call: as in all of these.
            folder_ns: its folder's time, where that is known.
            target: a link's, where that is known.
        """
        row, site = node.row, self._nodes.site(node, call)
        nlink, size_bytes = 1, 0
        if isinstance(row, Folder):
            mode = _FOLDER_MODE & self._mode_mask
            nlink = row.nlink
            size_bytes = row.stored_bytes(site) if row.stored_bytes is not None else 0
        elif isinstance(row, Link):
            mode = _LINK_MODE
            target = self._target(node, call) if target is None else target
            size_bytes = len(target.encode("utf-8", "surrogateescape"))
        else:
            mode = self._file_mode(row)
            size_bytes = self._size_bytes(node, row, call)
        if row.mtime_ns is not None:
            mtime_ns = row.mtime_ns(site)
        elif folder_ns is not None and not isinstance(row, Folder):
            mtime_ns = folder_ns
        else:
            mtime_ns = self._mtime_ns(node, call)
        ino = _inode(node)
        return Attr(mode, size_bytes, mtime_ns, ino, nlink, self._uid, self._gid)

    def _size_bytes(self, node: Node, row: File | Stream | Control, call: Call) -> int:
        if isinstance(row, Control) or row.told_bytes is None:
            return len(self._rendering(node, call, is_read=False))
        call.is_momentary()
        site = self._nodes.site(node, call)
        if row.is_exact is None:
            return row.told_bytes(site)
        # It may become known, or another, in between: exact is what was so before and after.
        was_exact = row.is_exact(site)
        size_bytes = row.told_bytes(site)
        if was_exact and row.is_exact(site):
            self._bounds.on_exact(node.path)
        else:
            self._bounds.told(node.path)
        return size_bytes

    def _mtime_ns(self, node: Node, call: Call) -> int:
        if node.row.mtime_ns is not None:
            return int(node.row.mtime_ns(self._nodes.site(node, call)))
        if isinstance(node.row, Folder) or node.parent is None:
            return self._model.started_ns
        return self._mtime_ns(node.parent, call)

    def _file_mode(self, row: File | Stream | Control) -> int:
        return stat.S_IFREG | (row.mode & self._mode_mask)

    def _target(self, node: Node, call: Call) -> str:
        assert isinstance(node.row, Link)
        target = node.row.target(self._nodes.site(node, call))
        if target is None:
            raise errors.not_found(node.path)
        return _relative(target, node.path)

    def _rendering(self, node: Node, call: Call, *, is_read: bool = True) -> bytes:
        """Return a file's bytes, made for this node or before.

        What costs nothing to make is not kept for its length alone, which the listing keeps: of
        100,000 `tinker_path`s that took 38 MB.
        """
        row, site = node.row, self._nodes.site(node, call)
        if isinstance(row, File):
            if row.is_momentary or row.told_bytes is not None:
                call.is_momentary()
            elif is_read or row.is_costly:
                return self._renderings.get(node, site)
        return row.render(site)  # type: ignore[no-any-return]

    def _read_again(self, path: str, call: Call) -> bytes:
        """Return the bytes of what is there now, also where it was unlinked."""
        with self._telling(path, "read"):
            return self._rendering(self._nodes.resolve(path, call, with_hidden=True), call)

    def _store(self, node: Node, text: str, call: Call) -> None:
        assert isinstance(node.row, Control)
        with self._telling(node.path, "write"):
            self.guard.check_control_write(node, call.caller)
            node.row.store(self._nodes.site(node, call), text)

    # Refusing and telling.

    @contextmanager
    def _telling(self, path: str, operation: str) -> Iterator[None]:
        """Make every failure an OSError with a path, and tell those that are worth it."""
        try:
            yield
        except (errors.ApiError, OSError) as error:
            self._fail(error, path, operation)

    def _fail(self, error: errors.ApiError | OSError, path: str, operation: str) -> NoReturn:
        """Raise a failure as an OSError with a path; tell it where it is worth it."""
        if isinstance(error, errors.ApiError):
            failure = errors.from_api(error, path)
            self._model.telemetry.failed(path, operation, failure)
            raise failure from error
        if not error.filename:
            error.filename = path
        if errors.is_worth_telling(error):
            self._model.telemetry.failed(path, operation, error)
        raise error


def _is_resolved_by_open(row: File | Stream | Control) -> bool:
    if isinstance(row, Stream):
        return row.is_exact is not None
    return isinstance(row, File) and row.told_bytes is not None


def _inode(node: Node) -> int:
    return inode(node.path, _RANKS[type(node.row)])


def _relative(target: str, link: str) -> str:
    """Return a path from the mount's root as one from the folder of a link, both normal."""
    ups, common = link.count("/") - 1, 0
    for index, (mine, theirs) in enumerate(zip(link, target, strict=False)):
        if mine != theirs:
            break
        if mine == "/":
            common, ups = index, ups - (index > 0)
    return "../" * ups + target[common + 1 :]
