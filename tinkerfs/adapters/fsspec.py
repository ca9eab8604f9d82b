"""The file system as an fsspec implementation: `tinker://runs/<run_id>/...`.

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
from tinkerfs.adapters.compose import compose
from tinkerfs.call import IN_PROCESS
from tinkerfs.settings import DEFAULT_BASE_URL, Settings
from tinkerfs.tree.filesystem import FileSystem
from tinkerfs.tree.node import Attr, Handle

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
        self._lock = threading.Lock()
        # Guarded by _lock: what is open, and the process that opened it.
        self._filesystem = filesystem
        self._opened_by = os.getpid()
        self._is_given = filesystem is not None

    @property
    def tree(self) -> FileSystem:
        """The file system behind, opened when first wanted."""
        with self._lock:
            is_inherited = self._opened_by != os.getpid() and not self._is_given
            if self._filesystem is None or is_inherited:
                stack = ExitStack()
                self._filesystem = stack.enter_context(compose(self._settings)).filesystem
                self._opened_by = os.getpid()
                weakref.finalize(self, _close, stack, self._opened_by)
            return self._filesystem

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return [p.lstrip("/") for p in stripped] if isinstance(path, list) else stripped.lstrip("/")

    # Looking.

    def ls(self, path: str, detail: bool = True, **_kwargs: Any) -> list[Any]:
        """List a folder; of a link what it is itself, of a file that file."""
        name = self._strip_protocol(path)
        place = self._follow(name)
        if not stat.S_ISDIR(self.tree.stat(place, IN_PROCESS).mode):
            return [self.info(name)] if detail else [name]
        entries = self.tree.listdir(place, IN_PROCESS)
        if not detail:
            return [posixpath.join(name, entry.name) for entry in entries]
        return [
            _info(
                posixpath.join(name, entry.name),
                entry.attr or self.tree.stat(posixpath.join(place, entry.name), IN_PROCESS),
            )
            for entry in entries
        ]

    def info(self, path: str, **_kwargs: Any) -> dict[str, Any]:
        """Return what stat tells; links are followed, and told by `islink`."""
        name = self._strip_protocol(path)
        info = _info(name, self.tree.stat(self._follow(name), IN_PROCESS))
        own = self.tree.stat(self._own(name), IN_PROCESS)
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
        if path is None and self._filesystem is not None:
            self.tree.open(_REFRESH, os.O_WRONLY, IN_PROCESS).write(b"1", IN_PROCESS)

    # Reading and writing.

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_kwargs: Any
    ) -> bytes:
        """Return the bytes of [start, end); negative ones count from the end."""
        handle = self._handle(path, os.O_RDONLY)
        try:
            first, last, _step = slice(start, end).indices(_size(handle))
            return handle.read(max(last - first, 0), first, IN_PROCESS)
        finally:
            handle.close()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_kwargs: Any) -> None:
        """Write one whole value to a control file."""
        if mode == "create":
            self.tree.create(self._own(path), IN_PROCESS)
        self._handle(path, os.O_WRONLY).write(value, IN_PROCESS)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "TinkerFile":
        if "x" in mode:
            self.tree.create(self._own(path), IN_PROCESS)
        is_read = mode == "rb"
        handle = self._handle(path, os.O_RDONLY if is_read else os.O_WRONLY)
        # Where in the file a value is written says nothing: appending is writing.
        return TinkerFile(self, path, handle, "rb" if is_read else "wb", **kwargs)

    # Removing: the rules are the mount's, and the caller is this process's group.

    def rm_file(self, path: str) -> None:
        """Hide a generated file of a checkpoint's folder, until that is removed or a minute on."""
        self.tree.unlink(self._own(path), IN_PROCESS)

    def rmdir(self, path: str) -> None:
        """Remove a folder that shows nothing any more: of a checkpoint, delete the checkpoint."""
        self.tree.rmdir(self._own(path), IN_PROCESS)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, or with `recursive` checkpoints; the first refusal ends it."""
        del maxdepth  # part of a checkpoint cannot be removed
        # A name that is there is meant as it stands, whatever pattern it might be.
        is_name = isinstance(path, str) and self.exists(path)
        for name in [path] if is_name else self.expand_path(path):
            self._remove(self._own(name), recursive=recursive)

    def _remove(self, path: str, *, recursive: bool) -> None:
        if stat.S_ISDIR(self.tree.stat(path, IN_PROCESS).mode):
            if not recursive:
                raise errors.is_a_directory(path)
            for entry in self.tree.listdir(path, IN_PROCESS):
                self._remove(posixpath.join(path, entry.name), recursive=True)
            self.tree.rmdir(path, IN_PROCESS)
        else:
            self.tree.unlink(path, IN_PROCESS)

    # Refusing.

    def mkdir(self, path: str, create_parents: bool = True, **_kwargs: Any) -> None:
        """Refuse."""
        del create_parents
        self.tree.create(self._own(path), IN_PROCESS)

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
        return self.tree.follow(f"/{self._strip_protocol(path)}", IN_PROCESS)

    def _own(self, path: str) -> str:
        """Return the tree's path of the name itself; links before it are followed."""
        folder, name = posixpath.split(f"/{self._strip_protocol(path)}")
        return posixpath.join(self._follow(folder), name)

    def _handle(self, path: str, flags: int) -> Handle:
        try:
            place = self._follow(path)
        except OSError as error:
            if flags == os.O_RDONLY or not errors.is_missing(error):
                raise
            self.tree.create(self._own(path), IN_PROCESS)
            raise
        return self.tree.open(place, flags, IN_PROCESS)


class TinkerFile(AbstractBufferedFile):  # type: ignore[misc]
    """One open file; a control's value is handed over whole when it is closed."""

    def __init__(
        self, fs: TinkerFileSystem, path: str, handle: Handle, mode: str, **kwargs: Any
    ) -> None:
        self._handle = handle
        size = _size(handle) if mode == "rb" else None
        super().__init__(fs, path, mode, size=size, **kwargs)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._handle.read(end - start, start, IN_PROCESS)

    def _upload_chunk(self, final: bool = False) -> bool:
        value = self.buffer.getvalue()
        if final and value:
            self._handle.write(value, IN_PROCESS)
        return final

    def _initiate_upload(self) -> None:
        pass

    def close(self) -> None:
        """Hand over what was written, and let go of the file."""
        was_closed = self.closed
        super().close()
        if not was_closed:
            self._handle.close()


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
