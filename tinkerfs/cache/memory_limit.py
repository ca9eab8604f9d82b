"""Bound on the memory for weights: a default, or less within a cgroup with a limit.

A container has a limit in a cgroup (cgroups(7)), and the kernel kills its processes beyond it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from tinkerfs.safe_open import open_regular

#: Bound without a limit.
DEFAULT_BYTES = 256 << 20

#: Part of a limit that blocks of weights may use. The interpreter, metadata and buffers of
#: requests need the rest, and so does the page cache of files that are not on disk yet.
_SHARE_OF_LIMIT = 1 / 4

#: A bound below this leaves no room for two blocks.
_MIN_BYTES = 8 << 20

#: Limits in cgroup v2 and in cgroup v1. Above `memory.high` the kernel slows processes down.
_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")


def weights_memory_bytes(root: str = "/") -> int:
    """Return the bound on memory for weights of this process.

    Args:
        root: the directory that contains `proc` and `sys`.
    """
    limit = memory_limit_bytes(root)
    if limit is None:
        return DEFAULT_BYTES
    return min(DEFAULT_BYTES, max(_MIN_BYTES, int(limit * _SHARE_OF_LIMIT)))


def memory_limit_bytes(root: str = "/") -> int | None:
    """Return the smallest memory limit of the cgroups of this process; None if there is none."""
    limits = []
    for directory in _memory_cgroups(root):
        for name in _FILES:
            text = _read(os.path.join(directory, name)).strip()
            if text.isdigit():  # otherwise "max", or there is no such file
                limits.append(int(text))
    return min(limits, default=None)


def _memory_cgroups(root: str) -> Iterator[str]:
    """Yield the directories of this process's cgroup and of those that contain it.

    In a container /proc may name a path of the host, and the cgroup of the container is mounted as
    the root. So directories may not exist.
    """
    mounted = os.path.join(root, "sys/fs/cgroup")
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        match = re.fullmatch(r"\d+:([^:]*):/(.*)", line)
        if match is None:
            continue
        controllers, path = match[1].split(","), PurePosixPath(match[2])
        if controllers == [""]:
            hierarchies = [mounted, os.path.join(mounted, "unified")]
        elif "memory" in controllers:
            hierarchies = [os.path.join(mounted, "memory")]
        else:
            continue
        for hierarchy in hierarchies:
            for each in (path, *path.parents):
                yield os.path.join(hierarchy, each)


def _read(path: str) -> str:
    """Return the content of a file; empty if it cannot be read."""
    try:
        with open(open_regular(path, os.O_RDONLY), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
