"""Copies of weights in ordinary directories: written beside, renamed when whole, resumed.

    <directory>/.<name>.<digest>.partial   the start of the file; the digest names its version
    <directory>/<name>                     the whole file, never less
    <directory>/.tinkerfs-get              the record of such files and their versions, JSON lines

So a file under its own name is whole, and which version of which file it is can be read later from
its record, its length and its time: a checkpoint's files have the same names and lengths as those
of the next one. A partial file holds only what was written in order from the start. What a file
system lacks (locks, modes, times, flushes) is done without.
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
from tinkerfs.safe_open import open_regular
from tinkerfs.weights.destination import PARTIAL_PATTERN, Destination
from tinkerfs.weights.file import WeightsFile

#: Read and written at a time.
_PIECE_BYTES = 1 << 20

#: What of a long name a partial file's has; a file name has 255 bytes at most.
_MAX_NAME_BYTES = 220

_DIGEST_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that is to be made of weights. For one thread at a time.

    Attributes:
        destination: the directory that has the record.
        name: the relative path in it.
        file: the content; open.
        what: tells it from other files of the same version of the same weights.
    """

    destination: Destination
    name: str
    file: WeightsFile
    what: str

    @property
    def path(self) -> str:
        """The path of the whole file, for messages."""
        return os.path.join(self.destination.path, *self._parts)

    def exists(self) -> bool:
        """Return whether something has its name, whatever that is.

        Raises:
            OSError: as `Destination.status`.
        """
        return self.destination.status(self._parts) is not None

    def is_directory(self) -> bool:
        """Return whether a directory has its name; as `is_taken`."""
        status = self.destination.status(self._parts)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def is_complete(self) -> bool:
        """Return whether this very version was copied before, and is as it was then."""
        with suppress(OSError):
            status = self.destination.status(self._parts)
            if status is not None and status.st_size == self.file.size_bytes:
                line = Destination.line(self.name, self._digest, status)
                return self.destination.has_recorded(line, status)
        return False

    def resumable_bytes(self) -> int:
        """Return how much of it was written before and will not be fetched again."""
        with suppress(OSError):
            status = self.destination.status((*self._parts[:-1], self._partial))
            if status is not None and status.st_size <= self.file.size_bytes:
                return status.st_size
        return 0

    def copy(self, mode: int, ctx: RequestContext) -> Iterator[int]:
        """Write what is missing of it, and rename it when it is whole.

        What has its name is replaced. When it breaks off, for whatever reason, what came stays.

        Args:
            mode: the permission bits in the end.
            ctx: how long to wait, and on whose behalf.

        Yields:
            how many bytes more are written, as they are.

        Raises:
            ApiError: the bytes are unavailable.
            OSError: as `WeightsFile.read`; EBUSY when another process is at it; ENOTDIR where a
                symbolic link stands for a directory; what the disk says.
        """
        with self.destination.opened(self._parts[:-1], is_made=True) as directory_fd:
            self._remove_others(directory_fd)
            partial = self._on_disk(self._partial)
            descriptor = self.destination.open_private(partial, directory_fd)
            try:
                self._lock(descriptor, partial, directory_fd)
                yield from self._fill(descriptor, ctx)
                _try(lambda: os.fchmod(descriptor, mode), errors.is_attribute_refused)
                times_ns = (self.file.mtime_ns, self.file.mtime_ns)
                _try(lambda: os.utime(descriptor, ns=times_ns), errors.is_attribute_refused)
                _try(lambda: os.fsync(descriptor), errors.is_unsupported)
                name = self._on_disk(self._parts[-1])
                self.destination.require_unused(name, directory_fd)
                made = os.fstat(descriptor)
                self.destination.record(self.name, self._digest, made)
                self.destination.rename(partial, name, directory_fd, descriptor)
            except OSError as error:
                error.filename = self.path
                raise
            finally:
                os.close(descriptor)
            # Where times cannot be set, closing may set one.
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if os.path.samestat(made, status):
                self.destination.record(self.name, self._digest, status)

    @property
    def _parts(self) -> tuple[str, ...]:
        return Destination.local_parts(self.name)

    @property
    def _digest(self) -> str:
        return _digest(f"{self.file.key}\n{self.what}")

    @property
    def _partial(self) -> str:
        """The name of the partial file: another one for each user."""
        name = self._parts[-1].encode("utf-8", "surrogateescape")
        start = name[:_MAX_NAME_BYTES].decode("utf-8", "surrogateescape")
        return f".{start}.{_digest(f'{self._digest} {os.geteuid()}')}.partial"

    @staticmethod
    def _on_disk(name: str) -> str:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))

    def _fill(self, descriptor: int, ctx: RequestContext) -> Iterator[int]:
        """Write what is missing at the end of the partial file."""
        at = os.fstat(descriptor).st_size
        if at > self.file.size_bytes:
            os.ftruncate(descriptor, 0)
            at = 0
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while at < self.file.size_bytes:
            size_bytes = self.file.read_into(buffer, at, ctx)
            if not size_bytes:
                raise errors.corrupt(self.path, "it is shorter than it was")
            rest, offset = buffer[:size_bytes], at
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
            at += size_bytes
            yield size_bytes

    def _lock(self, descriptor: int, partial: str, directory_fd: int) -> None:
        """Be the only one to write it; another process may have just renamed it.

        Raises:
            OSError: EBUSY.
        """
        try:
            _try(
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
        """Remove this user's partial files of other versions, unless a process writes them."""
        own = self._partial
        start = self._on_disk(own[: -len(_digest("")) - len(".partial")])
        pattern = re.compile(f"{re.escape(start)}{PARTIAL_PATTERN}", re.DOTALL)
        for name in os.listdir(directory_fd):
            if name == self._on_disk(own) or not pattern.fullmatch(name):
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


def _try(operation: Callable[[], object], is_missing: Callable[[OSError], bool]) -> None:
    """Do something, unless the file system cannot."""
    try:
        operation()
    except OSError as error:
        if not is_missing(error):
            raise
