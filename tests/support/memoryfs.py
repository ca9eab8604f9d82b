"""A small in-memory file system with the interface of `tinkerfs.vfs.filesystem.FileSystem`.

For tests of the FUSE layer: it can hang on purpose, and does not depend on Tinker.

    /hello              "hello\\n"
    /control            writable; has the last written value; "bad" is EINVAL
    /folder/<0000...>   `many` small files
    /folder/costly      listed without attributes
    /many               the same without that and with a link, cached per `generation`
    /slow/read-<any>    opens immediately, reads hang
    /slow/stuck-<any>   the same, but outside a blocking section: the worker is lost
    /slow/open-<any>    opens hang; so do stats of stat-<any> and listings of list-<any>/
    /backed             zeros, as long as the file `backing`, which the kernel may read instead;
                        without it while the control is "cached", and unbuffered for "direct"
    /cached-<bytes>     that many bytes through the page cache; reads hang beyond `slow_from`
    /broken             reading raises an exception that is not an OSError
    /link               -> folder/0000
    /removable          may be unlinked
    /\\xff              a non-UTF-8 name
"""

import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.validity import Validity
from tinkerfs.vfs.directory_cache import CachedDirectory
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.node import Attr, Entry, StatFs, inode_for_path

NEVER: "Future[bytes]" = Future()
MTIME_NS = 1_700_000_000_123_456_789


@dataclass
class MemoryHandle:
    fs: "MemoryFileSystem"
    path: str
    direct_io: bool = True
    size_hint_reported_at: float | None = None
    backing_fd: Callable[[RequestContext], int | None] | None = None

    @property
    def keep_cache(self) -> bool:
        return not self.direct_io

    def close(self) -> None:
        pass

    @property
    def size_bytes(self) -> int | None:
        return len(self.fs.data(self.path))

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        name = self.path.rpartition("/")[2]
        if name.startswith("read-"):
            return ctx.wait_for(NEVER)
        if name.startswith("stuck-"):
            threading.Event().wait()
        if name == "broken":
            raise ZeroDivisionError("on purpose")
        if name.startswith("cached-slow"):
            return ctx.wait_for(NEVER)
        return self.fs.data(self.path)[offset : offset + size]

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        data = self.read(len(buffer), offset, ctx)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        if self.path != "/control":
            raise errors.bad_handle(self.path, "not writable")
        if data.strip() == b"bad":
            raise errors.invalid(self.path, "bad")
        self.fs.control = data
        return len(data)


