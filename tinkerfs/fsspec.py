"""fsspec implementation of the file system: `tinker://runs/<run_id>/...`.

A tinker path, `tinker://<run_id>/<kind>/<name>`, is the directory of that checkpoint's files, and
removing it removes the checkpoint. `tinker://<run_id>` is the run.

Made for pandas, pyarrow, dask and similar libraries on systems without FUSE. The file system is
synchronous, so that no event loop has to survive a fork. Symbolic links are followed like in a
kernel. Listings show them as links, so that no recursive operation reaches files that are
expensive for the server.

The instances of a process with the same settings share one client and its caches. The API key is
not an option, so it is in no pickle, token or cache name: each process reads it itself.

Errors are `OSError`s with the errno of a mount. Thread-safe; a forked child opens its own client.
"""

import os
import posixpath
import stat
import threading
import weakref
from contextlib import ExitStack
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
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

#: Options of every fsspec file system; `AbstractFileSystem` describes them.
_COMMON_OPTIONS: Final = frozenset(
    {"asynchronous", "listings_expiry_time", "loop", "max_paths", "use_listings_cache"}
)


class _OpenFileSystem:
    """An open file system of one process, which closes it after the last use."""

    def __init__(self, settings: Settings) -> None:
        stack = ExitStack()
        self.filesystem = stack.enter_context(open_app(settings)).filesystem
        self.pid = os.getpid()
        weakref.finalize(self, _close, stack, self.pid)


class _OpenFileSystems:
    """The open file systems of this process by their settings. Thread-safe.

    fsspec creates an instance per thread. They share a file system, so that they also share its
    caches and its limit of concurrent requests.
    """

    def __init__(self) -> None:
        self._start()
        #: A child never closes what its parent has opened.
        self._inherited: list[list[_OpenFileSystem]] = []
        os.register_at_fork(after_in_child=self._on_fork)

    def get(self, settings: Settings) -> _OpenFileSystem:
        """Return the file system for some settings, opened if none is open.

        Raises:
            StartupError: the settings cannot be used.
        """
        with self._lock:
            found = self._by_settings.get(settings)
            if found is None:
                found = self._by_settings[settings] = _OpenFileSystem(settings)
        return found

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._by_settings: weakref.WeakValueDictionary[Settings, _OpenFileSystem] = (
            weakref.WeakValueDictionary()
        )

    def _on_fork(self) -> None:
        # A thread of the parent may have held the lock.
        self._inherited.append(list(self._by_settings.values()))
        self._start()


_open_file_systems = _OpenFileSystems()


class TinkerFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The files of the account of `TINKER_API_KEY`, or of a key from another source.

    Args:
        base_url: URL of the API; None for `TINKER_BASE_URL`, or else the official service.
        settings: fields of `Settings` that differ from the defaults.
        filesystem: an open file system to use instead of the other arguments.
    """

    protocol = "tinker"

    def __init__(
        self,
        base_url: str | None = None,
        settings: dict[str, Any] | None = None,
        filesystem: FileSystem | None = None,
        **common_options: Any,
    ) -> None:
        unknown = sorted(common_options.keys() - _COMMON_OPTIONS)
        if unknown:  # not the value, which may be a key
            raise ValueError(
                f"unknown option {unknown[0]!r} (valid options: base_url, settings; hint: the key"
                " is read from TINKER_API_KEY or the stored login, and is not an option)"
            )
        super().__init__(**common_options)
        url = base_url or os.environ.get("TINKER_BASE_URL") or DEFAULT_BASE_URL
        self._settings = _settings({"base_url": url.rstrip("/"), **(settings or {})})
        self._given = filesystem
        self._open_file_system: _OpenFileSystem | None = None

    @property
    def filesystem(self) -> FileSystem:
        """The underlying file system; each process opens its own on first use."""
        if self._given is not None:
            return self._given
        current = self._open_file_system
        if current is None or current.pid != os.getpid():
            current = self._open_file_system = _open_file_systems.get(self._settings)
        return current.filesystem

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        return [p.lstrip("/") for p in stripped] if isinstance(path, list) else stripped.lstrip("/")

    # Listings and attributes.

    def ls(self, path: str, detail: bool = True, **_kwargs: Any) -> list[Any]:
        """List a directory without following the links in it; list a file as itself."""
        name = self._strip_protocol(path)
        tree_path = self._follow(name)
        # Each name in `<run_id>/<kind>` is a tinker path, and so a link to files.
        has_links = _is_tinker_path(name, 2)
        if not stat.S_ISDIR(self.filesystem.stat(tree_path, BACKGROUND_CONTEXT).mode):
            return [self.info(name)] if detail else [name]
        entries = self.filesystem.listdir(tree_path, BACKGROUND_CONTEXT)
        if not detail:
            return [posixpath.join(name, entry.name) for entry in entries]
        infos = [
            _info(
                posixpath.join(name, entry.name),
                entry.attr
                or self.filesystem.stat(posixpath.join(tree_path, entry.name), BACKGROUND_CONTEXT),
            )
            for entry in entries
        ]
        return [{**info, "type": "link", "islink": True} for info in infos] if has_links else infos

    def info(self, path: str, **_kwargs: Any) -> dict[str, Any]:
        """Return the attributes of a file; links are followed, and marked by `islink`."""
        name = self._strip_protocol(path)
        info = _info(name, self.filesystem.stat(self._follow(name), BACKGROUND_CONTEXT))
        own = self.filesystem.stat(self._follow_parents_of(name), BACKGROUND_CONTEXT)
        info["islink"] = stat.S_ISLNK(own.mode)
        return info

    def created(self, path: str) -> datetime:
        """Return the same time as `modified`: a checkpoint's saving."""
        return self.modified(path)

    def modified(self, path: str) -> datetime:
        """Return the modification time: a run's last request, or a checkpoint's saving."""
        return datetime.fromtimestamp(self.info(path)["mtime"], UTC)

    def expand_path(
        self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any
    ) -> list[str]:
        """Expand paths like fsspec; a recursion does not follow links, like `cp -r`."""
        named = super().expand_path(path, recursive=False, **kwargs)
        if not recursive:
            return named  # type: ignore[no-any-return]
        found = super().expand_path(path, recursive=True, maxdepth=maxdepth, **kwargs)
        return [p for p in found if p in named or not self._reads_link(p)]

    def _reads_link(self, path: str) -> bool:
        """Return whether a path is a link, and read it as `cp -r` does.

        The deletion guard distinguishes a copy and a removal from a removal by the links.
        """
        tree_path = self._follow_parents_of(path)
        if not stat.S_ISLNK(self.filesystem.stat(tree_path, BACKGROUND_CONTEXT).mode):
            return False
        self.filesystem.readlink(tree_path, BACKGROUND_CONTEXT)
        return True

    def du(
        self,
        path: str,
        total: bool = True,
        maxdepth: int | None = None,
        withdirs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the lengths of the files below a path, without following links in it."""
        found = self.find(path, maxdepth, withdirs, detail=True, **kwargs)
        sizes = {name: (info or self.info(name))["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    def sign(self, path: str, expiration: int = 100, **_kwargs: Any) -> str:
        """Return a signed URL of a checkpoint's archive.

        Args:
            path: the tinker path of the checkpoint, its directory, or its `archive.tar`.
            expiration: ignored; the server chooses how long the URL is valid.
        """
        del expiration
        directory = self._removable(self._strip_protocol(path).removesuffix("/archive.tar"))
        return self.cat_file(posixpath.join(directory, "archive_url")).decode().strip()

    def invalidate_cache(self, path: str | None = None) -> None:
        """Drop every cached entry; does nothing for a single path."""
        is_open = self._given is not None or self._open_file_system is not None
        if path is None and is_open:
            self.filesystem.open(_REFRESH, os.O_WRONLY, BACKGROUND_CONTEXT).write(
                b"1", BACKGROUND_CONTEXT
            )

    # Reading and writing.

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_kwargs: Any
    ) -> bytes:
        """Return the bytes [start, end) of a file; negative offsets count from the end."""
        handle = self._handle(path, os.O_RDONLY)
        try:
            first, last, _step = slice(start, end).indices(_size(handle))
            return handle.read(max(last - first, 0), first, BACKGROUND_CONTEXT)
        finally:
            handle.close()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_kwargs: Any) -> None:
        """Write a complete value to a control file."""
        if mode == "create":
            self.filesystem.create(self._follow_parents_of(path), BACKGROUND_CONTEXT)
        self._handle(path, os.O_WRONLY).write(value, BACKGROUND_CONTEXT)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "TinkerFile":
        if "x" in mode:
            self.filesystem.create(self._follow_parents_of(path), BACKGROUND_CONTEXT)
        is_read = mode == "rb"
        handle = self._handle(path, os.O_RDONLY if is_read else os.O_WRONLY)
        # The offset of a write to a control file is ignored, so appending is the same as writing.
        return TinkerFile(self, path, handle, "rb" if is_read else "wb", **kwargs)

    def reopened(self, path: str, before: Handle) -> Handle:
        """Return a new handle for a file that the parent process had opened.

        Raises:
            OSError: ESTALE if the length has changed, or the error of opening the file.
        """
        handle = self._handle(path, os.O_RDONLY)
        if handle.size_bytes != before.size_bytes:
            handle.close()
            raise errors.stale(path, "the file was changed after another process had opened it")
        return handle

    # Removal: with the rules of the mount, where the caller is the process group.

    def rm_file(self, path: str) -> None:
        """Hide a generated file of a checkpoint for a minute, or until its removal."""
        self.filesystem.unlink(self._follow_parents_of(path), BACKGROUND_CONTEXT)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory; for a checkpoint's directory, delete the checkpoint."""
        self.filesystem.rmdir(self._removable(path), BACKGROUND_CONTEXT)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, or checkpoints if `recursive`; the first error stops the removal."""
        del maxdepth  # a part of a checkpoint cannot be removed
        # An existing name is not a pattern, even if it looks like one.
        is_name = isinstance(path, str) and self.exists(path)
        for name in [path] if is_name else self.expand_path(path):
            self._remove(self._removable(name), recursive=recursive)

    def _remove(self, path: str, *, recursive: bool) -> None:
        if stat.S_ISDIR(self.filesystem.stat(path, BACKGROUND_CONTEXT).mode):
            if not recursive:
                raise errors.is_a_directory(path)
            for entry in self.filesystem.listdir(path, BACKGROUND_CONTEXT):
                self._remove(posixpath.join(path, entry.name), recursive=True)
            self.filesystem.rmdir(path, BACKGROUND_CONTEXT)
        else:
            self.filesystem.unlink(path, BACKGROUND_CONTEXT)

    # Unsupported operations.

    def mkdir(self, path: str, create_parents: bool = True, **_kwargs: Any) -> None:
        """Raise the error of the mount: no directories can be created."""
        del create_parents
        self.filesystem.create(self._follow_parents_of(path), BACKGROUND_CONTEXT)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Raise the error of `mkdir`, unless the directory exists and `exist_ok` is set."""
        if not (exist_ok and self.isdir(path)):
            self.mkdir(path)

    def cp_file(self, path1: str, path2: str, **_kwargs: Any) -> None:
        """Write the content of a file to a control file; no new file can be created."""
        self.pipe_file(path2, self.cat_file(path1))

    # Paths.

    def _follow(self, path: str) -> str:
        """Return the path in the tree with every link followed."""
        return self.filesystem.realpath(_tree_path(self._strip_protocol(path)), BACKGROUND_CONTEXT)

    def _follow_parents_of(self, path: str) -> str:
        """Return the path in the tree with every link followed except the last component."""
        return self._follow_parents(_tree_path(self._strip_protocol(path)))

    def _removable(self, path: str) -> str:
        """Return `_follow_parents_of`; for a tinker path, the path of the checkpoint."""
        name = self._strip_protocol(path)
        tree_path = _tree_path(name)
        if _is_tinker_path(name, 3):
            tree_path = posixpath.dirname(tree_path)
        return self._follow_parents(tree_path)

    def _follow_parents(self, tree_path: str) -> str:
        directory, name = posixpath.split(tree_path)
        return posixpath.join(self.filesystem.realpath(directory, BACKGROUND_CONTEXT), name)

    def _handle(self, path: str, flags: int) -> Handle:
        try:
            tree_path = self._follow(path)
        except OSError as error:
            if flags == os.O_RDONLY or not errors.is_missing(error):
                raise
            self.filesystem.create(self._follow_parents_of(path), BACKGROUND_CONTEXT)
            raise
        return self.filesystem.open(tree_path, flags, BACKGROUND_CONTEXT)


class TinkerFile(AbstractBufferedFile):  # type: ignore[misc]
    """An open file; a control file's value is written as a whole by `close`.

    Within a transaction of fsspec it is written when the transaction completes.
    """

    def __init__(
        self, fs: TinkerFileSystem, path: str, handle: Handle, mode: str, **kwargs: Any
    ) -> None:
        self._handle = handle
        self._opened_by = os.getpid()
        self._value = b""
        # fsspec's caches and pickles pass the length that they know, which may be a size hint.
        kwargs["size"] = _size(handle) if mode == "rb" else None
        super().__init__(fs, path, mode, **kwargs)

    def _fetch_range(self, start: int, end: int) -> bytes:
        if self._opened_by != os.getpid():
            # A thread of the parent may have held the handle's locks and connections.
            self._opened_by = os.getpid()
            self._handle = self.fs.reopened(self.path, self._handle)
        return self._handle.read(end - start, start, BACKGROUND_CONTEXT)

    def _upload_chunk(self, final: bool = False) -> bool:
        if final:
            self._value = self.buffer.getvalue()
            if self.autocommit:
                self.commit()
        return final

    def commit(self) -> None:
        """Write the value of a control file."""
        if self._value:
            self.fs.pipe_file(self.path, self._value)

    def discard(self) -> None:
        """Drop the value of a transaction that failed."""
        self._value = b""

    def _initiate_upload(self) -> None:
        pass

    def close(self) -> None:
        """Write the value of a control file, and close the file."""
        was_closed = self.closed
        super().close()
        if not was_closed and self._opened_by == os.getpid():
            self._handle.close()


def _settings(values: dict[str, Any]) -> Settings:
    """Return validated settings.

    Raises:
        ValueError: a setting is unknown or has another type.
    """
    known = [field.name for field in fields(Settings)]
    unknown = sorted(values.keys() - {*known})
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} (valid settings: {', '.join(known)})")
    return msgspec.convert(values, Settings)


def _is_tinker_path(name: str, length: int) -> bool:
    """Return whether a name is the start of a tinker path, of `length` parts."""
    parts = name.strip("/").split("/")
    return len(parts) == length and parts[0] not in ROOT.static_children and parts[1] in KINDS


def _tree_path(name: str) -> str:
    """Return the path in the tree for a name, which may be a tinker path."""
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
    """Return the length of a file that was opened for reading."""
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
    """Close the file system if this process opened it, and not its parent."""
    if os.getpid() == opened_by:
        stack.close()
