"""Passthrough: the kernel reads a file of the cache itself, and this process gets no READ.

The reply to OPEN names a backing file, which was registered with the session's descriptor
before. It needs Linux 6.9, libfuse 3.17 and CAP_SYS_ADMIN (kernel: fs/fuse/backing.c). Elsewhere
files are read through the page cache, as if this module did not exist.
"""

import ctypes
import fcntl
import os
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tinkerfs import errors
from tinkerfs.telemetry import Telemetry

#: `fuse_version()` of the first libfuse with `backing_id` in `struct fuse_file_info`.
_LIBFUSE_SINCE: Final = 317
_LINUX_SINCE: Final = (6, 9)

#: Capability flag (libfuse's fuse_common.h, FUSE_CAP_PASSTHROUGH).
_CAP_PASSTHROUGH: Final = 1 << 29

#: Requests of ioctl(2) on the session's descriptor, and the argument of the first one: `fd`,
#: `flags` and `padding` (the kernel's include/uapi/linux/fuse.h).
_BACKING_OPEN: Final = 0x4010E501
_BACKING_CLOSE: Final = 0x4004E502
_BACKING_MAP: Final = struct.Struct("=iIQ")

#: Depth of stacked file systems that may hold the cache. The kernel allows a depth of 2 in all, so
#: with more than 0 the mount could not be a layer of overlayfs.
_MAX_STACK_DEPTH: Final = 0

#: Distance of `backing_id` from `fh` in `struct fuse_file_info` (libfuse's fuse_common.h).
_BACKING_ID_OFFSET: Final = 20


@dataclass(slots=True)
class _OpenInode:
    """How an inode is open. All opens of an inode have one mode at a time (the kernel's rule).

    Attributes:
        backing_id: number of the registered backing file; 0 while the page cache is used.
        opens: number of opens in this mode.
    """

    path: str
    backing_id: int
    opens: int = 0


def missing_requirement(libfuse_version: int) -> str:
    """Return what passthrough needs and is not there, before a mount; empty if nothing is known.

    Args:
        libfuse_version: the result of `fuse_version()`.
    """
    if libfuse_version < _LIBFUSE_SINCE:
        return "needs libfuse 3.17"
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < _LINUX_SINCE:
        return "needs Linux 6.9"
    return "" if os.geteuid() == 0 else "needs root"


class Passthrough:
    """Registers backing files for the open files of one mount. Thread-safe.

    Args:
        telemetry: receives the state, "on" or the reason why not, and a count of opens.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        telemetry.passthrough = "off: needs libfuse 3.17"
        self._telemetry = telemetry
        self._session_fd: int | None = None
        self._lock = threading.Lock()
        # Both are guarded by _lock.
        self._inodes: dict[str, _OpenInode] = {}
        #: By handle number; handles that bypass both the page cache and a backing file have none.
        self._open_inodes: dict[int, _OpenInode] = {}

    @property
    def is_on(self) -> bool:
        """Whether the kernel may read cached files itself."""
        return self._telemetry.passthrough == "on"

    def negotiate(self, connection: Any, libfuse_version: int, session_fd: int) -> None:
        """Request passthrough at the kernel's first request, if both sides support it.

        Args:
            connection: pointer to a `struct fuse_conn_info`.
            libfuse_version: the result of `fuse_version()`.
            session_fd: the session's descriptor of /dev/fuse.
        """
        if libfuse_version < _LIBFUSE_SINCE:
            return
        if not connection.contents.capable_ext & _CAP_PASSTHROUGH:
            self._telemetry.passthrough = "off: needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH"
        else:
            connection.contents.want_ext |= _CAP_PASSTHROUGH
            connection.contents.max_backing_stack_depth = _MAX_STACK_DEPTH
            self._session_fd = session_fd
            self._telemetry.passthrough = "on"

    def open(self, fh: int, path: str, backing_fd: int | None, *, direct_io: bool) -> int:
        """Choose how the kernel reads a file; return the number of its backing file, or 0.

        Args:
            fh: identifies the handle, for `close`.
            path: identifies the inode.
            backing_fd: the file in the cache, whole and verified; None if there is none.
            direct_io: whether reads must reach this process. They do even with a backing file,
                which the kernel demands as long as another open of the inode has one.
        """
        if self._session_fd is None:
            return 0
        with self._lock:
            inode = self._inodes.get(path)
            if direct_io and (inode is None or not inode.backing_id):
                return 0
            if inode is None:
                backing_id = 0 if backing_fd is None else self._register(backing_fd)
                inode = self._inodes[path] = _OpenInode(path, backing_id)
            inode.opens += 1
            self._open_inodes[fh] = inode
            return inode.backing_id

    def close(self, fh: int) -> None:
        """Record the release of a handle."""
        with self._lock:
            inode = self._open_inodes.pop(fh, None)
            if inode is None:
                return
            inode.opens -= 1
            if inode.opens:
                return
            del self._inodes[inode.path]
            if inode.backing_id and self._session_fd is not None:
                fcntl.ioctl(self._session_fd, _BACKING_CLOSE, struct.pack("=I", inode.backing_id))

    def _register(self, fd: int) -> int:
        """Return the number of a new backing file; 0 if the kernel refuses it."""
        if not self.is_on or self._session_fd is None:
            return 0
        backing_map = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        try:
            backing_id: int = fcntl.ioctl(self._session_fd, _BACKING_OPEN, backing_map)
        except PermissionError:
            self._telemetry.passthrough = "off: needs the capability SYS_ADMIN"
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            if errors.is_stacked_too_deep(error):
                reason = "the cache is on a stacked file system, such as overlayfs"
            self._telemetry.passthrough = f"off: {reason}"
        else:
            self._telemetry.count("passthrough_opens")
            return backing_id
        return 0


def make_backing_id_writer(file_info: Any) -> Callable[[int, int], None]:
    """Return a function that sets `backing_id` in the `struct fuse_file_info` at an address."""
    offset = file_info.fh.offset + _BACKING_ID_OFFSET
    number_at = ctypes.c_int32.from_address

    def set_backing_id(info: int, backing_id: int) -> None:
        number_at(info + offset).value = backing_id

    return set_backing_id
