"""What people do with the block cache as a whole: look at it, check it, clear it.

Works beside mounts that use it: they fetch again what is removed under them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.blocks import is_sound
from tinkerfs.cache.eviction import Kept, held_alone, kept_files, remove_folder

__all__ = ["CachedFile", "cached_files", "clear", "verify"]


@dataclass(frozen=True, slots=True)
class CachedFile:
    """What is kept of one version of one file.

    Attributes:
        about: what it is, as it was told when it was fetched.
        size_bytes: on disk.
        blocks: how many.
        used_ns: when a block of it was last read, nanoseconds since 1970.
        fetched_ns: when the first of them was fetched.
        is_open: whether a mount has it open.
    """

    about: str
    size_bytes: int
    blocks: int
    used_ns: int
    fetched_ns: int
    is_open: bool


def cached_files(root: Path) -> list[CachedFile]:
    """Return what is kept, the most recently used first.

    Raises:
        OSError: the cache cannot be read.
    """
    found = [
        CachedFile(
            about,
            sum(file.size_bytes for file in files),
            sum(file.index is not None for file in files),
            max(file.used_ns for file in files),
            min(file.fetched_ns for file in files),
            _is_open(root / folder),
        )
        for folder, about, files in _folders(root)
    ]
    return sorted(found, key=lambda each: -each.used_ns)


def verify(root: Path, wanted: Callable[[str], bool]) -> tuple[int, int]:
    """Look at every block, and remove those that are not what was written.

    Args:
        root: the folder of the cache.
        wanted: tells of a file, by what it is, whether it is to be looked at.

    Returns:
        how many blocks are sound, and how many were not.

    Raises:
        OSError: the cache cannot be read.
    """
    sound = bad = 0
    for folder, about, files in _folders(root):
        for file in files if wanted(about) else ():
            if file.index is None:
                continue
            with suppress(FileNotFoundError):  # a mount made room
                fd = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    is_good = is_sound(fd, folder, file.index)
                finally:
                    os.close(fd)
                sound += is_good
                bad += not is_good
                if not is_good:
                    os.unlink(file.path)
    return sound, bad


def clear(root: Path, wanted: Callable[[str], bool]) -> int:
    """Remove what is kept, and return how many bytes that frees.

    Args:
        root: the folder of the cache.
        wanted: tells of a file, by what it is, whether it is to go.

    Raises:
        OSError: the cache cannot be read, or not changed.
    """
    freed_bytes = 0
    for folder, about, files in _folders(root):
        if not wanted(about):
            continue
        for file in files:
            with suppress(FileNotFoundError):
                os.unlink(file.path)
                freed_bytes += file.size_bytes
        locks = held_alone(root / folder)
        if locks is not None:
            remove_folder(root / folder)
            locks.close()
    return freed_bytes


def _folders(root: Path) -> Iterator[tuple[str, str, list[Kept]]]:
    """Yield the name of each folder that holds something, what it is, and what it holds."""
    by_folder: dict[str, list[Kept]] = {}
    for file in kept_files(root):
        by_folder.setdefault(file.folder, []).append(file)
    for folder, files in by_folder.items():
        about = "?"
        with suppress(OSError):
            about = (root / folder / "about").read_text("utf-8", "surrogateescape")
        yield folder, about, files


def _is_open(folder: Path) -> bool:
    locks = held_alone(folder)
    if locks is not None:
        locks.close()
    return locks is None
