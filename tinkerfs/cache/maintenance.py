"""What people do with the block cache as a whole: look at it, check it, clear it.

Works beside mounts that use it: they fetch again what is removed under them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_writer import TRAILER_BYTES, is_intact
from tinkerfs.cache.eviction import CacheFileInfo, hold_alone, remove_folder, scan_cache
from tinkerfs.safe_open import open_regular


@dataclass(frozen=True, slots=True)
class CachedFile:
    """What is kept of one version of one file.

    Attributes:
        about: what it is, as it was told when it was fetched.
        length_bytes: of all of it, None where nobody knew.
        data_bytes: how many of these are in blocks that are kept.
        size_bytes: on disk.
        blocks: how many.
        used_ns: when a block of it was last read, nanoseconds since 1970.
        fetched_ns: when the first of them was fetched.
        is_open: whether a mount has it open.
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
    """A block that was not what was written, and is gone.

    Attributes:
        about: the file, as `CachedFile.about`.
        index: which block of it.
    """

    description: str
    index: int


def cached_files(root: Path) -> list[CachedFile]:
    """Return what is kept, the most recently used first.

    Raises:
        OSError: the cache cannot be read.
    """
    found = [
        CachedFile(
            about,
            length_bytes,
            sum(max(file.length_bytes - TRAILER_BYTES, 0) for file in _blocks(files)),
            sum(file.size_bytes for file in files),
            len(_blocks(files)),
            max(file.last_access_ns for file in files),
            min(file.fetched_ns for file in files),
            _is_open(root / folder),
        )
        for folder, about, length_bytes, files in _folders(root)
    ]
    return sorted(found, key=lambda each: -each.last_access_ns)


def verify(root: Path, matches: Callable[[str], bool]) -> tuple[int, list[CorruptBlock]]:
    """Look at every block, and remove those that are not what was written or cannot be read.

    Args:
        root: the folder of the cache.
        matches: tells of a file, by what it is, whether it is to be looked at.

    Returns:
        how many blocks are sound, and which were not.

    Raises:
        OSError: the cache cannot be read, or not changed.
    """
    sound, bad = 0, []
    for folder, about, _, files in _folders(root):
        for file in sorted(_blocks(files), key=_index_of) if matches(about) else ():
            try:
                is_good = _is_good(folder, file)
            except FileNotFoundError:  # a mount made room
                continue
            if is_good:
                sound += 1
                continue
            with suppress(FileNotFoundError):
                os.unlink(file.path)
            bad.append(CorruptBlock(about, _index_of(file)))
    return sound, bad


def clear(root: Path, matches: Callable[[str], bool]) -> int:
    """Remove what is kept, and return how many bytes that frees.

    Args:
        root: the folder of the cache.
        matches: tells of a file, by what it is, whether it is to go.

    Raises:
        OSError: the cache cannot be read, or not changed.
    """
    freed_bytes = 0
    for folder, about, _, files in _folders(root):
        if not matches(about):
            continue
        for file in files:
            with suppress(FileNotFoundError):
                os.unlink(file.path)
                freed_bytes += file.size_bytes
        hold = hold_alone(root / folder)
        if hold.is_free:
            remove_folder(root / folder)
        hold.close()
    return freed_bytes


def _folders(root: Path) -> Iterator[tuple[str, str, int | None, list[CacheFileInfo]]]:
    """Yield the name of each folder that holds something, what it is of, its length, and all."""
    by_folder: dict[str, list[CacheFileInfo]] = {}
    for file in scan_cache(root):
        by_folder.setdefault(file.folder, []).append(file)
    for folder, files in by_folder.items():
        yield folder, *read_about(root / folder), files


def _blocks(files: list[CacheFileInfo]) -> list[CacheFileInfo]:
    return [file for file in files if file.index is not None]


def _index_of(file: CacheFileInfo) -> int:
    assert file.index is not None
    return file.index


def _is_good(folder: str, file: CacheFileInfo) -> bool:
    """Tell whether a block can be read, and is what was written.

    Raises:
        FileNotFoundError: it is gone.
        PermissionError: it is somebody else's.
    """
    try:
        fd = open_regular(file.path, os.O_RDONLY)
        try:
            return is_intact(fd, folder, _index_of(file))
        finally:
            os.close(fd)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:  # the disk cannot read it, or it is no file
        return False


def _is_open(folder: Path) -> bool:
    hold = hold_alone(folder)
    hold.close()
    return not hold.is_free
