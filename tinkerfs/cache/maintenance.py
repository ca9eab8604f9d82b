"""Maintenance of the whole block cache by users: list, verify and clear it.

Mounts may use the cache at the same time; they download removed blocks again.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_writer import TRAILER_BYTES, is_intact
from tinkerfs.cache.eviction import CacheFileInfo, remove_directory, scan_cache, try_lock_exclusive
from tinkerfs.safe_open import open_regular


@dataclass(frozen=True, slots=True)
class CachedFile:
    """The cached part of one version of one file.

    Attributes:
        description: text for users, recorded when the file was opened.
        length_bytes: length of the whole file, None if unknown.
        data_bytes: number of cached bytes of the file.
        size_bytes: space on disk.
        blocks: number of cached blocks.
        last_access_ns: time of the last read of a block, nanoseconds since 1970.
        fetched_ns: time of the first download of a block, nanoseconds since 1970.
        is_open: whether a mount has the file open.
    """

    description: str
    length_bytes: int | None
    data_bytes: int
    size_bytes: int
    blocks: int
    last_access_ns: int
    fetched_ns: int
    is_open: bool


@dataclass(frozen=True, slots=True)
class CorruptBlock:
    """A corrupt block that was removed.

    Attributes:
        description: of the file, see `CachedFile`.
        index: block index.
    """

    description: str
    index: int


def cached_files(root: Path) -> list[CachedFile]:
    """Return every cached file, the most recently used first.

    Raises:
        OSError: the cache cannot be read.
    """
    found = [
        CachedFile(
            description,
            length_bytes,
            sum(max(file.length_bytes - TRAILER_BYTES, 0) for file in _blocks(files)),
            sum(file.size_bytes for file in files),
            len(_blocks(files)),
            max(file.last_access_ns for file in files),
            min(file.fetched_ns for file in files),
            _is_open(root / directory),
        )
        for directory, description, length_bytes, files in _directories(root)
    ]
    return sorted(found, key=lambda each: -each.last_access_ns)


def verify(root: Path, matches: Callable[[str], bool]) -> tuple[int, list[CorruptBlock]]:
    """Verify every block, and remove those that are corrupt or unreadable.

    Args:
        root: directory of the cache.
        matches: whether to verify a file, by its description.

    Returns:
        the number of intact blocks, and the removed blocks.

    Raises:
        OSError: the cache cannot be read or changed.
    """
    intact, corrupt = 0, []
    for directory, description, _, files in _directories(root):
        for file in sorted(_blocks(files), key=_index_of) if matches(description) else ():
            try:
                is_good = _is_readable_and_intact(directory, file)
            except FileNotFoundError:  # evicted by a mount
                continue
            if is_good:
                intact += 1
                continue
            with suppress(FileNotFoundError):
                os.unlink(file.path)
            corrupt.append(CorruptBlock(description, _index_of(file)))
    return intact, corrupt


def clear(root: Path, matches: Callable[[str], bool]) -> int:
    """Remove cached files, and return the number of bytes freed.

    Args:
        root: directory of the cache.
        matches: whether to remove a file, by its description.

    Raises:
        OSError: the cache cannot be read or changed.
    """
    freed_bytes = 0
    for directory, description, _, files in _directories(root):
        if not matches(description):
            continue
        for file in files:
            with suppress(FileNotFoundError):
                os.unlink(file.path)
                freed_bytes += file.size_bytes
        lock = try_lock_exclusive(root / directory)
        if lock.is_free:
            remove_directory(root / directory)
        lock.close()
    return freed_bytes


def _directories(root: Path) -> Iterator[tuple[str, str, int | None, list[CacheFileInfo]]]:
    """Yield (name, description, length, files) of each directory that is not empty."""
    by_directory: dict[str, list[CacheFileInfo]] = {}
    for file in scan_cache(root):
        by_directory.setdefault(file.directory, []).append(file)
    for directory, files in by_directory.items():
        yield directory, *read_about(root / directory), files


def _blocks(files: list[CacheFileInfo]) -> list[CacheFileInfo]:
    return [file for file in files if file.index is not None]


def _index_of(file: CacheFileInfo) -> int:
    assert file.index is not None
    return file.index


def _is_readable_and_intact(directory: str, file: CacheFileInfo) -> bool:
    """Return whether a block can be read and its checksum matches.

    Raises:
        FileNotFoundError: the block was removed.
        PermissionError: the block belongs to another user.
    """
    try:
        fd = open_regular(file.path, os.O_RDONLY)
        try:
            return is_intact(fd, directory, _index_of(file))
        finally:
            os.close(fd)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:  # the disk cannot read it, or it is not a regular file
        return False


def _is_open(directory: Path) -> bool:
    lock = try_lock_exclusive(directory)
    lock.close()
    return not lock.is_free