@dataclass
class MemoryFileSystem:
    many: int = 10
    read_only: bool = False
    backing: str = "/dev/null"
    control: bytes = b"0\n"
    removed: set[str] = field(default_factory=set)
    stats: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: Validity of cached results ends when this number changes; 0 disables caching.
    generation: int = 0
    local_mutation_count: int = 0
    #: Listings of directories by path.
    listings: dict[str, CachedDirectory] = field(default_factory=dict)
    #: Notified of operations that the FUSE layer serves from its caches.
    guard: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            on_open=lambda *_call: None, on_readlink=lambda *_call: None
        )
    )

    def __post_init__(self) -> None:
        self.backing_bytes = os.stat(self.backing).st_size  # the file may be removed later

    def check_and_touch(self, validity: Validity, generation: int) -> bool:
        return bool(generation) and generation == self.generation and validity.check_and_touch(0.0)

    def cached_directory(self, path: str) -> CachedDirectory | None:
        listing = self.listings.get(path)
        return (
            listing
            if listing and self.check_and_touch(listing.validity, listing.generation)
            else None
        )

    def data(self, path: str) -> bytes:
        name = path.rpartition("/")[2]
        if path == "/control":
            return self.control
        if name.startswith("cached-slow"):
            return bytes(1 << 20)
        if name.startswith("cached-"):
            return bytes(range(256)) * (int(name.removeprefix("cached-")) // 256)
        if path == "/backed":
            return bytes(self.backing_bytes)
        if path == "/stats":
            with self.lock:
                return "".join(f"{line}\n" for line in self.stats).encode("utf-8", "replace")
        return b"hello\n"

    def names(self, path: str) -> list[str] | None:
        if path == "/":
            names = [
                "hello",
                "control",
                "folder",
                "many",
                "slow",
                "cached-1048576",
                "backed",
                "cached-slow",
                "broken",
            ]
            names += ["link", "removable", "empty", "stats", "\udcff"]
        elif path == "/folder":
            names = ["costly", *(f"{i:04}" for i in range(self.many))]
        elif path == "/many":
            names = ["link", *(f"{i:04}" for i in range(self.many))]
        elif path == "/slow":
            names = []
        elif path == "/empty" or path.startswith("/slow/list-"):
            return []
        else:
            return None
        return [name for name in names if f"{path.rstrip('/')}/{name}" not in self.removed]

    def has(self, directory: str, name: str) -> bool:
        if directory == "/folder":  # thousands of them
            return name == "costly" or (len(name) == 4 and name.isdigit() and int(name) < self.many)
        return directory == "/slow" or name in (self.names(directory) or ())

    def attr(self, path: str) -> Attr:
        names = self.names(path)
        parent, _, name = path.rpartition("/")
        if name == "link":
            mode, size = stat.S_IFLNK | 0o777, len("folder/0000")
        elif names is not None and path not in self.removed:
            mode, size = stat.S_IFDIR | 0o755, 0
        elif self.has(parent or "/", name):
            mode, size = stat.S_IFREG | 0o644, len(self.data(path))
        else:
            raise errors.not_found(path)
        return Attr(mode, size, MTIME_NS, inode_for_path(path), 1, os.getuid(), os.getgid())

    def stat(self, path: str, ctx: RequestContext) -> Attr:
        with self.lock:
            self.stats.append(path)
        if path.startswith("/slow/stat-"):
            ctx.wait_for(NEVER)
        if path == "/control":
            ctx.mark_uncacheable()
        return self.attr(path)

    def fstat(self, handle: MemoryHandle, ctx: RequestContext) -> Attr:
        # Works also after the file was unlinked.
        length, ino = len(self.data(handle.path)), inode_for_path(handle.path)
        return Attr(stat.S_IFREG | 0o644, length, MTIME_NS, ino, 1, 0, 0)

    def scandir(self, path: str, ctx: RequestContext) -> DirectoryStream:
        if path.startswith("/slow/list-"):
            ctx.wait_for(NEVER)
        names = self.names(path)
        if names is None:
            raise errors.not_a_directory(path)
        known = self.cached_directory(path)
        if known is not None:
            return DirectoryStream(known.entries)
        entries = []
        for name in names:
            attr = self.attr(f"{path.rstrip('/')}/{name}")
            target = self.readlink(name, ctx) if stat.S_ISLNK(attr.mode) else None
            entries.append(
                Entry(name, attr.ino, attr.mode, None if name == "costly" else attr, target)
            )
        if path == "/many":
            self.listings[path] = CachedDirectory(tuple(entries), Validity(), self.generation)
        return DirectoryStream(source=lambda: iter(entries))

    def readlink(self, path: str, ctx: RequestContext) -> str:
        return "folder/0000"

    def open(self, path: str, flags: int, ctx: RequestContext) -> MemoryHandle:
        self.attr(path)
        name = path.rpartition("/")[2]
        if name.startswith("open-"):
            ctx.wait_for(NEVER)
        if flags & os.O_ACCMODE != os.O_RDONLY and path != "/control":
            raise errors.not_permitted(path, "not writable")
        if path == "/backed":
            return MemoryHandle(self, path, self.control == b"direct", backing_fd=self.backing_fd)
        return MemoryHandle(self, path, not name.startswith("cached-"))

    def backing_fd(self, _ctx: RequestContext) -> int | None:
        return None if self.control == b"cached" else os.open(self.backing, os.O_RDONLY)

    def truncate(self, path: str, size: int, ctx: RequestContext) -> None:
        self.setattr(path, ctx)

    def setattr(self, path: str, ctx: RequestContext) -> None:
        if path != "/control":
            raise errors.not_permitted(path, "not writable")

    def create(self, path: str, ctx: RequestContext) -> None:
        raise errors.not_permitted(path, f"nothing is made here by uid {ctx.caller().uid}")

    def unlink(self, path: str, ctx: RequestContext) -> None:
        if path != "/removable":
            raise errors.not_permitted(path, "stays")
        self.removed.add(path)

    def rmdir(self, path: str, ctx: RequestContext) -> None:
        if path != "/empty":
            raise errors.not_empty(path, "not empty")
        self.removed.add(path)

    def statfs(self) -> StatFs:
        return StatFs(1 << 30, 1 << 29)
