"""The directory of a cached file, and its locks against eviction and second downloads."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tinkerfs import errors
from tinkerfs.cache.about import write_about
from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.cache.data_files import open_replacing

#: Wait at most this long for the lock of a file that another process is removing, seconds.
_OPEN_TIMEOUT_S = 2.0


class FileLocks:
    """Creates and locks the directory of one file. Thread-safe.

    Args:
        directory: path of the directory.
        about: content of its `about` file.
        may_create: whether the directory may be created.
        has_locks: whether the file system has locks that end with their process.
        report: receives errors, which only make reads slower.
    """

    def __init__(
        self,
        directory: str,
        about: bytes,
        report: Callable[[OSError], None],
        *,
        may_create: bool,
        has_locks: bool,
    ) -> None:
        self._directory = directory
        self._about = about
        self._report = report
        self._may_create = may_create
        self._has_locks = has_locks
        self._lock = threading.Lock()
        # Replaced under _lock after another process removed the directory. A thread that holds a
        # lock on units in the old file continues with that, so all of them stay open until `close`.
        self._locks: ByteRangeLocks | None = None
        self._open_locks: list[ByteRangeLocks] = []
        if os.path.isdir(directory):
            self.ensure()

    def close(self) -> None:
        """Release all locks."""
        with self._lock:
            for locks in self._open_locks:
                locks.close()
            self._open_locks.clear()
            self._locks = None

    def ensure(self) -> None:
        """Create the directory and lock it against eviction, if that is possible."""
        with self._lock:
            if not self._may_create and not os.path.isdir(self._directory):
                return
            try:
                if not self._has_locks:
                    _make_private(self._directory)
                elif self._locks is None or not self._locks.is_linked():
                    self._locks = self._open()
                    self._open_locks.append(self._locks)
            except OSError as error:
                self._report(error)
            with suppress(OSError):
                write_about(self._directory, self._about)

    @contextmanager
    def lock_units(self, units: range, timeout_s: float) -> Iterator[bool]:
        """Lock units against downloads by other processes; see `BlockFile.lock_units`."""
        byte, locks = 1 + units.start, self._locks
        is_locked, is_free = False, True
        try:
            if locks is not None:
                is_locked = is_free = locks.acquire(byte, count=len(units), timeout_s=timeout_s)
        except OSError as error:
            self._report(error)
        try:
            yield is_free
        finally:
            if is_locked and locks is not None:
                with suppress(OSError):  # closed in the meantime, which also released the lock
                    locks.release(byte, len(units))

    def _open(self) -> ByteRangeLocks:
        while True:
            _make_private(self._directory)
            locks = ByteRangeLocks(open_replacing(f"{self._directory}/lock", os.O_RDWR))
            try:
                is_locked = locks.acquire(0, is_shared=True, timeout_s=_OPEN_TIMEOUT_S)
                if is_locked and not locks.is_linked():  # another process removed the directory
                    locks.close()
                    continue
            except OSError as error:
                locks.close()
                raise errors.not_lockable(error) from None
            return locks


def _make_private(directory: str) -> None:
    """Create a directory and its parents with mode 0700."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_private(os.path.dirname(directory))
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
