"""Locks on single bytes of a file, between processes and descriptors.

They are open file description locks (fcntl(2)). Unlike flock(2), one file has as many locks as it
has offsets. Unlike POSIX locks, they are not lost when another descriptor of the process is
closed. The kernel releases them with the descriptor, however the process ends.
"""

import fcntl
import os
import struct
import time

_POLL_S = 0.02

#: struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks).
_FLOCK = "@hhqqi4x"


class ByteRangeLocks:
    """The locks of one open file; each byte may be used by one thread at a time.

    Args:
        fd: open for reading and writing; owned by this object, which closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def acquire(self, byte: int, *, is_shared: bool = False, timeout_s: float = 0.0) -> bool:
        """Lock a byte; return whether that was possible within `timeout_s` seconds.

        Raises:
            OSError: the file system does not support these locks.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._set(fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK, byte)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: locked by another one
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    def release(self, byte: int) -> None:
        """Unlock a byte."""
        self._set(fcntl.F_UNLCK, byte)

    def is_locked(self, byte: int) -> bool:
        """Return whether a byte is locked through another open file; lock nothing.

        Raises:
            OSError: the file system does not support these locks.
        """
        query = _flock(fcntl.F_WRLCK, byte)
        kind: int = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, query))[0]
        return kind != fcntl.F_UNLCK

    def is_linked(self) -> bool:
        """Return whether the file still has a name."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Close the file and release all locks."""
        os.close(self._fd)

    def _set(self, kind: int, byte: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(kind, byte))


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
