"""Copies of weights in ordinary folders: written beside, renamed when whole, taken up when broken.

    <folder>/.<name>.<digest>.partial   what came so far; the digest tells of which version of what
    <folder>/<name>                     the whole file, never less
    <folder>/.tinkerfs-get              which files were made so, and of what, a line of JSON each

So a file under its own name is whole, and which version of which file it is can be told later from
its record, its length and its time: a checkpoint's files have the same names and lengths as those
of the next one. Only what is written in order from the start is in a partial file.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from tinkerfs import errors
from tinkerfs.call import Call
from tinkerfs.weights.file import WeightsFile

__all__ = ["Target"]

_RECORD = ".tinkerfs-get"

#: Read and written at a time.
_PIECE_BYTES = 1 << 20

#: What of a long name a partial file's has; a file name has 255 bytes at most.
_MAX_NAME_BYTES = 220

_DIGEST_CHARACTERS = 16
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Target:
    """A file that is to be made of weights. For one thread at a time.

    Attributes:
        folder: where the record lies; made when something is first written.
        name: where in it, as a relative path.
        file: what it is to hold; open.
        what: tells it from other files of the same version of the same weights.
    """

    folder: str
    name: str
    file: WeightsFile
    what: str

    @property
    def path(self) -> str:
        """Where the whole file is."""
        return os.path.join(self.folder, self.name)

    def is_taken(self) -> bool:
        """Tell whether something has its name, whatever that is."""
        return os.path.lexists(self.path)

    def is_whole(self) -> bool:
        """Tell whether it was made before, of this very version, and is as it was then."""
        try:
            status = os.lstat(self.path)
        except OSError:
            return False
        is_as_long = status.st_size == self.file.size_bytes
        line = self._line(status)
        return stat.S_ISREG(status.st_mode) and is_as_long and line in self._recorded()

    def begun_bytes(self) -> int:
        """Return how much of it came before and will not be asked for again."""
        try:
            size_bytes = os.lstat(self._partial).st_size
        except OSError:
            return 0
        return size_bytes if size_bytes <= self.file.size_bytes else 0

    def copy(self, mode: int, call: Call) -> Iterator[int]:
        """Write what is missing of it, and rename it when it is whole.

        What has its name is replaced. When it breaks off, for whatever reason, what came stays.

        Args:
            mode: the permission bits in the end.
            call: how long to wait, and on whose behalf.

        Yields:
            how many bytes more are written, as they are.

        Raises:
            ApiError: they cannot be had.
            OSError: as `WeightsFile.read`; EBUSY when another process is at it; what the disk says.
        """
        folder = os.path.dirname(self.path)
        os.makedirs(folder, exist_ok=True)
        self._remove_others(folder)
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o600)
        try:
            self._lock(descriptor)
            at = os.fstat(descriptor).st_size
            if at > self.file.size_bytes:
                os.ftruncate(descriptor, 0)
                at = 0
            buffer = memoryview(bytearray(_PIECE_BYTES))
            while at < self.file.size_bytes:
                size_bytes = self.file.read_into(buffer, at, call)
                if not size_bytes:
                    raise errors.damaged(self.path, "it is shorter than it was")
                self._write(descriptor, buffer[:size_bytes], at)
                at += size_bytes
                yield size_bytes
            os.fchmod(descriptor, mode)
            os.utime(descriptor, ns=(self.file.mtime_ns, self.file.mtime_ns))
            os.fsync(descriptor)
            self._record(os.fstat(descriptor))
            os.rename(self._partial, self.path)
        finally:
            os.close(descriptor)

    @property
    def _digest(self) -> str:
        text = f"{self.file.key}\n{self.what}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(text).hexdigest()[:_DIGEST_CHARACTERS]

    @property
    def _partial(self) -> str:
        folder, name = os.path.split(self.path)
        cut = os.fsdecode(os.fsencode(name)[:_MAX_NAME_BYTES])
        return os.path.join(folder, f".{cut}.{self._digest}.partial")

    def _write(self, descriptor: int, rest: memoryview, at: int) -> None:
        try:
            while rest:
                written = os.pwrite(descriptor, rest, at)
                rest, at = rest[written:], at + written
        except OSError as error:
            error.filename = self.path
            raise

    def _lock(self, descriptor: int) -> None:
        """Be the only one to write it; who was before us may have just renamed it.

        Raises:
            OSError: EBUSY.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), os.lstat(self._partial))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise errors.busy(self.path, "another process is writing it")

    def _remove_others(self, folder: str) -> None:
        """Remove what came of other versions, where nobody is at it."""
        start, end = os.path.basename(self._partial).rsplit(self._digest, 1)
        pattern = re.compile(
            f"{re.escape(start)}[0-9a-f]{{{_DIGEST_CHARACTERS}}}{re.escape(end)}", re.DOTALL
        )
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if path == self._partial or not pattern.fullmatch(name):
                continue
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | _OPEN_FLAGS)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(descriptor)

    # The record.

    def _line(self, status: os.stat_result) -> str:
        size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
        told = {"name": self.name, "of": self._digest, "bytes": size_bytes, "mtime_ns": mtime_ns}
        return json.dumps(told)

    def _recorded(self) -> list[str]:
        try:
            with open(os.path.join(self.folder, _RECORD), encoding="ascii", errors="replace") as f:
                return f.read().splitlines()
        except OSError:
            return []

    def _record(self, status: os.stat_result) -> None:
        """Append a line; a record that cannot be written costs a later copy."""
        line = self._line(status)
        if line in self._recorded():
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _OPEN_FLAGS
        with suppress(OSError):
            descriptor = os.open(os.path.join(self.folder, _RECORD), flags, 0o666)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)
