"""A small file system in memory with the interface of `tinkerfs.vfs.filesystem.FileSystem`.

For tests of the adapters alone: it can hang on purpose, and knows nothing of Tinker.

    /hello              "hello\\n"
    /control            writable; holds what was last written; "bad" is EINVAL
    /folder/<0000...>   as many small files as asked for
    /folder/costly      listed without attributes
    /many               the same without that, and a link, kept while `epoch` is the same
    /slow/read-<any>    opens at once, reads wait for ever
    /slow/open-<any>    opens wait for ever; so do stats of stat-<any>, listings of list-<any>/
    /cached-<bytes>     that many bytes through the page cache; reads wait for ever past `slow_from`
    /broken             reading raises what is no OSError
    /link               -> folder/0000
    /removable          may be unlinked
    /\\xff              a name that is no UTF-8
"""

import os
import stat
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

from tinkerfs import errors
from tinkerfs.context import RequestContext, Validity
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
    control: bytes = b"0\n"
    removed: set[str] = field(default_factory=set)
    stats: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: What was told holds until this is another number; of 0 not at all.
    epoch: int = 0
    local_mutations: int = 0
    #: Of folders, by path.
    listings: dict[str, CachedDirectory] = field(default_factory=dict)
    #: Told of what the adapter does without asking here.
    guard: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            on_open=lambda *_call: None, on_readlink=lambda *_call: None
        )
    )

    def is_valid(self, lease: Validity, epoch: int) -> bool:
        return bool(epoch) and epoch == self.epoch and lease.check_and_touch(0.0)

    def cached_directory(self, path: str) -> CachedDirectory | None:
        listing = self.listings.get(path)
        return listing if listing and self.is_valid(listing.lease, listing.epoch) else None

    def data(self, path: str) -> bytes:
        name = path.rpartition("/")[2]
        if path == "/control":
            return self.control
        if name.startswith("cached-slow"):
            return bytes(1 << 20)
        if name.startswith("cached-"):
            return bytes(range(256)) * (int(name.removeprefix("cached-")) // 256)
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

    def has(self, folder: str, name: str) -> bool:
        if folder == "/folder":  # thousands of them
            return name == "costly" or (len(name) == 4 and name.isdigit() and int(name) < self.many)
        return folder == "/slow" or name in (self.names(folder) or ())

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

    def fstat(self, path: str, handle: MemoryHandle, ctx: RequestContext) -> Attr:
        # Also of a file that was unlinked since.
        data = self.data(path)
        return Attr(stat.S_IFREG | 0o644, len(data), MTIME_NS, inode_for_path(path), 1, 0, 0)

    def scandir(self, path: str, ctx: RequestContext) -> DirectoryStream:
        if path.startswith("/slow/list-"):
            ctx.wait_for(NEVER)
        names = self.names(path)
        if names is None:
            raise errors.not_a_directory(path)
        known = self.cached_directory(path)
        if known is not None:
            return DirectoryStream(known.entries, listing=known)
        entries = []
        for name in names:
            attr = self.attr(f"{path.rstrip('/')}/{name}")
            target = self.readlink(name, ctx) if stat.S_ISLNK(attr.mode) else None
            entries.append(
                Entry(name, attr.ino, attr.mode, None if name == "costly" else attr, target)
            )
        if path == "/many":
            self.listings[path] = CachedDirectory(tuple(entries), Validity(), self.epoch)
        return DirectoryStream(entries)

    def readlink(self, path: str, ctx: RequestContext) -> str:
        return "folder/0000"

    def open(self, path: str, flags: int, ctx: RequestContext) -> MemoryHandle:
        self.attr(path)
        name = path.rpartition("/")[2]
        if name.startswith("open-"):
            ctx.wait_for(NEVER)
        if flags & os.O_ACCMODE != os.O_RDONLY and path != "/control":
            raise errors.not_permitted(path, "not writable")
        return MemoryHandle(self, path, not name.startswith("cached-"))

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
