"""Locks on single bytes of a file: between processes, and between handles of one process.

Open file description locks (fcntl(2)): unlike flock(2) one file has as many as it has numbers, and
unlike POSIX locks they are not lost when another handle of the process is closed. The kernel frees
them when the handle goes, however the process ends.
"""

import fcntl
import os
import struct
import time

_POLL_S = 0.02


class ByteRangeLocks:
    """The locks that one handle of a file holds. Thread-safe, as long as no byte has two owners.

    Args:
        fd: open for reading and writing; closed by `close`, which frees all locks.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def acquire(self, byte: int, *, is_shared: bool = False, timeout_s: float = 0.0) -> bool:
        """Lock a byte, and return whether that was possible within `patience_s` seconds.

        Raises:
            OSError: this file system has no such locks.
        """
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                self._set(fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK, byte)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody has it
                if time.monotonic() >= give_up:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    def release(self, byte: int) -> None:
        """Free a byte."""
        self._set(fcntl.F_UNLCK, byte)

    def is_linked(self) -> bool:
        """Tell whether the file still has its name."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Free all bytes."""
        os.close(self._fd)

    def _set(self, kind: int, byte: int) -> None:
        # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks)
        fcntl.fcntl(
            self._fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
        )
