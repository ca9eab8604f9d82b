"""What the tree gives to its adapters: attributes, entries, handles.

Plain values and one protocol; nothing here knows the API, HTTP or FUSE.
"""

import hashlib
import stat
from typing import Final, Protocol

import msgspec

from tinkerfs.context import RequestContext

#: Bytes of one block of `st_blocks`, whatever a file system's own blocks are (stat(2)).
_BLOCK_BYTES: Final = 512

#: Of a folder's inode number, see `inode`.
FOLDER_RANK: Final = 1
_HASH_BITS: Final = ((1 << 61) - 1) & ~(7 << 29)

#: `.` and `..` come before what a folder holds, where they are listed.
DOT_ENTRY_COUNT: Final = 2


# msgspec's structs: made in 0.2 us where a frozen dataclass of this size takes 1.5 us, without a
# header for the garbage collector; a walk makes several for each name that it comes to.


class Attr(msgspec.Struct, frozen=True, gc=False):
    """What stat returns.

    Attributes:
        mode: file type and permission bits, as in st_mode.
        size_bytes: a file's length, an upper bound where only opening can tell; of a checkpoint's
            directory what the server stores.
        mtime_ns: nanoseconds since 1970.
        ino: inode number, the same for the same path in every mount.
        nlink: hard links; 1 for a folder whose subfolders are not counted.
        uid: owner.
        gid: group.
    """

    mode: int
    size_bytes: int
    mtime_ns: int
    ino: int
    nlink: int
    uid: int
    gid: int

    @property
    def blocks(self) -> int:
        """Return the 512-byte units of storage.

        A file with bytes and without blocks is a hole to tar(1), cp(1) and backup tools: they store
        zeros. A symbolic link has none, as on ext4, where short targets lie in the inode.
        """
        return 0 if stat.S_ISLNK(self.mode) else -(-self.size_bytes // _BLOCK_BYTES)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One name in a listing.

    Attributes:
        name: the file name; bytes that are no UTF-8 as surrogate escapes.
        ino: as `Attr.ino`.
        mode: at least the file type bits.
        attr: its attributes, None where telling them would cost a call.
        target: of a symbolic link that has attributes, as `readlink` tells it.
    """

    name: str
    ino: int
    mode: int
    attr: Attr | None
    target: str | None = None


class StatFs(msgspec.Struct, frozen=True, gc=False):
    """What df shows, bytes."""

    total_bytes: int
    free_bytes: int


class Handle(Protocol):
    """One open file. Thread-safe; reads are positional."""

    @property
    def direct_io(self) -> bool:
        """Whether the kernel must neither cache the bytes nor trust the size it was told."""
        ...

    @property
    def keep_cache(self) -> bool:
        """Whether the bytes that the kernel has kept of this path are still the same."""
        ...

    @property
    def size_hint_reported_at(self) -> float | None:
        """When somebody was last told a size that was a mere bound; None where nobody was.

        On the machine's monotonic clock. Who remembers that size must forget it before they read.
        """
        ...

    @property
    def size_bytes(self) -> int | None:
        """The file's exact length, None while nothing was read."""
        ...

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the file's end."""
        ...

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer of bytes with those from `offset` on, and return how many there are."""
        ...

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Act on one whole value; return len(data)."""
        ...

    def close(self) -> None:
        """Let go of it; no other method is called after."""
        ...


def dot_entries(path: str) -> tuple[Entry, Entry]:
    """Return the entries `.` and `..` of a folder, without attributes."""
    parent = path.rpartition("/")[0] or "/"
    return (
        Entry(".", inode_for_path(path), stat.S_IFDIR, None),
        Entry("..", inode_for_path(parent), stat.S_IFDIR, None),
    )


def inode_for_path(path: str, rank: int = FOLDER_RANK) -> int:
    """Return the inode number of a path, never 0 or 1 (FUSE's root): 58 bits of a hash, and a rank.

    coreutils copies, and GIO lists, a directory in the order of the numbers. GIO compares their
    lower 32 bits as signed numbers, so the rank stands at the top of these as well.

    Args:
        path: from the mount's root.
        rank: 0 to 3; what has a lower one comes first.
    """
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    number = max(int.from_bytes(digest, "big") & _HASH_BITS, 2)
    return number | rank << 61 | rank << 29
