"""Writer of a cached block: data and checksum in a temporary file.

A killed process leaves no partial block under a block's name. The checksum detects later
corruption on disk.
"""

import os
import secrets
from contextlib import suppress

from xxhash import xxh3_64

from tinkerfs import errors
from tinkerfs.safe_open import open_regular

#: Precedes the digest at the end of a block; another file format has another magic.
_MAGIC = b"tkfsblk3"

#: XXH3 of 64 bits: detects corruption, and is an order of magnitude faster than CRC-32 or SHA-256.
_CHECKSUM_BYTES = 8

#: Size of a block's file beyond the data.
TRAILER_BYTES = len(_MAGIC) + _CHECKSUM_BYTES

#: Size of the chunks that are written and verified; one fits into the processor's cache.
_CHUNK_BYTES = 256 << 10

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL


class BlockWriter:
    """Writes one block; used by one thread, which must close it in any case.

    Args:
        directory: directory of the file in the cache.
        name: name of the file; part of the checksum.
        index: block index; part of the checksum.

    Raises:
        OSError: the temporary file cannot be created: FileNotFoundError if there is no directory.
    """

    def __init__(self, directory: str, name: str, index: int) -> None:
        # A process id would not be unique: processes in containers often have the same one.
        self._path = f"{directory}/.{index}.{secrets.token_hex(8)}"
        self._fd = open_regular(self._path, _FLAGS)
        self._checksum = _checksum_of(name, index)
        self._size_bytes = 0
        self._is_renamed = False

    def write(self, data: bytes | memoryview) -> None:
        """Append data to the block.

        Raises:
            OSError: the disk rejects the data; `read_back` still returns the data before it.
        """
        with memoryview(data) as view:
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                self._checksum.update(chunk)
                _write_all(self._fd, chunk)
        self._size_bytes += len(data)

    def read_back(self) -> bytes:
        """Return all data that was written.

        Raises:
            OSError: the temporary file cannot be read.
        """
        data = os.pread(self._fd, self._size_bytes, 0)
        if len(data) < self._size_bytes:
            raise errors.corrupt(self._path, "the temporary file of a block was truncated")
        return data

    def commit(self, path: str, now_ns: int) -> os.stat_result:
        """Write the checksum, rename the file to `path`, and return its status.

        Args:
            path: replaced if it exists.
            now_ns: access time, nanoseconds since 1970.

        Raises:
            OSError: the file is not renamed: FileNotFoundError if the directory was removed.
        """
        _write_all(self._fd, memoryview(_trailer(self._checksum)))
        os.utime(self._fd, ns=(now_ns, now_ns))
        status = os.fstat(self._fd)
        # On NFS the first `close` reports a failed write.
        os.close(os.dup(self._fd))
        os.rename(self._path, path)
        self._is_renamed = True
        return status

    def close(self) -> None:
        """Close the file, and remove it unless it was committed. To be called once."""
        with suppress(OSError):
            os.close(self._fd)
        if not self._is_renamed:
            with suppress(OSError):
                os.unlink(self._path)


def is_intact(fd: int, name: str, index: int) -> bool:
    """Return whether the checksum of an open block, or of its start, matches.

    Raises:
        OSError: the block cannot be read.
    """
    end = os.fstat(fd).st_size - TRAILER_BYTES
    if end < 0:
        return False
    checksum = _checksum_of(name, index)
    for start in range(0, end, _CHUNK_BYTES):
        checksum.update(os.pread(fd, min(_CHUNK_BYTES, end - start), start))
    return os.pread(fd, TRAILER_BYTES, end) == _trailer(checksum)


def _checksum_of(name: str, index: int) -> xxh3_64:
    """Return a new checksum that is seeded with the identity of the block."""
    return xxh3_64(f"{name}/{index}:".encode())


def _trailer(checksum: xxh3_64) -> bytes:
    return _MAGIC + checksum.digest()


def _write_all(fd: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(fd, rest) :]
