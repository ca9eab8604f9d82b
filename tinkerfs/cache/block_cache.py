"""Cache of the bytes of remote files on disk, shared by all mounts of a user.

    blocks/<file>/about           description of the file; its last line is the length, or empty
                  lock            byte 0: shared lock of every process that has the file open;
                                  byte 1 + n: lock of the process that downloads unit n
                  layout, index   see `data_files`
                  0, 1, ...       the bytes, at their offsets in a remote file or in one of its
                                  members

A unit is valid once this process has verified its checksum; it is verified again after
the data file was changed by another one. Recency is the access time of `index`, which is set
when the file is opened and closed, because most file systems are mounted with `relatime`.

No method raises for disk errors. A unit that cannot be read or written is downloaded again, and
the error is reported once. All classes are thread-safe.
"""

import hashlib
import math
import threading
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from pathlib import Path

from tinkerfs.cache.block_writer import BlockWriter
from tinkerfs.cache.blocks import BlocksWriter, FileBlocks
from tinkerfs.cache.data_files import BlockingSection, DataFiles, Verification
from tinkerfs.cache.data_layout import (
    BLOCK_BYTES,
    OVERHEAD_BYTES,
    UNIT_BYTES,
    DataLayout,
    units_of,
    units_of_block,
)
from tinkerfs.cache.directory import can_lock_files
from tinkerfs.cache.eviction import remove_data
from tinkerfs.cache.file_locks import FileLocks
from tinkerfs.cache.space import CacheSpace
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.telemetry import Telemetry

#: Maximum number of files with a record of verified units; the record is cleared beyond it.
_MAX_VERIFICATIONS = 4096

#: A scan is due after this share (one nth) of the bound was added.
_SCAN_SHARE = 32

#: Part of the key of each file; another format of the files has another number.
_FORMAT = 2

_PLAIN = DataLayout()


class BlockCache(CacheSpace):
    """Caches blocks of files on disk, for one host; see `CacheSpace`."""

    def __init__(
        self,
        directory: Path | None,
        telemetry: Telemetry,
        clock: Clock = SYSTEM_CLOCK,
        *,
        max_bytes: int,
        min_free_bytes: int,
    ) -> None:
        super().__init__(
            directory,
            telemetry,
            clock,
            max_bytes=max_bytes,
            min_free_bytes=min_free_bytes,
            has_locks=directory is not None and max_bytes > 0 and can_lock_files(directory),
            scan_share=_SCAN_SHARE,
        )
        self._verifications: dict[str, Verification] = {}  # guarded by _lock

    def open(
        self,
        key: str,
        description: str,
        length_bytes: int | None = None,
        layout: DataLayout = _PLAIN,
    ) -> "BlockFile":
        """Return the file of `key`. It is not evicted until it is closed.

        Args:
            key: identifies the content; another version of a file needs another key.
            description: text for users.
            length_bytes: length of the whole file; None if unknown.
            layout: of new data files; those that exist keep theirs.
        """
        length = "" if length_bytes is None else str(length_bytes)
        about = f"{description}\n{length}".encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(f"{_FORMAT} {key}".encode("utf-8", "surrogatepass"))
        return BlockFile(self, digest.hexdigest()[:40], about, length_bytes, layout)

    def open_record(self, key: str, description: str) -> None:
        """Return None: the metadata store has the records of one host."""
        del key, description

    def verification(self, name: str, *, is_new: bool = False) -> Verification:
        """Return what this process has verified of a file; nothing if its data `is_new`."""
        with self._lock:
            if len(self._verifications) >= _MAX_VERIFICATIONS:
                self._verifications.clear()
            if is_new:
                self._verifications.pop(name, None)
            return self._verifications.setdefault(name, Verification())

    def now_ns(self) -> int:
        """Return the time, nanoseconds since 1970."""
        return int(self._clock.now() * 1e9)


