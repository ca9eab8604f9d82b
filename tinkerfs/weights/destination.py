"""A directory that files are copied into, which other users may be able to write to.

Nothing in it is trusted by its name: directories and files are opened by descriptor, without
following symbolic links, and a file counts as ours by its owner, its kind and its link count. The
record of what was copied is one more such file. For one thread at a time.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tinkerfs import errors
from tinkerfs.safe_open import open_directory, open_regular

_RECORD = ".tinkerfs-get"
_MAX_RECORD_BYTES = 64 << 20

#: The end of the name of a file that is not whole yet.
PARTIAL_PATTERN = r"[0-9a-f]{16}\.partial"
_OWN_NAMES = re.compile(rf"{re.escape(_RECORD)}|\..*\.{PARTIAL_PATTERN}", re.DOTALL | re.IGNORECASE)

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Destination:
    """A directory for copies.

    Args:
        path: of the directory, which may be a symbolic link; it is made when it is first needed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        #: What was copied in this run, by device and inode.
        self._copied: set[tuple[int, int]] = set()

    @staticmethod
    def local_parts(name: str) -> tuple[str, ...]:
        """Return the parts of a relative path as they are on disk.

        A name that could be taken for one of our own files has its dot written `%2E`.
        """
        return tuple(
            f"%2E{part[1:]}" if _OWN_NAMES.fullmatch(part) else part for part in name.split("/")
        )

    @contextmanager
    def opened(self, parts: Sequence[str], *, is_made: bool) -> Iterator[int]:
        """Yield the descriptor of a directory in it; no symbolic link is followed.

        Args:
            parts: the path from here, one name each.
            is_made: whether directories that are missing are made.

        Raises:
            OSError: ENOENT if it is missing; ENOTDIR if a part is a link or not a directory.
        """
        if is_made:
            os.makedirs(self.path, exist_ok=True)
        fd = open_directory(self.path, follow_symlinks=True)
        try:
            for part in map(_on_disk, parts):
                if is_made:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                try:
                    below = open_directory(part, dir_fd=fd)
                except NotADirectoryError:
                    raise errors.not_followed(part) from None
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def status(self, parts: Sequence[str]) -> os.stat_result | None:
        """Return the attributes of what has a path, links not followed; None for nothing.

        Raises:
            OSError: ENOTDIR if a part above it is a link or not a directory.
        """
        try:
            with self.opened(parts[:-1], is_made=False) as fd:
                return os.stat(_on_disk(parts[-1]), dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_private(self, name: str, directory_fd: int) -> int:
        """Open a file to read and write that nobody else can have written; made if need be.

        What has its name and is not such a file is unlinked.

        Raises:
            OSError: what has its name cannot be removed; as open(2).
        """
        with suppress(FileExistsError):
            return _create(name, directory_fd)
        with suppress(OSError):
            fd = open_regular(name, os.O_RDWR, dir_fd=directory_fd)
            if _is_private(fd):
                return fd
            os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory_fd)
        return _create(name, directory_fd)

    def require_unused(self, name: str, directory_fd: int) -> None:
        """Check that no file that was copied in this run has a name.

        Raises:
            OSError: EEXIST if one has, as on a file system that takes names of upper and lower
                case for the same.
        """
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if (status.st_dev, status.st_ino) in self._copied:
                raise errors.exists(
                    name, "the file system takes this name for that of another file of the copy"
                )

    def rename(self, old: str, new: str, directory_fd: int, fd: int) -> None:
        """Give a file its name, in place of what has it.

        Args:
            old: the name that it has.
            new: the name that it gets.
            directory_fd: of its directory.
            fd: of the file itself.

        Raises:
            OSError: EBUSY if it was exchanged; as rename(2).
        """
        try:
            os.rename(old, new, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except FileExistsError:  # a file system that replaces nothing
            os.unlink(new, dir_fd=directory_fd)
            os.rename(old, new, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        status = os.stat(new, dir_fd=directory_fd, follow_symlinks=False)
        if not os.path.samestat(status, os.fstat(fd)):
            raise errors.busy(new, "another process has exchanged it")
        self._copied.add((status.st_dev, status.st_ino))

    # The record.

    def has_recorded(self, line: str, status: os.stat_result) -> bool:
        """Return whether a file is ours, and the record, which is ours too, has this line."""
        return _is_of_us(status) and line in self._recorded()

    def record(self, name: str, of: str, status: os.stat_result) -> None:
        """Append a line; a record that cannot be written costs a later copy."""
        line = self.line(name, of, status)
        if line in self._recorded():
            return
        flags = os.O_WRONLY | os.O_APPEND
        with suppress(OSError), self.opened((), is_made=True) as directory_fd:
            try:
                fd = open_regular(
                    _RECORD, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory_fd
                )
            except FileExistsError:
                fd = open_regular(_RECORD, flags, dir_fd=directory_fd)
                if not _is_of_us(os.fstat(fd)):
                    os.close(fd)
                    return
            try:
                os.write(fd, f"{line}\n".encode())
            finally:
                os.close(fd)

    @staticmethod
    def line(name: str, of: str, status: os.stat_result) -> str:
        """Return the record's line of a file."""
        size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
        return json.dumps({"name": name, "of": of, "bytes": size_bytes, "mtime_ns": mtime_ns})

    def _recorded(self) -> list[str]:
        try:
            with self.opened((), is_made=False) as directory_fd:
                fd = open_regular(_RECORD, os.O_RDONLY, dir_fd=directory_fd)
            with open(fd, "rb") as file:
                if not _is_of_us(os.fstat(fd)):
                    return []
                return file.read(_MAX_RECORD_BYTES).decode("ascii", "replace").splitlines()
        except OSError:
            return []


def _on_disk(part: str) -> str:
    """Return a name as Python's `os` takes it, whatever the locale: its bytes are UTF-8."""
    return os.fsdecode(part.encode("utf-8", "surrogateescape"))


def _create(name: str, directory_fd: int) -> int:
    return open_regular(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory_fd)


def _is_of_us(status: os.stat_result) -> bool:
    """Return whether a file is regular, and owned by this user or root."""
    is_owned = status.st_uid in (os.geteuid(), 0)
    return stat.S_ISREG(status.st_mode) and is_owned


def _is_private(fd: int) -> bool:
    """Return whether no other user can have written to a file."""
    status = os.fstat(fd)
    if not _is_of_us(status) or status.st_nlink > 1:
        return False
    if not status.st_mode & _WRITABLE_BY_OTHERS:
        return True
    with suppress(OSError):
        os.fchmod(fd, 0o600)
    # A file system without modes tells the same ones for every file, also after this.
    return bool(os.fstat(fd).st_mode & _WRITABLE_BY_OTHERS)
