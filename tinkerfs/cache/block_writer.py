"""A block as a file: its bytes, then a checksum of them; written beside, renamed when it is whole.

So a process that is killed leaves no half block under a name, and what the disk does to a block
later its checksum tells.
"""

import os
import secrets
from contextlib import suppress

from xxhash import xxh3_64

from tinkerfs import errors
from tinkerfs.safe_open import open_regular

#: Before the digest at a block's end; another layout has another one.
_MAGIC = b"tkfsblk3"

#: XXH3 of 64 bits: what a disk does to a block it finds out. 47 GB/s here, a CRC-32 of zlib 3,
#: which was an eighth of all that a cold read takes the processor; a SHA-256 2.
_CHECKSUM_BYTES = 8

#: What a block takes beyond its data.
TRAILER_BYTES = len(_MAGIC) + _CHECKSUM_BYTES

#: Written and checked at a time: what stays in the processor's cache takes a third of the time.
_PIECE_BYTES = 256 << 10

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL


class BlockWriter:
    """A block on its way to disk. One thread's; to be closed, whatever came of it.

    Args:
        folder: of the cache, where the block will be.
        name: of the file that it is of.
        index: which block.

    Raises:
        OSError: it cannot be begun: FileNotFoundError where there is no such folder.
    """

    def __init__(self, folder: str, name: str, index: int) -> None:
        # Not by the process's number: in containers that is often the same one.
        self._path = f"{folder}/.{index}.{secrets.token_hex(8)}"
        self._fd = open_regular(self._path, _FLAGS)
        self._checksum = _checksum_of(name, index)
        self._size_bytes = 0
        self._is_renamed = False

    def write(self, data: bytes | memoryview) -> None:
        """Add to it.

        Raises:
            OSError: the disk does not take it; what was added before can be had from `written`.
        """
        with memoryview(data) as view:
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                self._checksum.update(piece)
                _write_all(self._fd, piece)
        self._size_bytes += len(data)

    def read_back(self) -> bytes:
        """Return all that was added.

        Raises:
            OSError: it cannot be read.
        """
        data = os.pread(self._fd, self._size_bytes, 0)
        if len(data) < self._size_bytes:
            raise errors.corrupt(self._path, "a block on its way to disk is shorter than it was")
        return data

    def commit(self, path: str, now_ns: int) -> os.stat_result:
        """Give it its name, and return what it is as a file.

        Args:
            path: replaced where it exists.
            now_ns: the time that it was last used, nanoseconds since 1970.

        Raises:
            OSError: it has no name: FileNotFoundError where the folder was removed.
        """
        _write_all(self._fd, memoryview(_trailer(self._checksum)))
        os.utime(self._fd, ns=(now_ns, now_ns))
        status = os.fstat(self._fd)
        # Where the disk is elsewhere (NFS) the first `close` tells what it did not take.
        os.close(os.dup(self._fd))
        os.rename(self._path, path)
        self._is_renamed = True
        return status

    def close(self) -> None:
        """Let go of it; without a name it is gone. To be called once."""
        with suppress(OSError):
            os.close(self._fd)
        if not self._is_renamed:
            with suppress(OSError):
                os.unlink(self._path)


def is_intact(fd: int, name: str, index: int) -> bool:
    """Tell whether an open block, or its start, is what was written as block `index` of `name`.

    Raises:
        OSError: it cannot be read.
    """
    end = os.fstat(fd).st_size - TRAILER_BYTES
    if end < 0:
        return False
    checksum = _checksum_of(name, index)
    for start in range(0, end, _PIECE_BYTES):
        checksum.update(os.pread(fd, min(_PIECE_BYTES, end - start), start))
    return os.pread(fd, TRAILER_BYTES, end) == _trailer(checksum)


def _checksum_of(name: str, index: int) -> xxh3_64:
    """Begin a checksum that a block has only in its own place."""
    return xxh3_64(f"{name}/{index}:".encode())


def _trailer(checksum: xxh3_64) -> bytes:
    return _MAGIC + checksum.digest()


def _write_all(fd: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(fd, rest) :]
