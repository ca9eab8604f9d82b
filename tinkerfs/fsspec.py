"""The file system as an fsspec implementation: `tinker://runs/<run_id>/...`.

A tinker path, `tinker://<run_id>/<kind>/<name>`, is the directory of that checkpoint's files, and
removing it removes the checkpoint; `tinker://<run_id>` is the run.

For pandas, pyarrow, dask and their like, where there is no FUSE. A synchronous file system: no
event loop has to survive a fork. Links are followed as a kernel follows them; listings tell of them
as links, so that no recursive operation comes to what costs the server something.

Errors are `OSError`s with an errno, as on a mount. Thread-safe; a forked child opens a client of
its own.
"""

import os
import posixpath
import stat
import threading
import weakref
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Final

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from tinkerfs import errors
from tinkerfs.app import open_app
from tinkerfs.config import DEFAULT_BASE_URL, Settings
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.layout import ROOT
from tinkerfs.vfs.node import Attr, Handle

__all__ = ["TinkerFile", "TinkerFileSystem"]

_REFRESH: Final = "/.tinkerfs/refresh"


class TinkerFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The account behind `TINKER_API_KEY`, or another of the key's usual sources.

    Args:
        base_url: where the API is; else `TINKER_BASE_URL`, else the official service.
        settings: fields of `Settings`, for others than the defaults.
        filesystem: one that is open already, instead of all these.
    """

    protocol = "tinker"

    def __init__(
        self,
        base_url: str | None = None,
        settings: dict[str, Any] | None = None,
        filesystem: FileSystem | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(**storage_options)
        url = base_url or os.environ.get("TINKER_BASE_URL") or DEFAULT_BASE_URL
        self._settings = Settings(**{"base_url": url.rstrip("/"), **(settings or {})})
        self._given = filesystem
        # By process: a child never takes a lock that a thread of its parent may have held.
        self._locks: dict[int, threading.Lock] = {}
        #: What each process opened; that of a parent stays referenced, and so unclosed.
        self._opened: dict[int, FileSystem] = {}

    @property
    def tree(self) -> FileSystem:
        """The file system behind, opened when first wanted, by each process for itself."""
        if self._given is not None:
            return self._given
        pid = os.getpid()
        found = self._opened.get(pid)
        if found is None:
            # One operation of a dict is atomic, and so whole in a child.
            with self._locks.setdefault(pid, threading.Lock()):
                found = self._opened.get(pid)
                if found is None:
                    stack = ExitStack()
                    found = stack.enter_context(open_app(self._settings)).filesystem
                    weakref.finalize(self, _close, stack, pid)
                    self._opened[pid] = found
        return found

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return [p.lstrip("/") for p in stripped] if isinstance(path, list) else stripped.lstrip("/")

    # Looking.

    def ls(self, path: str, detail: bool = True, **_kwargs: Any) -> list[Any]:
        """List a folder; of a link what it is itself, of a file that file."""
        name = self._strip_protocol(path)
        place = self._follow(name)
        # There each name is a tinker path, and so a link to files.
        has_links = _is_tinker_path(name, 2)
        if not stat.S_ISDIR(self.tree.stat(place, BACKGROUND_CONTEXT).mode):
            return [self.info(name)] if detail else [name]
        entries = self.tree.listdir(place, BACKGROUND_CONTEXT)
        if not detail:
            return [posixpath.join(name, entry.name) for entry in entries]
        infos = [
            _info(
                posixpath.join(name, entry.name),
                entry.attr or self.tree.stat(posixpath.join(place, entry.name), BACKGROUND_CONTEXT),
            )
            for entry in entries
        ]
        return [{**info, "type": "link", "islink": True} for info in infos] if has_links else infos

    def info(self, path: str, **_kwargs: Any) -> dict[str, Any]:
        """Return what stat tells; links are followed, and told by `islink`."""
        name = self._strip_protocol(path)
        info = _info(name, self.tree.stat(self._follow(name), BACKGROUND_CONTEXT))
        own = self.tree.stat(self._own(name), BACKGROUND_CONTEXT)
        info["islink"] = stat.S_ISLNK(own.mode)
        return info

    def created(self, path: str) -> datetime:
        """Return when it was saved."""
        return self.modified(path)

    def modified(self, path: str) -> datetime:
        """Return when it was last changed: a run's last request, a checkpoint's saving."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def expand_path(
        self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any
    ) -> list[str]:
        """Expand as fsspec does; a recursion leaves out the links that it comes to, as `cp -r`."""
        named = super().expand_path(path, recursive=False, **kwargs)
        if not recursive:
            return named  # type: ignore[no-any-return]
        found = super().expand_path(path, recursive=True, maxdepth=maxdepth, **kwargs)
        return [p for p in found if p in named or not self.info(p)["islink"]]

    def invalidate_cache(self, path: str | None = None) -> None:
        """Drop every cached entry; for a single path nothing has to be dropped."""
        is_open = self._given is not None or os.getpid() in self._opened
        if path is None and is_open:
            self.tree.open(_REFRESH, os.O_WRONLY, BACKGROUND_CONTEXT).write(
                b"1", BACKGROUND_CONTEXT
            )

    # Reading and writing.

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_kwargs: Any
    ) -> bytes:
        """Return the bytes of [start, end); negative ones count from the end."""
        handle = self._handle(path, os.O_RDONLY)
        try:
            first, last, _step = slice(start, end).indices(_size(handle))
            return handle.read(max(last - first, 0), first, BACKGROUND_CONTEXT)
        finally:
            handle.close()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_kwargs: Any) -> None:
        """Write one whole value to a control file."""
        if mode == "create":
            self.tree.create(self._own(path), BACKGROUND_CONTEXT)
        self._handle(path, os.O_WRONLY).write(value, BACKGROUND_CONTEXT)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "TinkerFile":
        if "x" in mode:
            self.tree.create(self._own(path), BACKGROUND_CONTEXT)
        is_read = mode == "rb"
        handle = self._handle(path, os.O_RDONLY if is_read else os.O_WRONLY)
        # Where in the file a value is written says nothing: appending is writing.
        return TinkerFile(self, path, handle, "rb" if is_read else "wb", **kwargs)

    def reopened(self, path: str, before: Handle) -> Handle:
        """Return a file that a parent process had open, opened by this one to be read.

        Raises:
            OSError: ESTALE if it has another length by now; as for opening it.
        """
        handle = self._handle(path, os.O_RDONLY)
        if handle.size_bytes != before.size_bytes:
            handle.close()
            raise errors.stale(path, "it was changed after another process had opened it")
        return handle

    # Removing: the rules are the mount's, and the caller is this process's group.

    def rm_file(self, path: str) -> None:
        """Hide a generated file of a checkpoint's folder, until that is removed or a minute on."""
        self.tree.unlink(self._own(path), BACKGROUND_CONTEXT)

    def rmdir(self, path: str) -> None:
        """Remove a folder that shows nothing any more: of a checkpoint, delete the checkpoint."""
        self.tree.rmdir(self._removable(path), BACKGROUND_CONTEXT)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, or with `recursive` checkpoints; the first refusal ends it."""
        del maxdepth  # part of a checkpoint cannot be removed
        # A name that is there is meant as it stands, whatever pattern it might be.
        is_name = isinstance(path, str) and self.exists(path)
        for name in [path] if is_name else self.expand_path(path):
            self._remove(self._removable(name), recursive=recursive)

    def _remove(self, path: str, *, recursive: bool) -> None:
        if stat.S_ISDIR(self.tree.stat(path, BACKGROUND_CONTEXT).mode):
            if not recursive:
                raise errors.is_a_directory(path)
            for entry in self.tree.listdir(path, BACKGROUND_CONTEXT):
                self._remove(posixpath.join(path, entry.name), recursive=True)
            self.tree.rmdir(path, BACKGROUND_CONTEXT)
        else:
            self.tree.unlink(path, BACKGROUND_CONTEXT)

    # Refusing.

    def mkdir(self, path: str, create_parents: bool = True, **_kwargs: Any) -> None:
        """Refuse."""
        del create_parents
        self.tree.create(self._own(path), BACKGROUND_CONTEXT)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Refuse, unless it is there and may be."""
        if not (exist_ok and self.isdir(path)):
            self.mkdir(path)

    def cp_file(self, path1: str, path2: str, **_kwargs: Any) -> None:
        """Refuse to make a file; what is there already can be written to."""
        self.pipe_file(path2, self.cat_file(path1))

    # Paths.

    def _follow(self, path: str) -> str:
        """Return the tree's path of what is meant, every link followed."""
        return self.tree.realpath(_tree_path(self._strip_protocol(path)), BACKGROUND_CONTEXT)

    def _own(self, path: str) -> str:
        """Return the tree's path of the name itself; links before it are followed."""
        return self._last_unfollowed(_tree_path(self._strip_protocol(path)))

    def _removable(self, path: str) -> str:
        """Return as `_own`; for a tinker path the checkpoint itself."""
        name = self._strip_protocol(path)
        place = _tree_path(name)
        if _is_tinker_path(name, 3):
            place = posixpath.dirname(place)
        return self._last_unfollowed(place)

    def _last_unfollowed(self, place: str) -> str:
        directory, name = posixpath.split(place)
        return posixpath.join(self.tree.realpath(directory, BACKGROUND_CONTEXT), name)

    def _handle(self, path: str, flags: int) -> Handle:
        try:
            place = self._follow(path)
        except OSError as error:
            if flags == os.O_RDONLY or not errors.is_missing(error):
                raise
            self.tree.create(self._own(path), BACKGROUND_CONTEXT)
            raise
        return self.tree.open(place, flags, BACKGROUND_CONTEXT)


