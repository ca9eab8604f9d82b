"""Cache of file descriptors of blocks that were just read.

Opening, verifying and closing a block is most of the cost of a small read. But an open descriptor
keeps the disk space of a removed block, so each one is closed soon after its last use.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tinkerfs.concurrency import run_in_thread

#: Lifetime of a generation of descriptors, seconds. Two generations exist at a time.
GENERATION_S = 1.0

#: Maximum number of descriptors in a generation. Both generations together use at most a quarter
#: of the descriptors that the process may have.
MAX_FDS = 256
_FD_LIMIT_SHARE = 8

#: Flag for a read that fails instead of waiting for the disk (preadv2(2)); 0 if unsupported.
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

#: Returns a context manager that is entered during a wait.
BlockingSection = Callable[[], AbstractContextManager[object]]


class CachedFd:
    """An open file, which is closed with the last reference to this object.

    So no reader can use a descriptor number that was closed and assigned again.
    """

    __slots__ = ("_mtime_ns", "_size_bytes", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._mtime_ns = self._size_bytes = -1

    def mark_intact(self, status: os.stat_result) -> None:
        """Record that the content was verified while the file had this status."""
        self._mtime_ns, self._size_bytes = status.st_mtime_ns, status.st_size

    def is_intact(self) -> bool:
        """Return whether the content was verified, and neither changed nor removed since.

        Raises:
            OSError: the status of the file cannot be read.
        """
        status = os.fstat(self.fd)
        is_same = status.st_mtime_ns == self._mtime_ns and status.st_size == self._size_bytes
        return is_same and status.st_nlink > 0

    def __del__(self) -> None:
        """Close the file."""
        os.close(self.fd)


class FdCache:
    """Descriptors by file and block, closed soon after their last `keep`.

    A descriptor is closed within two generations. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced and changed under _lock; read without it.
        self._current: dict[tuple[str, int], CachedFd] = {}
        self._previous: dict[tuple[str, int], CachedFd] = {}
        self._has_sweeper = False
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_fds = (
            MAX_FDS
            if allowed == resource.RLIM_INFINITY
            else min(MAX_FDS, allowed // _FD_LIMIT_SHARE)
        )
        #: Whether the file system supports reads with RWF_NOWAIT.
        self._supports_nowait = bool(_RWF_NOWAIT)

    def recent(self, key: tuple[str, int]) -> CachedFd | None:
        """Return the descriptor of a block if it was kept within the last second."""
        return self._current.get(key)

    def get(self, key: tuple[str, int]) -> CachedFd | None:
        """Return the descriptor of a block; a caller that uses it calls `keep` again."""
        return self._current.get(key) or self._previous.get(key)

    def keep(self, key: tuple[str, int], fd: CachedFd) -> None:
        """Cache a descriptor for a while, replacing another one of the same block."""
        expired: object = None  # closed when this method returns, after the lock is released
        with self._lock:
            if key not in self._current and len(self._current) >= self._max_fds:
                expired = self._rotate()
            self._current[key] = fd
            if self._has_sweeper:
                return
            self._has_sweeper = True
        try:
            run_in_thread(self._sweep, "descriptors of blocks")
        except RuntimeError:  # no more threads can be started, so nothing is cached
            with self._lock:
                self._has_sweeper = False
                self._current, self._previous = {}, {}
        del expired

    def drop(self, file: str) -> None:
        """Remove the descriptors of a file."""
        with self._lock:
            for generation in (self._current, self._previous):
                for key in [key for key in generation if key[0] == file]:
                    del generation[key]

    def read(
        self, cached_fd: CachedFd, buffer: memoryview, start: int, blocking: BlockingSection
    ) -> bool:
        """Fill `buffer` from offset `start`, and return whether the file was long enough.

        `blocking` is entered only if the data is not in the page cache.

        Raises:
            OSError: the file cannot be read.
        """
        fd = cached_fd.fd
        if not self._supports_nowait:
            return os.preadv(fd, (buffer,), start) == len(buffer)
        try:
            if os.preadv(fd, (buffer,), start, _RWF_NOWAIT) == len(buffer):
                return True
        except BlockingIOError:
            pass  # none of the data is in the page cache
        except OSError:  # RWF_NOWAIT is unsupported, e.g. on tmpfs, or the read fails
            self._supports_nowait = False
        with blocking():
            return os.preadv(fd, (buffer,), start) == len(buffer)

    def _rotate(self) -> object:
        expired, self._previous, self._current = self._previous, self._current, {}
        return expired

    def _sweep(self) -> None:
        """Rotate the generations until both are empty; runs in a thread of its own."""
        while True:
            time.sleep(GENERATION_S)
            with self._lock:
                expired = self._rotate()
                is_over = not self._previous
                self._has_sweeper = not is_over
            del expired
            if is_over:
                return
