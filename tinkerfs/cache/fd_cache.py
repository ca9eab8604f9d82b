"""Descriptors of blocks that were just read, so that the next read need not open them.

To open, check and close a block is most of what a read of 4 KiB would take in the process. But who
holds a descriptor holds the disk space of what was removed, so each is let go of soon.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tinkerfs.concurrency import run_in_thread

#: How long a generation lasts, seconds, and how many it holds at the most; two are kept at a time,
#: which take a quarter of the descriptors that the process may have.
GENERATION_S = 1.0
MAX_FDS = 256
_SHARE = 8

#: A read that fails rather than wait for the disk (Linux, preadv2(2)); 0 where there is none.
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

#: Makes what is entered while something is waited for.
BlockingSection = Callable[[], AbstractContextManager[object]]


class CachedFd:
    """An open file, closed with the last reference to this: nobody reads by a number used anew."""

    __slots__ = ("_mtime_ns", "_size_bytes", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._mtime_ns = self._size_bytes = -1

    def mark_intact(self, status: os.stat_result) -> None:
        """Take note that its content is sound while the file is as `status` says."""
        self._mtime_ns, self._size_bytes = status.st_mtime_ns, status.st_size

    def is_intact(self) -> bool:
        """Tell whether it was found sound, and was neither written to nor removed since.

        Raises:
            OSError: the file system fails.
        """
        status = os.fstat(self.fd)
        is_same = status.st_mtime_ns == self._mtime_ns and status.st_size == self._size_bytes
        return is_same and status.st_nlink > 0

    def __del__(self) -> None:
        """Close it."""
        os.close(self.fd)


class FdCache:
    """Descriptors by file and block; none for more than 2 s after it was last kept.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced and changed under _lock; looked into without.
        self._current: dict[tuple[str, int], CachedFd] = {}
        self._previous: dict[tuple[str, int], CachedFd] = {}
        self._is_swept = False
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = (
            MAX_FDS if allowed == resource.RLIM_INFINITY else min(MAX_FDS, allowed // _SHARE)
        )
        #: Whether the file system says so where it would have to wait for the disk.
        self._supports_nowait = bool(_RWF_NOWAIT)

    def recent(self, key: tuple[str, int]) -> CachedFd | None:
        """Return what was kept of a block within the last second."""
        return self._current.get(key)

    def get(self, key: tuple[str, int]) -> CachedFd | None:
        """Return what is kept of a block; to be kept again by who goes on with it."""
        return self._current.get(key) or self._previous.get(key)

    def keep(self, key: tuple[str, int], descriptor: CachedFd) -> None:
        """Keep a descriptor for a while, in place of another one of the same block."""
        aged: object = None  # closed when this returns, and so without the lock
        with self._lock:
            if key not in self._current and len(self._current) >= self._most:
                aged = self._rotate()
            self._current[key] = descriptor
            if self._is_swept:
                return
            self._is_swept = True
        try:
            run_in_thread(self._sweep, "descriptors of blocks")
        except RuntimeError:  # there can be no more threads: then nothing is kept
            with self._lock:
                self._is_swept = False
                self._current, self._previous = {}, {}
        del aged

    def drop(self, file: str) -> None:
        """Let go of those of a file."""
        with self._lock:
            for kept in (self._current, self._previous):
                for key in [key for key in kept if key[0] == file]:
                    del kept[key]

    def read(
        self, descriptor: CachedFd, buffer: memoryview, start: int, waiting: BlockingSection
    ) -> bool:
        """Fill `buffer` from `start` on, and return whether there was enough.

        Args:
            descriptor: of a file.
            buffer: of bytes.
            start: within the file.
            waiting: entered while the disk is waited for.

        Raises:
            OSError: it cannot be read.
        """
        fd = descriptor.fd
        if not self._supports_nowait:
            return os.preadv(fd, (buffer,), start) == len(buffer)
        try:
            if os.preadv(fd, (buffer,), start, _RWF_NOWAIT) == len(buffer):
                return True
        except BlockingIOError:
            pass  # none of it is in memory
        except OSError:  # it cannot tell, as tmpfs, or it cannot read
            self._supports_nowait = False
        with waiting():
            return os.preadv(fd, (buffer,), start) == len(buffer)

    def _rotate(self) -> object:
        aged, self._previous, self._current = self._previous, self._current, {}
        return aged

    def _sweep(self) -> None:
        """Let generations pass until nothing is kept; runs on a thread of its own."""
        while True:
            time.sleep(GENERATION_S)
            with self._lock:
                aged = self._rotate()
                is_over = not self._previous
                self._is_swept = not is_over
            del aged
            if is_over:
                return