class TinkerFile(AbstractBufferedFile):  # type: ignore[misc]
    """One open file; a control's value is handed over whole when it is closed."""

    def __init__(
        self, fs: TinkerFileSystem, path: str, handle: Handle, mode: str, **kwargs: Any
    ) -> None:
        self._handle = handle
        self._opened_by = os.getpid()
        size = _size(handle) if mode == "rb" else None
        super().__init__(fs, path, mode, size=size, **kwargs)

    def _fetch_range(self, start: int, end: int) -> bytes:
        if self._opened_by != os.getpid():
            # What a parent opened has locks and connections that its threads may have held.
            self._opened_by = os.getpid()
            self._handle = self.fs.reopened(self.path, self._handle)
        return self._handle.read(end - start, start, BACKGROUND_CONTEXT)

    def _upload_chunk(self, final: bool = False) -> bool:
        value = self.buffer.getvalue()
        if final and value:
            self._handle.write(value, BACKGROUND_CONTEXT)
        return final

    def _initiate_upload(self) -> None:
        pass

    def close(self) -> None:
        """Hand over what was written, and let go of the file."""
        was_closed = self.closed
        super().close()
        if not was_closed and self._opened_by == os.getpid():
            self._handle.close()


def _is_tinker_path(name: str, length: int) -> bool:
    """Return whether a name without its protocol begins one, with as many parts."""
    parts = name.strip("/").split("/")
    return len(parts) == length and parts[0] not in ROOT.static_children and parts[1] in KINDS


