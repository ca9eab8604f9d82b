"""What differs between operating systems, with a fallback for each.

tinkerfs is developed and tested on Linux. Everything below the FUSE adapter and the command line
uses other features than those of POSIX through this module only. Where a feature is missing, the
result is slower or less specific, and never wrong. Thread-safe and stateless.
"""

import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from tinkerfs import errors

#: Whether mounts are supported, and listed in /proc/self/mountinfo.
CAN_MOUNT: Final = sys.platform == "linux"

#: Whether a file has a lock per byte that belongs to the open file (fcntl(2)). The locks of POSIX
#: belong to the process, so they neither exclude its threads nor survive closing another file.
HAS_BYTE_LOCKS: Final = hasattr(fcntl, "F_OFD_SETLK")

#: struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks).
_FLOCK: Final = "@hhqqi4x"

#: Flag for a read that fails instead of waiting for the disk (preadv2(2)); 0 if unsupported.
NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)

#: From fcntl.h and linux/stat.h, see statx(2).
_AT_FDCWD, _FORCE_SYNC, _STATX_BASIC, _STATX_BYTES = -100, 0x2000, 0x7FF, 256

#: Flag of an open for a preview, which leaves the access time unchanged; 0 if unsupported.
_O_NOATIME: Final = getattr(os, "O_NOATIME", 0)

#: Parameter numbers from glibc's malloc.h; mallopt(3) describes them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
#: Larger than a chunk of a download, so that chunks are allocated on the heap.
_MMAP_BYTES: Final = 2 << 20
#: Free memory that the end of a heap keeps for the next chunks.
_FREE_BYTES: Final = 4 << 20
#: Maximum number of heaps, each with its own free memory. Only one thread at a time runs Python.
_MAX_HEAPS: Final = 2


# Files.


def lock_bytes(fd: int, kind: int, byte: int, count: int = 1) -> None:
    """Set a lock of type F_RDLCK, F_WRLCK or F_UNLCK on bytes, without waiting.

    Raises:
        OSError: EAGAIN or EACCES if one is locked through another open file; an error for which
            `errors.is_unsupported` is true without such locks.
    """
    if not HAS_BYTE_LOCKS:
        raise errors.not_supported("", "this system has no open file description locks")
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, byte, count))


def is_byte_locked(fd: int, byte: int) -> bool:
    """Return whether a byte is locked through another open file; lock nothing.

    Raises:
        OSError: as `lock_bytes`.
    """
    if not HAS_BYTE_LOCKS:
        raise errors.not_supported("", "this system has no open file description locks")
    query = _flock(fcntl.F_WRLCK, byte, 1)
    kind: int = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))[0]
    return kind != fcntl.F_UNLCK


def _flock(kind: int, byte: int, count: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, count, 0)


def copy_range(source_fd: int, target_fd: int, size_bytes: int, offset: int) -> int:
    """Let the kernel copy bytes to the same offset of another file; return their number.

    Raises:
        OSError: an error for which `errors.is_unsupported` is true if the kernel cannot.
    """
    if not hasattr(os, "copy_file_range"):
        raise errors.not_supported("", "this system has no copy_file_range")
    return os.copy_file_range(source_fd, target_fd, size_bytes, offset, offset)


def is_preview(flags: int) -> bool:
    """Return whether a file is opened with O_NOATIME; False on systems without the flag."""
    return bool(flags & _O_NOATIME)


def file_system_type(device: int) -> str:
    """Return the file system type of a device number, such as "ext4"; "" if it is unknown."""
    device_id = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == device_id:
                    return fields[fields.index("-") + 1]
    except OSError:
        pass
    return ""


def revalidate_directory(path: str | os.PathLike[str]) -> None:
    """Let a network file system compare what it caches of a directory with the server.

    Otherwise a name that another host has created stays unknown for up to a minute (nfs(5),
    "Directory entry caching"). On systems without statx(2) the cache is as old as that.

    Raises:
        OSError: the directory does not exist or cannot be read.
    """
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except AttributeError:
        os.stat(path)
        return
    result = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(_AT_FDCWD, os.fsencode(path), _FORCE_SYNC, _STATX_BASIC, result):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(path))


# Processes.


def command_of(pid: int) -> str:
    """Return the command name of a process; "?" if it has exited or is unknown."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip() or "?"
    except OSError:
        return "?"


def process_of(thread: int) -> int:
    """Return the process id of a thread, or the thread id if it is unknown."""
    try:
        with open(f"/proc/{thread}/status", "rb") as status:
            return int(status.read().partition(b"\nTgid:")[2].split(None, 1)[0])
    except (OSError, IndexError, ValueError):
        return thread


def tune_malloc() -> None:
    """Make glibc reuse freed memory of the size of a chunk; do nothing on other C libraries.

    By default glibc maps each buffer of that size from the kernel, and unmaps it when it is freed.
    So the kernel clears every page again. Buffers on the heap are reused instead. Must be called at
    the start of the process, before there are threads.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl and macOS have no mallopt
        return
    mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_TRIM_THRESHOLD, _FREE_BYTES)
    mallopt(_ARENA_MAX, _MAX_HEAPS)


# Time and network.


#: Returns seconds on a monotonic clock that also counts the time of a suspend. macOS counts it in
#: CLOCK_MONOTONIC, unlike `time.monotonic`. Not a Python function, because most operations call it.
time_with_suspend: Callable[[], float] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


def keepalive_options(idle_s: int, interval_s: int, count: int) -> tuple[tuple[int, int, int], ...]:
    """Return the options of a TCP socket that detects a vanished peer, as far as there are such."""
    # macOS has another name for the first one, and Python has had that since 3.10.
    names = (
        ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", idle_s),
        ("TCP_KEEPINTVL", interval_s),
        ("TCP_KEEPCNT", count),
    )
    options = [
        (socket.IPPROTO_TCP, number, value)
        for name, value in names
        if (number := getattr(socket, name, None)) is not None
    ]
    return ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options)


def has_disconnected(connection: socket.socket) -> bool:
    """Return whether the peer has closed its side of a TCP connection; works for TLS too.

    Without POLLRDHUP, bytes that the peer sent before it left hide that, such as those of TLS.
    """
    hang_up = getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    try:
        poll.register(connection, hang_up or select.POLLIN)
        if not poll.poll(0):
            return False
        # The class's own method, because that of TLS reads no bytes ahead.
        return bool(hang_up) or not socket.socket.recv(connection, 1, socket.MSG_PEEK)
    except (OSError, ValueError):  # ValueError: closed on this side
        return True
