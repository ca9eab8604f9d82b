"""The directory of a copy, which may be writable by other users.

No file in it is trusted because of its name. Directories and files are opened by descriptor,
without following symbolic links. A file is trusted only if its owner, type and link count are
right. The same holds for the record of copied files. Not thread-safe.
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

#: The end of the name of an incomplete file.
PARTIAL_PATTERN = r"[0-9a-f]{16}\.partial"
_OWN_NAMES = re.compile(rf"{re.escape(_RECORD)}|\..*\.{PARTIAL_PATTERN}", re.DOTALL | re.IGNORECASE)

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Destination:
    """The directory of a copy.

    Args:
        path: of the directory, which may be a symbolic link; it is created on demand.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        #: Files copied by this process, by device and inode.
        self._copied: set[tuple[int, int]] = set()

    @staticmethod
    def local_parts(name: str) -> tuple[str, ...]:
        """Return the parts of a relative path as they are named on disk.

        In a name that looks like one of tinkerfs's own files, the leading dot is written `%2E`.
        """
        return tuple(
            f"%2E{part[1:]}" if _OWN_NAMES.fullmatch(part) else part for part in name.split("/")
        )

    @contextmanager
    def open_subdirectory(self, parts: Sequence[str], *, create: bool) -> Iterator[int]:
        """Yield the descriptor of a directory below; follow no symbolic link.

        The path has one name in each of `parts`. With `create`, missing directories are created.

        Raises:
            OSError: ENOENT if it is missing; ENOTDIR if a part is a link or not a directory.
        """
        if create:
            os.makedirs(self.path, exist_ok=True)
        fd = open_directory(self.path, follow_symlinks=True)
        try:
            for part in map(_os_name, parts):
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                try:
                    child_fd = open_directory(part, dir_fd=fd)
                except NotADirectoryError:
                    raise errors.not_followed(part) from None
                os.close(fd)
                fd = child_fd
            yield fd
        finally:
            os.close(fd)

    def status(self, parts: Sequence[str]) -> os.stat_result | None:
        """Return the lstat result of a path, None if it does not exist.

        Raises:
            OSError: ENOTDIR if a part above it is a link or not a directory.
        """
        try:
            with self.open_subdirectory(parts[:-1], create=False) as fd:
                return os.stat(_os_name(parts[-1]), dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_private(self, name: str, directory_fd: int) -> int:
        """Open a file that no other user can have written, for reading and writing.

        The file is created if necessary. An entry with its name that does not qualify is unlinked.

        Raises:
            OSError: the existing entry cannot be removed; as open(2).
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
        """Raise an error if a file copied by this process has the name.

        Raises:
            OSError: EEXIST, for example on a case-insensitive file system.
        """
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if (status.st_dev, status.st_ino) in self._copied:
                raise errors.exists(
                    name, "the file system takes this name for that of another file of the copy"
                )

    def rename(self, old: str, new: str, directory_fd: int, fd: int) -> None:
        """Rename a file, which is also open as `fd`; replace an existing file.

        Raises:
            OSError: EBUSY if another process has replaced the file; as rename(2).
        """
        try:
            os.rename(old, new, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except FileExistsError:  # the file system cannot replace a file
            os.unlink(new, dir_fd=directory_fd)
            os.rename(old, new, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        status = os.stat(new, dir_fd=directory_fd, follow_symlinks=False)
        if not os.path.samestat(status, os.fstat(fd)):
            raise errors.busy(new, "another process has replaced it")
        self._copied.add((status.st_dev, status.st_ino))

    # The record

    def has_recorded(self, line: str, status: os.stat_result) -> bool:
        """Return whether a file is trusted and its line is in the record."""
        return _is_own(status) and line in self._recorded_lines()

    def record(self, name: str, version: str, status: os.stat_result) -> None:
        """Append a line to the record; without it, a later `get` copies the file again."""
        line = self.line(name, version, status)
        if line in self._recorded_lines():
            return
        flags = os.O_WRONLY | os.O_APPEND
        with suppress(OSError), self.open_subdirectory((), create=True) as directory_fd:
            try:
                fd = open_regular(
                    _RECORD, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory_fd
                )
            except FileExistsError:
                fd = open_regular(_RECORD, flags, dir_fd=directory_fd)
                if not _is_own(os.fstat(fd)):
                    os.close(fd)
                    return
            try:
                os.write(fd, f"{line}\n".encode())
            finally:
                os.close(fd)

    @staticmethod
    def line(name: str, version: str, status: os.stat_result) -> str:
        """Return the line of a file in the record."""
        size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
        return json.dumps({"name": name, "of": version, "bytes": size_bytes, "mtime_ns": mtime_ns})

    def _recorded_lines(self) -> list[str]:
        try:
            with self.open_subdirectory((), create=False) as directory_fd:
                fd = open_regular(_RECORD, os.O_RDONLY, dir_fd=directory_fd)
            with open(fd, "rb") as file:
                if not _is_own(os.fstat(fd)):
                    return []
                return file.read(_MAX_RECORD_BYTES).decode("ascii", "replace").splitlines()
        except OSError:
            return []


def _os_name(part: str) -> str:
    """Return a name as `os` functions expect it to be UTF-8 on disk in any locale."""
    return os.fsdecode(part.encode("utf-8", "surrogateescape"))


def _create(name: str, directory_fd: int) -> int:
    return open_regular(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory_fd)


def _is_own(status: os.stat_result) -> bool:
    """Return whether a file is regular, and owned by this user or root."""
    is_owned = status.st_uid in (os.geteuid(), 0)
    return stat.S_ISREG(status.st_mode) and is_owned


def _is_private(fd: int) -> bool:
    """Return whether no other user can have written to a file."""
    status = os.fstat(fd)
    if not _is_own(status) or status.st_nlink > 1:
        return False
    if not status.st_mode & _WRITABLE_BY_OTHERS:
        return True
    with suppress(OSError):
        os.fchmod(fd, 0o600)
    # A file system without modes reports the same mode as before.
    return bool(os.fstat(fd).st_mode & _WRITABLE_BY_OTHERS)