def _tree_path(name: str) -> str:
    """Return the tree's path for a name without its protocol: its own, or a tinker path's."""
    run_id, *rest = name.strip("/").split("/")
    if not run_id or run_id in ROOT.static_children:
        return f"/{name}"
    if not rest or rest[0] not in KINDS:
        return posixpath.join("/runs", run_id, *rest)
    kind, *below = rest
    checkpoints = f"/runs/{run_id}/checkpoints/{kind}"
    if not below:
        return checkpoints
    return posixpath.join(checkpoints, below[0], "files", *below[1:])


def _size(handle: Handle) -> int:
    """Return the length of a file that was opened to be read."""
    size_bytes = handle.size_bytes
    assert size_bytes is not None
    return size_bytes


def _info(name: str, attr: Attr) -> dict[str, Any]:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}
    kind = kinds[stat.S_IFMT(attr.mode)]
    return {
        "name": name,
        "size": attr.size_bytes,
        "type": kind,
        "mode": attr.mode,
        "mtime": attr.mtime_ns / 1e9,
        "created": attr.mtime_ns / 1e9,
        "ino": attr.ino,
        "nlink": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "islink": kind == "link",
    }


def _close(stack: ExitStack, opened_by: int) -> None:
    """Close what this very process opened: what a fork inherits is its parent's."""
    if os.getpid() == opened_by:
        stack.close()
