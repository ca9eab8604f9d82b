"""Values that the file system returns: attributes, directory entries, handles.

This module depends neither on the API client nor on FUSE.
"""

import hashlib
import stat
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from tinkerfs.context import RequestContext

#: The unit of `st_blocks`, which does not depend on the file system's block size (stat(2)).
_BLOCK_BYTES: Final = 512

#: The rank of directories in `inode_for_path`.
DIRECTORY_RANK: Final = 1
_HASH_BITS: Final = ((1 << 61) - 1) & ~(7 << 29)

#: Number of entries that precede the children of a directory in a listing: `.` and `..`.
DOT_ENTRY_COUNT: Final = 2


# These are msgspec structs, which are faster to create than frozen dataclasses and are not tracked
# by the garbage collector. A tree walk creates several of them per name.


class Attr(msgspec.Struct, frozen=True, gc=False):
    """File attributes, as returned by stat().

    Attributes:
        mode: file type and permission bits, as in st_mode.
        size_bytes: length of a file, or an upper bound if the length is known only after open();
            for a checkpoint's directory, the number of bytes that the server stores.
        mtime_ns: nanoseconds since 1970.
        ino: inode number, the same for the same path in every mount.
        nlink: number of hard links; 1 for a directory whose subdirectories are not counted.
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
        """Return the storage in units of 512 bytes.

        tar(1), cp(1) and backup tools treat a non-empty file without blocks as a hole and store
        zeros. A symbolic link has no blocks, as on ext4, which stores short targets in the inode.
        """
        return 0 if stat.S_ISLNK(self.mode) else -(-self.size_bytes // _BLOCK_BYTES)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One directory entry.

    Attributes:
        name: file name, with non-UTF-8 bytes as surrogate escapes.
        ino: as `Attr.ino`.
        mode: at least the file type bits.
        attr: None if the attributes are unavailable without a request.
        target: result of readlink() for a symbolic link that has `attr`.
    """

    name: str
    ino: int
    mode: int
    attr: Attr | None
    target: str | None = None


class StatFs(msgspec.Struct, frozen=True, gc=False):
    """Size and free space of the block cache, as shown by df(1)."""

    total_bytes: int
    free_bytes: int


class Handle(Protocol):
    """One open file. Thread-safe; reads are positional."""

    @property
    def path(self) -> str:
        """The path by which the file was opened."""
        ...

    @property
    def direct_io(self) -> bool:
        """Whether reads must bypass the kernel's page cache and its cached file size."""
        ...

    @property
    def keep_cache(self) -> bool:
        """Whether the kernel's cached pages of this path are still valid."""
        ...

    @property
    def size_hint_reported_at(self) -> float | None:
        """When stat() last reported an upper bound as the size; None if it did not.

        The time is on the machine's monotonic clock. A caller that cached that size must discard
        it before reading.
        """
        ...

    @property
    def backing_fd(self) -> Callable[[RequestContext], int | None] | None:
        """Returns a new descriptor of a local file with the same bytes, if there is one.

        None for files that never have one. The caller closes the descriptor.
        """
        ...

    @property
    def size_bytes(self) -> int | None:
        """The exact length of the file; None until the content has been read."""
        ...

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end of the file."""
        ...

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return their number."""
        ...

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Act on one whole value; return len(data)."""
        ...

    def close(self) -> None:
        """Release the file; no other method may be called afterwards."""
        ...


def dot_entries(path: str) -> tuple[Entry, Entry]:
    """Return the entries `.` and `..` of a directory, without attributes."""
    parent = path.rpartition("/")[0] or "/"
    return (
        Entry(".", inode_for_path(path), stat.S_IFDIR, None),
        Entry("..", inode_for_path(parent), stat.S_IFDIR, None),
    )


def inode_for_path(path: str, rank: int = DIRECTORY_RANK) -> int:
    """Return a stable inode number for a path: a rank and 58 bits of a hash.

    The number is never 0 or 1 (FUSE's root). coreutils copies a directory in the order of inode
    numbers, and GIO lists it in that order. GIO compares the lower 32 bits as signed numbers, so
    the rank is also stored at the top of these.

    Args:
        path: from the mount's root.
        rank: 0 to 3; a lower rank sorts first.
    """
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    number = max(int.from_bytes(digest, "big") & _HASH_BITS, 2)
    return number | rank << 61 | rank << 29


def relative_target(target: str, link: str) -> str:
    """Return a target relative to the directory of a link; both paths are absolute."""
    levels_up, last_common_slash = link.count("/") - 1, 0
    if link[1:2] != target[1:2]:  # nearly all links of a view
        return "../" * levels_up + target[1:]
    for index, (a, b) in enumerate(zip(link, target, strict=False)):
        if a != b:
            break
        if a == "/":
            last_common_slash, levels_up = index, levels_up - (index > 0)
    return "../" * levels_up + target[last_common_slash + 1 :]