class BlockFile(FileBlocks):
    """The cached bytes of one file, which are not evicted until it is closed.

    Any run of units is stored and looked up. Blocks are only the usual length of such a run.
    """

    def __init__(
        self,
        cache: BlockCache,
        name: str,
        about: bytes,
        length_bytes: int | None,
        layout: DataLayout,
    ) -> None:
        self._cache = cache
        self._name = name
        self._directory = str(cache.directory / name)
        self._length_bytes = length_bytes
        self._wanted_layout = layout
        self._verification = cache.verification(name)
        self._lock = threading.Lock()
        #: Replaced under _lock after another process removed them.
        self._files: DataFiles | None = None
        self._locks = FileLocks(
            self._directory,
            about,
            cache.report_once,
            may_create=cache.is_on,
            has_locks=cache.has_locks,
        )

    def close(self) -> None:
        """Allow the eviction of the file. No other method may be called afterwards."""
        if self._files is not None:
            with suppress(OSError):
                self._files.touch(self._cache.now_ns())
        self._files = None
        self._locks.close()

    def has(self, index: int) -> bool:
        """Return whether all of block `index` is cached; it is verified when it is read."""
        return not self.missing(self._units(index))

    def missing(self, units: range, end: int | None = None) -> range:
        """Return the units from the first to the last one that is not cached.

        Args:
            units: not empty.
            end: if given, cached units are verified, the last of which ends there or before it.
        """
        try:
            files = self._files or self._open_files()
            if files is None:
                return units
            missing = [
                unit
                for unit, record in zip(units, files.records(units), strict=True)
                if not record.length or (end is not None and not self._is_intact(files, unit, end))
            ]
        except FileNotFoundError:  # another process has removed it
            self._forget_files()
            return units
        except OSError:  # `read_into` will report it
            return units
        return range(missing[0], missing[-1] + 1) if missing else range(units.start, units.start)

    def cached_bytes(self, start: int, stop: int) -> int:
        """Return how many of the bytes [start, stop) are cached; see `has`."""
        units = units_of(start, stop)
        try:
            files = self._files or self._open_files()
            records = [] if files is None else files.records(units)
        except OSError:  # `read_into` will report it
            return 0
        return sum(
            min(stop, (unit + 1) * UNIT_BYTES) - max(start, unit * UNIT_BYTES)
            for unit, record in zip(units, records, strict=False)
            if record.length
        )

    def read_into(
        self,
        index: int,
        start: int,
        buffer: memoryview,
        length: int,
        blocking: BlockingSection = nullcontext,
    ) -> bool:
        """Fill `buffer` from a block; see `FileBlocks.read_into`."""
        try:
            files = self._files or self._open_files()
            if files is None:
                return False
            offset, size = index * BLOCK_BYTES + start, len(buffer)
            units = units_of(offset, offset + size)
            parts = files.layout.split(offset, size)
            is_read = files.is_verified(units.start, units.stop) and files.read(
                buffer, parts, blocking
            )
            if files.is_unchanged(parts) and is_read:
                return True
            end = index * BLOCK_BYTES + length
            # After a failure only the units that are corrupt are dropped, and not the others.
            return files.read_verified(buffer, offset, end, blocking) or (
                self._verify(files, units, end, blocking)
                and files.read_verified(buffer, offset, end, blocking)
            )
        except FileNotFoundError:  # another process has removed it
            self._forget_files()
            return False
        except OSError as error:
            self._cache.report_once(error)
            return False

    def backing_fd(
        self,
        start: int,
        stop: int,
        max_verified_bytes: float = math.inf,
        blocking: BlockingSection = nullcontext,
    ) -> int | None:
        """Return a new descriptor of the data file with exactly the bytes [start, stop).

        The caller closes it. None if there is no such file, if a byte is missing or corrupt, or if
        the file is longer than `max_verified_bytes` and was not verified before.
        """
        size_bytes = self._length_bytes
        try:
            files = self._files or self._open_files()
            if files is None or size_bytes is None:
                return None
            number = files.layout.file_of(start, stop, size_bytes)
            units = units_of(start, stop)
            if number is None:
                return None
            if not files.is_verified(units.start, units.stop) and (
                stop - start > max_verified_bytes
                or not all(record.length for record in files.records(units))
            ):
                return None
            parts = files.layout.split(start, stop - start)
            files.is_unchanged(parts)
            is_intact = self._verify(files, units, size_bytes, blocking)
            if not is_intact or not files.is_unchanged(parts):
                return None
            return files.dup(number, stop - start)
        except FileNotFoundError:  # another process has removed it
            self._forget_files()
            return None
        except OSError as error:
            self._cache.report_once(error)
            return None

    def begin_write(self, start: int, length: int) -> BlockWriter | None:
        """Return a writer for the units of [start, start + length), to be closed.

        None if they do not fit.
        """
        try:
            size_bytes = length + OVERHEAD_BYTES
            if not self._cache.reserve_space(size_bytes):
                return None
            try:
                return self._begin(start, length, size_bytes)
            except BaseException:
                self._cache.release_space(size_bytes)
                raise
        except OSError as error:
            self._cache.report_once(error)
            return None

    def commit(self, writer: BlocksWriter) -> bool:
        """Store completely written units; return whether they are on disk."""
        try:
            if writer.commit():
                return True
            # Another process has removed the files.
            data = writer.read_back()
            with closing(self._begin(writer.start, len(data), 0)) as second_writer:
                second_writer.write(data)
                return second_writer.commit()
        except OSError as error:
            self._cache.report_once(error)
            return False

    def commit_part(self, writer: BlocksWriter) -> None:
        """Store the units that are complete, so that the next download can resume."""
        with suppress(OSError):  # the next download starts at the beginning
            writer.commit_complete_units()

    def report(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        self._cache.report_once(error)

    def drop(self, index: int) -> None:
        """Remove a block."""
        self._drop(self._files or self._open_files(), units_of_block(index))

    def drop_all(self) -> None:
        """Remove all blocks; a process that reads them keeps the old data until then."""
        remove_data(self._directory)
        self._forget_files()

    def lock_units(self, units: range, timeout_s: float) -> AbstractContextManager[bool]:
        """Return a context manager that locks units against other processes.

        Its body runs even if the lock is not free within `timeout_s` seconds, because a second
        download does no harm. The caller should check whether the units are cached by then.

        Its value is whether no other process is known to download any of the units.
        """
        return self._locks.lock_units(units, timeout_s)

    def ensure_directory(self) -> None:
        """Create the directory and the lock file, so that other processes see the locks."""
        self._locks.ensure()

    def _units(self, index: int) -> range:
        """Return the units of a block, of which there are fewer at the end of the file."""
        if self._length_bytes is None:
            return units_of_block(index)[:1]
        start = index * BLOCK_BYTES
        return units_of(start, min(start + BLOCK_BYTES, self._length_bytes))

    def _verify(
        self, files: DataFiles, units: range, end: int, blocking: BlockingSection = nullcontext
    ) -> bool:
        """Return whether units are intact, the last of which ends at `end` or before it."""
        if files.is_verified(units.start, units.stop):
            return True
        return all(self._verify_unit(files, unit, end, blocking) for unit in units)

    def _is_intact(self, files: DataFiles, unit: int, end: int) -> bool:
        """Return whether the data of a unit, which ends at `end` or before it, is intact."""
        start = unit * UNIT_BYTES
        files.is_unchanged(files.layout.split(start, min(UNIT_BYTES, end - start)))
        return self._verify(files, range(unit, unit + 1), end)

    def _verify_unit(
        self, files: DataFiles, unit: int, end: int, blocking: BlockingSection
    ) -> bool:
        """Return whether a unit that ends at `end` or before it is intact; drop it if corrupt."""
        if not files.records(range(unit, unit + 1))[0].length:
            return False
        start = unit * UNIT_BYTES
        view = memoryview(bytearray(min(UNIT_BYTES, end - start)))
        is_intact = files.read_verified(view, start, end, blocking)
        if not is_intact:
            self._drop(files, range(unit, unit + 1))
            self._cache.report_corrupt(self._directory)
        return is_intact

    def _drop(self, files: DataFiles | None, units: range) -> None:
        if files is not None:
            with suppress(OSError):
                files.drop_records(units)

    def _forget_files(self) -> None:
        self._files = None
        # A thread may still verify the old data, and its result must not count for the new data.
        self._verification = self._cache.verification(self._name, is_new=True)

    def _open_files(self) -> DataFiles | None:
        """Return the open files; None if there are none yet.

        Raises:
            OSError: the files cannot be opened.
        """
        with self._lock:
            if self._files is None:
                with suppress(FileNotFoundError):
                    self._files = self._new_files(None)
            return self._files

    def _new_files(self, wanted: DataLayout | None) -> DataFiles:
        files = DataFiles(self._directory, self._name, wanted, self._verification)
        with suppress(OSError):
            files.touch(self._cache.now_ns())
        return files

    def _begin(self, start: int, length: int, reserved_bytes: int) -> BlockWriter:
        with self._lock:
            files = self._files
            if files is None or files.is_removed():
                self._forget_files()
                self._locks.ensure()
                files = self._files = self._new_files(self._wanted_layout)
        release_space = partial(self._cache.release_space, reserved_bytes)
        return BlockWriter(files, self._name, start, length, on_close=release_space)
