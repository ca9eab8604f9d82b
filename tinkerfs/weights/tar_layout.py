"""Lay out a tar over separate files (pure).

The tar is deterministic: the same names, sizes and times make the same bytes. It equals what the
standard library writes in pax format: a header of 512 bytes for each file, and extended headers
only for names or sizes that need them.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from functools import lru_cache

from tinkerfs.weights.extents import Extent, ExtentMap, OwnBytes, Range, Zeros
from tinkerfs.weights.tar_index import Member
from tinkerfs.weights.virtual_file import Layout

#: The end of an archive: two blocks of zeros (POSIX, pax, "ustar Interchange Format").
_END_BYTES = 2 * tarfile.BLOCKSIZE
#: Maximum number of layouts in memory: the size of an open archive is requested repeatedly.
_MAX_LAYOUTS = 8


@lru_cache(maxsize=_MAX_LAYOUTS)
def tar_layout(members: tuple[Member, ...]) -> Layout:
    """Return the layout of a tar of files.

    The source is the bytes of all members, one after the other. A member has the mode 0644, the
    user and group 0, and its time in whole seconds.
    """
    extents = ExtentMap(_extents(members))
    headers = hashlib.blake2b(digest_size=16)
    for member in members:
        headers.update(_header(member))
    return Layout(extents, f"tar {headers.hexdigest()}")


def _extents(members: tuple[Member, ...]) -> Iterator[Extent]:
    start, offset = 0, 0
    for member in members:
        header = _header(member)
        padding_bytes = -member.size_bytes % tarfile.BLOCKSIZE
        yield OwnBytes(header)
        yield Range(start, member.size_bytes)
        yield Zeros(padding_bytes)
        start += member.size_bytes
        offset += len(header) + member.size_bytes + padding_bytes
    yield Zeros(_END_BYTES + -(offset + _END_BYTES) % tarfile.RECORDSIZE)


def _header(member: Member) -> bytes:
    info = tarfile.TarInfo(_encodable(member.name))
    info.size = member.size_bytes
    info.mtime = member.mtime_ns // 1_000_000_000
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _encodable(name: str) -> str:
    """Return a name with each lone surrogate that is not a byte as its bytes."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    return name
