"""Maintenance of the whole block cache by users: list, verify and clear it.

Mounts may use the cache at the same time; they download removed data again.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs.cache import extent_files
from tinkerfs.cache.about import read_about
from tinkerfs.cache.data_files import DataFiles, Record, Verification
from tinkerfs.cache.data_layout import UNIT_BYTES
from tinkerfs.cache.eviction import (
    CacheDirectoryInfo,
    remove_data,
    remove_directory,
    scan_cache,
    try_lock_exclusive,
)

#: Number of records that are read at a time.
_RECORDS = 16_384


@dataclass(frozen=True, slots=True)
class CachedFile:
    """The cached part of one version of one file.

    Attributes:
        description: text for users, recorded when the file was opened.
        length_bytes: length of the whole file, None if unknown.
        data_bytes: number of cached bytes of the file.
        size_bytes: space on disk.
        last_access_ns: time of the last read, nanoseconds since 1970.
        fetched_ns: time of the first download, nanoseconds since 1970.
        is_open: whether a mount has the file open.
    """

    description: str
    length_bytes: int | None
    data_bytes: int
    size_bytes: int
    last_access_ns: int
    fetched_ns: int
    is_open: bool


@dataclass(frozen=True, slots=True)
class CorruptRange:
    """Corrupt bytes that were removed.

    Attributes:
        description: of the file, see `CachedFile`.
        start, stop: their offsets in the remote file.
    """

    description: str
    start: int
    stop: int


def cached_files(root: Path) -> list[CachedFile]:
    """Return every cached file, the most recently used first.

    Raises:
        OSError: the cache cannot be read.
    """
    found = [
        CachedFile(
            description,
            length_bytes,
            _data_bytes(root, info.name, length_bytes),
            info.size_bytes,
            info.last_access_ns,
            info.created_ns,
            _is_open(root / info.name),
        )
        for info, description, length_bytes in _directories(root)
        if info.last_access_ns
    ]
    return sorted(found, key=lambda each: -each.last_access_ns)


def verify(root: Path, matches: Callable[[str], bool]) -> tuple[int, list[CorruptRange]]:
    """Verify all cached bytes, and remove those that are corrupt or unreadable.

    Args:
        root: directory of the cache.
        matches: whether to verify a file, by its description.

    Returns:
        the number of intact bytes, and the removed ranges.

    Raises:
        OSError: the cache cannot be read or changed.
    """
    intact_bytes, corrupt = 0, list[CorruptRange]()
    for info, description, _ in _directories(root):
        if not matches(description):
            continue
        with suppress(FileNotFoundError):  # evicted by a mount
            for start, stop, is_intact in (
                *_verified_units(str(root / info.name), info.name),
                *_verified_extents(str(root / info.name), info.name),
            ):
                if is_intact:
                    intact_bytes += stop - start
                else:
                    corrupt.append(CorruptRange(description, start, stop))
    return intact_bytes, corrupt


def clear(root: Path, matches: Callable[[str], bool]) -> int:
    """Remove cached files, and return the number of bytes freed.

    Args:
        root: directory of the cache.
        matches: whether to remove a file, by its description.

    Raises:
        OSError: the cache cannot be read or changed.
    """
    freed_bytes = 0
    for info, description, _ in _directories(root):
        if not matches(description):
            continue
        freed_bytes += info.size_bytes
        lock = try_lock_exclusive(root / info.name)
        (remove_directory if lock.is_free else remove_data)(root / info.name)
        lock.close()
    return freed_bytes


def _directories(root: Path) -> Iterator[tuple[CacheDirectoryInfo, str, int | None]]:
    """Yield (information, description, length) of each directory."""
    for info in scan_cache(root):
        yield info, *read_about(root / info.name)


def _records(files: DataFiles) -> Iterator[tuple[int, Record]]:
    """Yield each cached unit with its record."""
    for start in range(0, files.record_count(), _RECORDS):
        for unit, record in enumerate(files.records(range(start, start + _RECORDS)), start):
            if record.length:
                yield unit, record


def _verified_units(directory: str, name: str) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, whether it is intact) of each unit in data files; drop the others."""
    try:
        files = DataFiles(directory, name, None, Verification())
    except FileNotFoundError:  # a directory with extents
        return
    for unit, record in _records(files):
        is_intact = files.is_intact(unit)
        if not is_intact:
            files.drop_records(range(unit, unit + 1))
        start = unit * UNIT_BYTES
        yield start, start + record.length, is_intact


def _verified_extents(directory: str, name: str) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, stop, whether it is intact) of each extent; remove the others."""
    owner = os.stat(directory).st_uid
    for extent in sorted(extent_files.list_extents(directory)):
        start = extent.first * UNIT_BYTES
        try:
            data = extent_files.read_extent(directory, name, extent, owner)
        except FileNotFoundError:  # evicted by a mount
            continue
        except OSError:  # the disk cannot read it
            data = None
        if data is None:
            os.unlink(f"{directory}/{extent.name}")
        stop = extent.stop * UNIT_BYTES if data is None else start + len(data)
        yield start, stop, data is not None


def _data_bytes(root: Path, name: str, length_bytes: int | None) -> int:
    try:
        files = DataFiles(str(root / name), name, None, Verification())
        return sum(record.length for _unit, record in _records(files))
    except FileNotFoundError:
        pass  # a directory with extents
    except OSError:
        return 0
    units = {
        unit
        for extent in extent_files.list_extents(str(root / name))
        for unit in range(extent.first, extent.stop)
    }
    end = math.inf if length_bytes is None else length_bytes
    return sum(int(min(UNIT_BYTES, end - unit * UNIT_BYTES)) for unit in units)


def _is_open(directory: Path) -> bool:
    lock = try_lock_exclusive(directory)
    lock.close()
    return not lock.is_free
