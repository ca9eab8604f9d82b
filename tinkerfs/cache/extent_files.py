"""Files with units of a block in a directory that many hosts share.

    <first>-<stop>      the units [first, stop) of the remote file, all within one block
    used                its modification time is that of the last use
    .new-<random>       an extent that is being written
    about, lock         as in `block_cache`

An extent is written beside and renamed, and never changed afterwards. So it needs no lock, and what
a network file system caches of it stays true. The clock of the server sets all times, because the
clocks of the hosts may differ.

A file begins with a header: the length of the data and its checksum, which is seeded with the
identity of the units. Whatever does not match counts as absent.
"""

import os
import re
import secrets
import struct
from contextlib import suppress
from typing import Final, NamedTuple

from xxhash import xxh3_64

from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES, UNITS_PER_BLOCK
from tinkerfs.safe_open import open_regular

USED: Final = "used"

#: Length of the data, and its XXH3.
_HEADER: Final = struct.Struct("<8sQQ")
_MAGIC: Final = b"tinkerfs"
HEADER_BYTES: Final = _HEADER.size

_NAME: Final = re.compile("(0|[1-9][0-9]{0,12})-([1-9][0-9]{0,12})", re.ASCII)
_NEW: Final = ".new-"

#: A file that was not renamed for this time was left by a process that died, nanoseconds.
_ABANDONED_NS: Final = 3_600 * 10**9


class Extent(NamedTuple):
    """The units [first, stop) of one block."""

    first: int
    stop: int

    @property
    def block(self) -> int:
        """The index of the block."""
        return self.first // UNITS_PER_BLOCK

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.first}-{self.stop}"

    def expected_bytes(self, end: int) -> int:
        """Return the length of the data, if the block ends at offset `end` or after it."""
        return min(self.stop * UNIT_BYTES, end) - self.first * UNIT_BYTES


def extent_of(name: str) -> Extent | None:
    """Return the extent in the file of a name; None for another file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    extent = Extent(int(match[1]), int(match[2]))
    is_valid = extent.first < extent.stop <= (extent.block + 1) * UNITS_PER_BLOCK
    return extent if is_valid else None


def list_extents(directory: str) -> set[Extent]:
    """Return the extents in a directory; none if it does not exist.

    Raises:
        OSError: the directory cannot be read.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return set()
    return {extent for name in names if (extent := extent_of(name)) is not None}


def read_extent(directory: str, name: str, extent: Extent, owner: int) -> bytes | None:
    """Return the data of an extent; None if it is not intact.

    Args:
        directory: path of the directory.
        name: identifies the remote file.
        owner: user id of whoever may have written it.

    Raises:
        OSError: ENOENT or ESTALE if it was evicted; another if it cannot be read.
    """
    with open(open_regular(f"{directory}/{extent.name}", os.O_RDONLY), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_uid != owner:
            raise errors.not_permitted(directory, "the file belongs to another user")
        # One byte more, so that a longer file does not match.
        data = bytearray(HEADER_BYTES + BLOCK_BYTES + 1)
        size_bytes = 0
        while count := file.readinto(memoryview(data)[size_bytes:]):
            size_bytes += count
    if size_bytes < HEADER_BYTES:
        return None
    magic, length, checksum = _HEADER.unpack_from(data)
    content = bytes(memoryview(data)[HEADER_BYTES:size_bytes])
    is_intact = (
        magic == _MAGIC
        and length == len(content)
        and checksum == _checksum(name, extent, content)
        and (extent.stop - 1) * UNIT_BYTES < extent.first * UNIT_BYTES + length
        and length <= (extent.stop - extent.first) * UNIT_BYTES
    )
    return content if is_intact else None


def write_extent(directory: str, name: str, extent: Extent, data: bytes) -> None:
    """Store an extent; `read_extent` of any host then returns it.

    A host that crashes before the data has reached the server leaves a file that is not intact.

    Raises:
        OSError: the file cannot be written; ENOENT if the directory does not exist.
    """
    temporary = f"{directory}/{_NEW}{secrets.token_hex(8)}"
    fd = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            header = _HEADER.pack(_MAGIC, len(data), _checksum(name, extent, data))
            rest = [memoryview(header), memoryview(data)]
            while rest:
                written = os.writev(fd, rest)
                while rest and written >= len(rest[0]):
                    written -= len(rest.pop(0))
                if rest:
                    rest[0] = rest[0][written:]
        finally:
            os.close(fd)  # on NFS this reports what the server rejects
        os.rename(temporary, f"{directory}/{extent.name}")
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def mark_used(directory: str) -> None:
    """Set the time of the last use, by the clock of the server.

    Raises:
        OSError: it cannot be set.
    """
    path = f"{directory}/{USED}"
    os.close(open_regular(path, os.O_WRONLY | os.O_CREAT))
    os.utime(path)


def remove_abandoned(directory: str) -> None:
    """Remove extents that were not completed, after `mark_used`.

    Raises:
        OSError: the directory cannot be read.
    """
    now_ns = os.stat(f"{directory}/{USED}").st_mtime_ns
    for name in os.listdir(directory):
        if name.startswith(_NEW):
            with suppress(OSError):
                if now_ns - os.lstat(f"{directory}/{name}").st_mtime_ns > _ABANDONED_NS:
                    os.unlink(f"{directory}/{name}")


def _checksum(name: str, extent: Extent, data: bytes) -> int:
    checksum = xxh3_64(f"{name}/{extent.name}:".encode())
    checksum.update(data)
    return checksum.intdigest()
