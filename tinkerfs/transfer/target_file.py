"""Copy weights to files in ordinary directories; resume interrupted copies.

    <directory>/.<name>.<digest>.partial   the start of the file; the digest identifies its version
    <directory>/<name>                     the complete file
    <directory>/.tinkerfs-get              the record of copied files (JSON lines)

A partial file is written in order, and renamed when it is complete. A file under its own name is
therefore always complete. Files of consecutive checkpoints often have the same name and length, so
the record, together with length and mtime, identifies the version of a file. Operations that a file
system does not support (locks, modes, times, flushes) are skipped.
"""

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.operating_system import copy_range
from tinkerfs.safe_open import open_regular
from tinkerfs.transfer.destination import PARTIAL_PATTERN, Destination
from tinkerfs.weights.file import WeightsFile

#: Size of a read and a write.
_CHUNK_BYTES = 1 << 20
#: Maximum size of a copy by the kernel, which no signal interrupts.
_MAX_KERNEL_COPY_BYTES = 64 << 20

#: Maximum length of the name in that of a partial file; file names have at most 255 bytes.
_MAX_NAME_BYTES = 220

_DIGEST_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file that weights are copied to. Not thread-safe.

    Attributes:
        destination: the directory with the record.
        name: the path relative to the destination.
        file: the open content.
        what: distinguishes files of the same version of the same weights.
    """

    destination: Destination
    name: str
    file: WeightsFile
    what: str

    @property
    def path(self) -> str:
        """The path of the complete file, for messages."""
        return os.path.join(self.destination.path, *self._parts)

    def exists(self) -> bool:
        """Return whether a directory entry with its name exists, whatever its type.

        Raises:
            OSError: as `Destination.status`.
        """
        return self.destination.status(self._parts) is not None

    def is_directory(self) -> bool:
        """Return whether its name is that of a directory; see `exists`."""
        status = self.destination.status(self._parts)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def is_complete(self) -> bool:
        """Return whether this version was copied and has not been modified since."""
        with suppress(OSError):
            status = self.destination.status(self._parts)
            if status is not None and status.st_size == self.file.size_bytes:
                line = Destination.line(self.name, self._digest, status)
                return self.destination.has_recorded(line, status)
        return False

    def resumable_bytes(self) -> int:
        """Return how many bytes an interrupted copy of this version has written."""
        with suppress(OSError):
            status = self.destination.status((*self._parts[:-1], self._partial))
            if status is not None and status.st_size <= self.file.size_bytes:
                return status.st_size
        return 0

    def copy(self, mode: int, ctx: RequestContext) -> Iterator[int]:
        """Append the missing bytes to the partial file; rename it when it is complete.

        An existing file with the name is replaced and gets the permission bits `mode`. After an
        error or interruption the partial file stays.

        Yields:
            the number of bytes of each write.

        Raises:
            ApiError: the download fails.
            OSError: as `WeightsFile.read`; EBUSY if another process writes the file; ENOTDIR if a
                parent directory is a symbolic link; errors of the disk.
        """
        with self.destination.open_subdirectory(self._parts[:-1], create=True) as directory_fd:
            self._remove_others(directory_fd)
            partial = self._os_name(self._partial)
            descriptor = self.destination.open_private(partial, directory_fd)
            try:
                self._lock(descriptor, partial, directory_fd)
                yield from self._write_missing(descriptor, ctx)
                _ignoring(lambda: os.fchmod(descriptor, mode), errors.is_attribute_refused)
                times_ns = (self.file.mtime_ns, self.file.mtime_ns)
                _ignoring(lambda: os.utime(descriptor, ns=times_ns), errors.is_attribute_refused)
                _ignoring(lambda: os.fsync(descriptor), errors.is_unsupported)
                name = self._os_name(self._parts[-1])
                self.destination.require_unused(name, directory_fd)
                written = os.fstat(descriptor)
                self.destination.record(self.name, self._digest, written)
                self.destination.rename(partial, name, directory_fd, descriptor)
            except OSError as error:
                error.filename = self.path
                raise
            finally:
                os.close(descriptor)
            # On a file system that cannot set times, closing the file may set its mtime.
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if os.path.samestat(written, status):
                self.destination.record(self.name, self._digest, status)

    @property
    def _parts(self) -> tuple[str, ...]:
        return Destination.local_parts(self.name)

    @property
    def _digest(self) -> str:
        return _digest(f"{self.file.key}\n{self.what}")

    @property
    def _partial(self) -> str:
        """The name of the partial file, which differs for each user."""
        name = self._parts[-1].encode("utf-8", "surrogateescape")
        start = name[:_MAX_NAME_BYTES].decode("utf-8", "surrogateescape")
        return f".{start}.{_digest(f'{self._digest} {os.geteuid()}')}.partial"

    @staticmethod
    def _os_name(name: str) -> str:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))

    def _write_missing(self, descriptor: int, ctx: RequestContext) -> Iterator[int]:
        """Append the missing bytes to the partial file."""
        offset = os.fstat(descriptor).st_size
        if offset > self.file.size_bytes:
            os.ftruncate(descriptor, 0)
            offset = 0
        for size_bytes in self._copy_cached(descriptor, offset, ctx):
            offset += size_bytes
            yield size_bytes
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while offset < self.file.size_bytes:
            size_bytes = self.file.read_into(buffer, offset, ctx)
            if not size_bytes:
                raise errors.corrupt(self.path, "the file is shorter than before")
            rest = buffer[:size_bytes]
            while rest:
                written_bytes = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written_bytes:], offset + written_bytes
            yield size_bytes

    def _copy_cached(self, descriptor: int, offset: int, ctx: RequestContext) -> Iterator[int]:
        """Let the kernel copy a file that is whole in the cache, without a copy if it can.

        The rest is to be read if the file systems do not support it.
        """
        cached = self.file.backing_fd(ctx)
        if cached is None:
            return
        try:
            while offset < self.file.size_bytes:
                size_bytes = min(self.file.size_bytes - offset, _MAX_KERNEL_COPY_BYTES)
                size_bytes = copy_range(cached, descriptor, size_bytes, offset)
                if not size_bytes:
                    return
                offset += size_bytes
                yield size_bytes
        except OSError as error:
            if not (errors.is_unsupported(error) or errors.is_cross_device(error)):
                raise
        finally:
            os.close(cached)

    def _lock(self, descriptor: int, partial: str, directory_fd: int) -> None:
        """Lock the partial file, unless another process has just renamed it.

        Raises:
            OSError: EBUSY.
        """
        try:
            _ignoring(
                lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
                errors.is_unsupported,
            )
            status = os.stat(partial, dir_fd=directory_fd, follow_symlinks=False)
            is_ours = os.path.samestat(os.fstat(descriptor), status)
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise errors.busy(self.path, "another process is writing it")

    def _remove_others(self, directory_fd: int) -> None:
        """Remove this user's unlocked partial files of other versions."""
        own_name = self._partial
        start = self._os_name(own_name[: -len(_digest("")) - len(".partial")])
        pattern = re.compile(f"{re.escape(start)}{PARTIAL_PATTERN}", re.DOTALL)
        for name in os.listdir(directory_fd):
            if name == self._os_name(own_name) or not pattern.fullmatch(name):
                continue
            with suppress(OSError):
                descriptor = open_regular(name, os.O_RDWR, dir_fd=directory_fd)
                try:
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(name, dir_fd=directory_fd)
                finally:
                    os.close(descriptor)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARACTERS]


def _ignoring(operation: Callable[[], object], is_missing: Callable[[OSError], bool]) -> None:
    """Run an operation; ignore its error if the file system does not support it."""
    try:
        operation()
    except OSError as error:
        if not is_missing(error):
            raise
