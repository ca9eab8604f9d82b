"""Open regular files, and fail immediately for a FIFO or a device.

open(2) of a FIFO blocks until another process opens its other end, which would freeze a thread of
the mount. Every file on disk is opened through this module. Thread-safe.
"""

import os
import stat

from tinkerfs import errors


def open_regular(
    path: str | os.PathLike[str],
    flags: int,
    mode: int = 0o600,
    *,
    dir_fd: int | None = None,
    follow_symlinks: bool = False,
) -> int:
    """Open a regular file and return its descriptor, which the caller closes.

    O_NONBLOCK stays set: it changes nothing for a regular file (open(2)).

    Args:
        path: path of the file.
        flags: flags of `os.open`, without O_TRUNC, which would take effect before the check.
        mode: permission bits of a new file.
        dir_fd: the directory that a relative path starts from.
        follow_symlinks: whether the last component may be a symbolic link.

    Raises:
        OSError: EINVAL if the file is not regular, ELOOP for a symbolic link; see open(2).
    """
    flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    if not follow_symlinks:
        flags |= os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
    except OSError as error:
        if errors.is_not_regular(error):
            raise errors.not_regular(os.fspath(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.not_regular(os.fspath(path))
    return fd


def open_directory(
    path: str | os.PathLike[str], *, dir_fd: int | None = None, follow_symlinks: bool = False
) -> int:
    """Open a directory and return its descriptor, which the caller closes.

    Args:
        path: path of the directory.
        dir_fd: the directory that a relative path starts from.
        follow_symlinks: whether the last component may be a symbolic link.

    Raises:
        OSError: ENOTDIR if the path is not a directory, or is a symbolic link; see open(2).
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if not follow_symlinks:
        flags |= os.O_NOFOLLOW
    return os.open(path, flags, dir_fd=dir_fd)


def read_regular(
    path: str | os.PathLike[str], max_bytes: int, *, follow_symlinks: bool = False
) -> bytes:
    """Return the content of a regular file, truncated to `max_bytes`.

    Raises:
        OSError: the same as for `open_regular`.
    """
    fd = open_regular(path, os.O_RDONLY, follow_symlinks=follow_symlinks)
    with open(fd, "rb") as file:
        return file.read(max_bytes)


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a regular file; False for a symbolic link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
