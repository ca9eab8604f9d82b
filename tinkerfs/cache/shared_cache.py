"""Cache of the blocks of remote files in a directory that many hosts share.

    shared/<file>/...    see `extent_files`

The files never change, so hosts need no common index. What this host knows of a directory may be
old: an extent that it does not know of is looked up before it is downloaded, and one that another
host has evicted is downloaded again. An extent is read and verified as a whole, and stays in memory
for the reads that follow.

No method raises for errors of the file system, and none waits longer than `BoundedAccess` allows.
All classes are thread-safe.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TypeVar

from tinkerfs import errors, operating_system
from tinkerfs.cache import extent_files
from tinkerfs.cache.blocks import BlocksWriter, FileBlocks
from tinkerfs.cache.data_files import BlockingSection
from tinkerfs.cache.data_layout import (
    BLOCK_BYTES,
    OVERHEAD_BYTES,
    UNIT_BYTES,
    UNITS_PER_BLOCK,
    DataLayout,
    units_of,
    units_of_block,
)
from tinkerfs.cache.eviction import remove_data
from tinkerfs.cache.extent_files import Extent
from tinkerfs.cache.file_locks import FileLocks
from tinkerfs.cache.shared_directory import SharedDirectory
from tinkerfs.cache.shared_writer import SharedWriter
from tinkerfs.concurrency import run_in_thread

T = TypeVar("T")

#: Part of the key of each file; another format of the files has another number.
_FORMAT = 1

#: Minimum age of a listing before it is read again, seconds.
_LISTING_TTL_S = 5.0

#: Minimum time between two checks that the directory exists, which are several requests, seconds.
_ENSURED_TTL_S = 5.0

#: Number of blocks that are loaded ahead of a sequential reader.
_AHEAD_BLOCKS = 4

_PLAIN = DataLayout()


class SharedBlockCache(SharedDirectory):
    """Caches blocks of files for many hosts; see `SharedDirectory`."""

    def open(
        self,
        key: str,
        description: str,
        length_bytes: int | None = None,
        layout: DataLayout = _PLAIN,
    ) -> "SharedBlockFile":
        """Return the file of `key`; see `Blocks.open`."""
        del layout  # no extent is handed to the kernel
        length = "" if length_bytes is None else str(length_bytes)
        about = f"{description}\n{length}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(f"shared {_FORMAT} {key}".encode("utf-8", "surrogatepass"))
        return SharedBlockFile(self, digest.hexdigest()[:40], about, length_bytes)

    def open_record(self, key: str, description: str) -> "SharedBlockFile | None":
        """Return the record of `key`; see `Blocks.open_record`."""
        return self.open(f"record {key}", description) if self.is_on else None


class SharedBlockFile(FileBlocks):
    """The cached bytes of one file; see `FileBlocks`."""

    def __init__(
        self, cache: SharedBlockCache, name: str, about: bytes, length_bytes: int | None
    ) -> None:
        self._cache = cache
        self._name = name
        self._about = about
        self._directory = str(cache.directory / name)
        self._length_bytes = length_bytes
        self._opening = threading.Lock()
        self._locks: FileLocks | None = None  # set under _opening by the first access
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._known: dict[int, set[Extent]] = {}  # by block
        self._loading: set[Extent] = set()
        self._listed_at = self._ensured_at = float("-inf")

    # What callers know of the file without an access.

    def has(self, index: int) -> bool:
        """Return whether all of a block is cached; see `FileBlocks.has`."""
        units = self._units(index)
        return not self.missing(units[:1] if self._length_bytes is None else units)

    def missing(self, units: range, end: int | None = None) -> range:
        """Return the units that are not cached; see `FileBlocks.missing`.

        Without `end`, extents that other hosts have stored or evicted lately are unknown.
        """
        self._open()
        if end is not None:
            self._access(partial(self._look_up, units), None)
        missing = [unit for unit in units if not self._is_cached(unit, end)]
        return range(missing[0], missing[-1] + 1) if missing else range(units.start, units.start)

    def cached_bytes(self, start: int, stop: int) -> int:
        """Return how many of the bytes [start, stop) are cached; see `missing`."""
        self._open()
        return sum(
            min(stop, (unit + 1) * UNIT_BYTES) - max(start, unit * UNIT_BYTES)
            for unit in units_of(start, stop)
            if self._is_cached(unit, None)
        )

    # Reads.

    def read_into(
        self,
        index: int,
        start: int,
        buffer: memoryview,
        length: int,
        blocking: BlockingSection = nullcontext,
    ) -> bool:
        """Fill `buffer` from a block; see `FileBlocks.read_into`."""
        self._open(blocking)
        if not start:
            self._load_ahead(index)
        offset, end = index * BLOCK_BYTES + start, index * BLOCK_BYTES + length
        while buffer:
            found = self._load_unit(offset // UNIT_BYTES, end, blocking)
            if found is None:
                return False
            extent, data = found
            part = memoryview(data)[offset - extent.first * UNIT_BYTES :][: len(buffer)]
            if not part:
                return False
            buffer[: len(part)] = part
            buffer, offset = buffer[len(part) :], offset + len(part)
        return True

    def read_record(self) -> bytes | None:
        """Return the data of block 0; see `BlockRecord`."""
        self._open()
        self._access(self._refresh, None)
        for extent in self._find_all(0):
            data = self._access(partial(self._read, extent), None)
            if data is not None:
                return data
        return None

    def backing_fd(
        self,
        start: int,
        stop: int,
        max_verified_bytes: float = 0.0,
        blocking: BlockingSection = nullcontext,
    ) -> None:
        """Return None: the kernel's reads of a descriptor would hang with the file system."""
        del start, stop, max_verified_bytes, blocking

    # Writes.

    def begin_write(self, start: int, length: int) -> SharedWriter | None:
        """Return a writer, None if nothing can be stored; see `FileBlocks.begin_write`."""
        del length  # space is reserved when the data is stored, because that may hang
        if not self._cache.is_on or self._cache.access.is_set_aside:
            return None
        return SharedWriter(start, self._store)

    def commit(self, writer: BlocksWriter) -> bool:
        """Store completely written units; return whether they are on disk."""
        try:
            return writer.commit()
        except OSError as error:
            self.report(error)
            return False

    def commit_part(self, writer: BlocksWriter) -> None:
        """Store the units that are complete, so that the next download can resume."""
        with suppress(OSError):  # the next download starts at the beginning
            writer.commit_complete_units()

    def drop(self, index: int) -> None:
        """Remove a block."""
        self._access(partial(self._remove, units_of_block(index)), None)

    def drop_all(self) -> None:
        """Remove all blocks."""
        with self._lock:
            known = set().union(*self._known.values())
            self._known.clear()
        for extent in known:
            self._cache.loaded.discard((self._name, extent))
        self._access(partial(remove_data, self._directory), None)

    # Locks.

    @contextmanager
    def lock_units(self, units: range, timeout_s: float) -> Iterator[bool]:
        """Lock units against downloads by other hosts; see `FileBlocks.lock_units`."""
        self._open()
        is_free = True
        lock: AbstractContextManager[bool] | None = None
        if self._locks is not None:
            lock = self._locks.lock_units(units, timeout_s)
            release = partial(lock.__exit__, None, None, None)
            try:
                is_free = self._cache.access.run(
                    lock.__enter__, extra_s=timeout_s, on_late=lambda _is_free: release()
                )
            except OSError:
                lock = None  # the file system hangs
        try:
            yield is_free
        finally:
            if lock is not None:
                self._cache.access.finish(release)

    def ensure_directory(self) -> None:
        """Create the directory and the lock file, so that other hosts see the locks."""
        self._open()
        is_due = time.monotonic() - self._ensured_at >= _ENSURED_TTL_S
        if self._locks is not None and is_due:
            self._access(self._ensure_directory, None)

    def close(self) -> None:
        """Allow the eviction of the file. No other method may be called afterwards."""
        if self._locks is not None:
            self._cache.access.finish(self._close)

    def report(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        if not errors.is_timeout(error):  # which `BoundedAccess` reports, once for each outage
            self._cache.report_once(error)

    # The following methods access no file system.

    def _access(self, work: Callable[[], T], absent: T) -> T:
        """Return the result of work on the file system, or `absent` after an error."""
        try:
            return self._cache.access.run(work)
        except OSError as error:
            self.report(error)
            return absent

    def _open(self, blocking: BlockingSection = nullcontext) -> None:
        """Read the directory, unless that was done."""
        if self._locks is None:
            with blocking():
                self._access(self._open_directory, None)

    def _units(self, index: int) -> range:
        """Return the units of a block, of which there are fewer at the end of the file."""
        start = index * BLOCK_BYTES
        if self._length_bytes is None:
            return units_of_block(index)
        return units_of(start, min(start + BLOCK_BYTES, self._length_bytes))

    def _find_all(self, unit: int) -> list[Extent]:
        """Return the known extents with a unit, the largest first."""
        with self._lock:
            extents = self._known.get(unit // UNITS_PER_BLOCK, ())
            found = [each for each in extents if each.first <= unit < each.stop]
        return sorted(found, key=lambda each: each.first - each.stop)

    def _find(self, unit: int) -> Extent | None:
        """Return the largest known extent with a unit."""
        return next(iter(self._find_all(unit)), None)

    def _is_cached(self, unit: int, end: int | None) -> bool:
        """Return whether a unit is cached; with `end`, whether it is intact."""
        if end is not None:
            return self._load_unit(unit, end) is not None
        hangs, loaded = self._cache.access.is_set_aside, self._cache.loaded
        return any(not hangs or (self._name, each) in loaded for each in self._find_all(unit))

    def _load_unit(
        self, unit: int, end: int, blocking: BlockingSection = nullcontext
    ) -> tuple[Extent, bytes] | None:
        """Return an extent with a unit, and its data; see `_load`."""
        for extent in self._find_all(unit):
            data = self._load(extent, end, blocking)
            if data is not None:
                return extent, data
        return None

    def _load(
        self, extent: Extent, end: int, blocking: BlockingSection = nullcontext
    ) -> bytes | None:
        """Return the data of an extent in a block that ends at `end` or after it; None if absent.

        Args:
            end: offset of the end of the block, or of the file.
            blocking: entered while the file is read.
        """
        data = self._cache.loaded.get((self._name, extent))
        if data is None:
            with blocking():
                data = self._access(partial(self._read, extent), None)
        if data is not None and len(data) != extent.expected_bytes(end):
            self._forget(extent)  # of a file of another length; a download replaces it
            return None
        return data

    def _load_ahead(self, index: int) -> None:
        """Start to load the blocks after one, if the block before it was read."""
        previous = self._find(index * UNITS_PER_BLOCK - 1)
        if previous is None or (self._name, previous) not in self._cache.loaded:
            return
        for block in range(index + 1, index + 1 + _AHEAD_BLOCKS):
            extent = self._find(block * UNITS_PER_BLOCK)
            if extent is None or (self._name, extent) in self._cache.loaded:
                continue
            with self._lock:
                if extent in self._loading:
                    continue
                self._loading.add(extent)
            run_in_thread(partial(self._read_ahead, extent), f"extent {extent.name}")

    def _remember(self, extents: Iterable[Extent]) -> None:
        with self._lock:
            for extent in extents:
                self._known.setdefault(extent.block, set()).add(extent)

    def _forget(self, extent: Extent) -> None:
        self._cache.loaded.discard((self._name, extent))
        with self._lock:
            self._known.get(extent.block, set()).discard(extent)

    def _store(self, extent: Extent, data: bytes) -> bool:
        self._open()
        return self._cache.access.run(partial(self._write, extent, data))

    # The following methods run in threads of their own, because they may hang.

    def _open_directory(self) -> None:
        with self._opening:
            if self._locks is not None:
                return
            locks = FileLocks(
                self._directory,
                self._about,
                self._cache.report_once,
                may_create=self._cache.is_on,
                has_locks=self._cache.has_locks,
            )
            with suppress(OSError):
                extent_files.mark_used(self._directory)
                extent_files.remove_abandoned(self._directory)
            self._list()
            self._locks = locks

    def _ensure_directory(self) -> None:
        assert self._locks is not None
        self._locks.ensure()
        with suppress(OSError):
            extent_files.mark_used(self._directory)
        self._ensured_at = time.monotonic()

    def _close(self) -> None:
        with suppress(OSError):
            extent_files.mark_used(self._directory)
        assert self._locks is not None
        self._locks.close()

    def _list(self) -> None:
        """Replace what is known by what is there."""
        listed_at = time.monotonic()
        extents = extent_files.list_extents(self._directory)
        with self._lock:
            self._known.clear()
            self._listed_at = listed_at
        self._remember(extents)

    def _refresh(self) -> None:
        with suppress(FileNotFoundError):
            operating_system.revalidate_directory(self._directory)
        self._list()

    def _look_up(self, units: range) -> None:
        """Find and load extents with some units of a block that other hosts have stored."""
        if all(self._find(unit) for unit in units):
            return
        try:
            operating_system.revalidate_directory(self._directory)
        except FileNotFoundError:
            return
        block = self._units(units.start // UNITS_PER_BLOCK)
        for candidate in dict.fromkeys((block, units)):
            if self._read(Extent(candidate.start, candidate.stop)) is not None:
                return
        if time.monotonic() - self._listed_at >= _LISTING_TTL_S:
            self._list()

    def _read(self, extent: Extent) -> bytes | None:
        """Return the data of an extent; None if it is absent."""
        key = (self._name, extent)
        with self._cache.loading(key):
            data = self._cache.loaded.get(key)
            if data is None:
                data = self._read_file(extent)
                if data is not None:
                    self._cache.loaded.put(key, data)
                    self._cache.count("shared_cache_blocks_read")
        if data is None:
            self._forget(extent)
        else:
            self._remember((extent,))
        return data

    def _read_file(self, extent: Extent) -> bytes | None:
        """Read and verify an extent, and remove it if it is corrupt.

        A second attempt reads the file that has replaced the first one meanwhile, and shows that a
        mismatch is not one of this host's memory only.
        """
        for is_last in (False, True):
            try:
                data = extent_files.read_extent(
                    self._directory, self._name, extent, self._cache.owner
                )
            except OSError as error:
                if errors.is_missing(error):
                    return None
                if not errors.is_stale(error):
                    raise
                if is_last:
                    return None
            else:
                if data is not None:
                    return data
        with suppress(OSError):
            os.unlink(f"{self._directory}/{extent.name}")
        self._cache.report_corrupt(self._directory)
        return None

    def _read_ahead(self, extent: Extent) -> None:
        try:
            self._read(extent)
        except OSError:  # the reader will report it
            pass
        finally:
            with self._lock:
                self._loading.discard(extent)

    def _write(self, extent: Extent, data: bytes) -> bool:
        """Store an extent; return False if there is no space."""
        size_bytes = len(data) + OVERHEAD_BYTES
        if not self._cache.reserve_space(size_bytes):
            return False
        try:
            try:
                extent_files.write_extent(self._directory, self._name, extent, data)
            except FileNotFoundError:  # another host has removed the directory
                self._ensure_directory()
                extent_files.write_extent(self._directory, self._name, extent, data)
        finally:
            self._cache.release_space(size_bytes)
        self._cache.loaded.put((self._name, extent), data)
        self._remember((extent,))
        self._cache.count("shared_cache_blocks_stored")
        for part in self._parts_of(extent):
            self._remove_extent(part)
        return True

    def _parts_of(self, extent: Extent) -> list[Extent]:
        """Return the known extents that a new one makes superfluous."""
        with self._lock:
            known = self._known.get(extent.block, ())
            return [
                each
                for each in known
                if each != extent and extent.first <= each.first and each.stop <= extent.stop
            ]

    def _remove(self, units: range) -> None:
        """Remove all extents with any of some units."""
        self._list()
        for unit in units:
            while (extent := self._find(unit)) is not None:
                self._remove_extent(extent)

    def _remove_extent(self, extent: Extent) -> None:
        self._forget(extent)
        with suppress(OSError):
            os.unlink(f"{self._directory}/{extent.name}")
