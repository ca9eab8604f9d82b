"""Locks on bytes of a file, between processes and descriptors.

They are open file description locks (fcntl(2)). Unlike flock(2), one file has as many locks as it
has offsets. Unlike POSIX locks, they are not lost when another descriptor of the process is
closed. The kernel releases them with the descriptor, however the process ends.
"""

import fcntl
import os
import time

from tinkerfs import errors, operating_system

#: Interval of the first attempts, and the longest one, seconds. On a network file system each
#: attempt is a request to its server.
_POLL_S, _MAX_POLL_S = 0.02, 0.2


class ByteRangeLocks:
    """The locks of one open file; each byte may be used by one thread at a time.

    Args:
        fd: open for reading and writing; owned by this object, which closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def acquire(
        self, byte: int, *, count: int = 1, is_shared: bool = False, timeout_s: float = 0.0
    ) -> bool:
        """Lock `count` bytes; return whether that was possible within `timeout_s` seconds.

        Raises:
            OSError: the file system or the operating system does not support these locks.
        """
        deadline, poll_s = time.monotonic() + timeout_s, _POLL_S
        while True:
            try:
                kind = fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK
                operating_system.lock_bytes(self._fd, kind, byte, count)
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: locked by another one
                if time.monotonic() >= deadline:
                    return False
                time.sleep(poll_s)
                poll_s = min(1.25 * poll_s, _MAX_POLL_S)
            else:
                return True

    def release(self, byte: int, count: int = 1) -> None:
        """Unlock `count` bytes."""
        operating_system.lock_bytes(self._fd, fcntl.F_UNLCK, byte, count)

    def is_locked(self, byte: int) -> bool:
        """Return whether a byte is locked through another open file; lock nothing.

        Raises:
            OSError: as `acquire`.
        """
        return operating_system.is_byte_locked(self._fd, byte)

    def is_linked(self) -> bool:
        """Return whether the file still has a name."""
        try:
            return os.fstat(self._fd).st_nlink > 0
        except OSError as error:
            if errors.is_stale(error):  # removed by another host
                return False
            raise

    def close(self) -> None:
        """Close the file and release all locks."""
        os.close(self._fd)
