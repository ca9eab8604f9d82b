"""The files in one directory of the block cache, and which of their bytes are valid.

    layout     the ranges with data files of their own, see `layout`; decides which process created
               the directory
    index      for each unit of the remote file: its checksum, and its length; zeros if not cached
    0, 1, ...  the data files, which are sparse

Data is written before its record. So a process that is killed leaves at most data without a record,
and a record that is only half written does not match its data.
"""

import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from xxhash import xxh3_64

from tinkerfs import errors
from tinkerfs.cache.data_layout import UNIT_BYTES, DataLayout, Part, decode_layout, units_of
from tinkerfs.operating_system import NOWAIT
from tinkerfs.safe_open import is_regular, open_regular, read_regular

#: Returns a context manager that is entered during a wait.
BlockingSection = Callable[[], AbstractContextManager[object]]

#: A record: XXH3 of 64 bits, which detects corruption and is an order of magnitude faster than
#: CRC-32 or SHA-256; the length; and padding.
_RECORD: Final = struct.Struct("<QII")
_MAX_LAYOUT_BYTES: Final = 16 << 10


class Record(NamedTuple):
    """What the index says of a unit; the length is 0 if the unit is not cached."""

    checksum: int
    length: int


@dataclass(slots=True)
class Verification:
    """The units of a directory that this process has verified.

    Attributes:
        units: 1 for each verified unit.
        signatures: inode and modification time of each data file at that time, by its number.
    """

    units: bytearray = field(default_factory=bytearray)
    signatures: dict[int, tuple[int, int]] = field(default_factory=dict)

    def has(self, first: int, stop: int) -> bool:
        """Return whether all units of [first, stop) were verified."""
        return stop <= len(self.units) and self.units.find(0, first, stop) < 0

    def add(self, units: Iterable[int]) -> None:
        """Record that units were verified."""
        for unit in units:
            if unit >= len(self.units):
                self.units.extend(bytes(unit + 1 - len(self.units)))
            self.units[unit] = 1

    def discard(self, units: range) -> None:
        """Record that units must be verified again."""
        stop = min(units.stop, len(self.units))
        self.units[units.start : stop] = bytes(max(stop - units.start, 0))

    def clear(self) -> None:
        """Record that nothing is verified."""
        self.discard(range(len(self.units)))

    def is_current(self, number: int, status: os.stat_result) -> bool:
        """Return whether a data file is as at the last call; otherwise nothing is verified."""
        signature, known = (status.st_ino, status.st_mtime_ns), self.signatures.get(number)
        if known == signature:
            return True
        if known is not None:
            self.clear()
        self.signatures[number] = signature
        return False


class DataFiles:
    """The open files of one directory, closed with the last reference to this object.

    So no reader can use a descriptor number that was closed and assigned again. Thread-safe.

    Args:
        directory: path of the directory.
        name: identifies the remote file; part of the checksums.
        wanted: the layout, unless the directory has one; None to open an existing directory only.
        verification: what this process has verified before.

    Raises:
        OSError: ENOENT if the directory has no files yet; EPERM if another user owns them.
    """

    def __init__(
        self, directory: str, name: str, wanted: DataLayout | None, verification: Verification
    ) -> None:
        self._index = -1
        self._fds: dict[int, int] = {}
        self._directory = directory
        self._name = name
        self._verification = verification
        self._lock = threading.Lock()
        #: Number of blocks that this process is writing, and of begins and ends of such writes.
        #: Changed under _lock, read without it.
        self._writers = self._write_changes = 0
        self._supports_nowait = bool(NOWAIT)
        if wanted is not None:
            _create_layout(directory, wanted)
        self.layout = _read_layout(directory)
        self._index = _open_owned(f"{directory}/index", creates=wanted is not None)

    def __del__(self) -> None:
        """Close the files."""
        for fd in (self._index, *self._fds.values()):
            if fd >= 0:
                os.close(fd)

    def is_removed(self) -> bool:
        """Return whether the directory was cleared since it was opened."""
        return not os.fstat(self._index).st_nlink

    def touch(self, now_ns: int) -> None:
        """Set the time of the last use, nanoseconds since 1970."""
        os.utime(self._index, ns=(now_ns, os.fstat(self._index).st_mtime_ns))

    def record_count(self) -> int:
        """Return the number of records, including those of units that are not cached."""
        return os.fstat(self._index).st_size // _RECORD.size

    def records(self, units: range) -> list[Record]:
        """Return the records of some units."""
        size = _RECORD.size
        data = os.pread(self._index, len(units) * size, units.start * size)
        data += bytes(len(units) * size - len(data))
        return [Record(checksum, length) for checksum, length, _ in _RECORD.iter_unpack(data)]

    def set_records(self, first: int, records: Sequence[Record]) -> None:
        """Record units after `write` has written their data."""
        self._write_records(first, records)

    def drop_records(self, units: range) -> None:
        """Record that units are not cached."""
        self._verification.discard(units)
        self._write_records(units.start, [Record(0, 0)] * len(units))

    def _write_records(self, first: int, records: Sequence[Record]) -> None:
        data = b"".join(_RECORD.pack(*record, 0) for record in records)
        _write_all(self._index, memoryview(data), first * _RECORD.size)

    def read(
        self, buffer: memoryview, parts: list[Part], blocking: BlockingSection = nullcontext
    ) -> bool:
        """Fill `buffer` with the bytes of `parts`; return whether the files are long enough.

        Args:
            parts: as `layout.split` returns them, with the length of the buffer in all.
            blocking: entered only if the data is not in the page cache.

        Raises:
            OSError: a data file does not exist or cannot be read.
        """
        if len(parts) == 1:
            return self._read_part(buffer, *parts[0][:2], blocking)
        done = 0
        for number, position, length in parts:
            if not self._read_part(buffer[done : done + length], number, position, blocking):
                return False
            done += length
        return True

    def write(self, data: memoryview, offset: int) -> None:
        """Write data at `offset` in the remote file, between `begin_writing` and `end_writing`.

        Raises:
            OSError: the disk rejects the data.
        """
        for number, position, length in self.layout.split(offset, len(data)):
            _write_all(self._fd(number, creates=True), data[:length], position)
            data = data[length:]

    def begin_writing(self) -> None:
        """Record that this process itself changes the data files from now on."""
        with self._lock:
            self._write_changes += 1
            self._writers += 1

    def end_writing(self) -> None:
        """End a `begin_writing`; after the last one, all units must be verified again."""
        with self._lock:
            try:
                if self._writers == 1:
                    self._verification.clear()
                    for number, fd in self._fds.items():
                        status = os.fstat(fd)
                        signature = (status.st_ino, status.st_mtime_ns)
                        self._verification.signatures[number] = signature
            finally:
                self._write_changes += 1
                self._writers -= 1

    def flush(self) -> None:
        """Report a failed write; on NFS the first `close` does.

        Raises:
            OSError: the disk has rejected data.
        """
        for fd in list(self._fds.values()):
            os.close(os.dup(fd))

    def is_verified(self, first: int, stop: int) -> bool:
        """Return whether the units of [first, stop) were verified, and this process writes none."""
        return not self._writers and self._verification.has(first, stop)

    def is_unchanged(self, parts: list[Part]) -> bool:
        """Return whether data is as it was at the last call; units verified since then are valid.

        To be called before units are verified, and after data was read that was verified earlier.

        Args:
            parts: the data, as `layout.split` returns it.

        Raises:
            FileNotFoundError: the data was removed.
            OSError: a data file cannot be read.
        """
        for number, _position, _length in parts:
            fd = self._fds.get(number) or self._fd(number)
            write_changes = self._write_changes
            status = os.fstat(fd)
            if not status.st_nlink:
                raise FileNotFoundError(self._directory)
            # The time changes with each write of this process, and hides other changes.
            if self._writers or self._write_changes != write_changes:
                return False
            if not self._verification.is_current(number, status):
                return False
        return True

    def read_verified(
        self, buffer: memoryview, offset: int, end: int, blocking: BlockingSection = nullcontext
    ) -> bool:
        """Fill `buffer` with the bytes at `offset`; return whether their units are intact.

        The checksums are computed from the buffer itself. Only what it lacks of its first and its
        last unit is read into other memory.

        Args:
            end: length of the remote file, or the end of the last unit.
            blocking: entered while the disk is read.

        Raises:
            OSError: a data file does not exist or cannot be read.
        """
        stop = offset + len(buffer)
        units = units_of(offset, stop)
        bounds = [(unit * UNIT_BYTES, min((unit + 1) * UNIT_BYTES, end)) for unit in units]
        records = self.records(units)
        if any(
            record.length != after - first
            for record, (first, after) in zip(records, bounds, strict=True)
        ):
            return False
        write_changes = self._write_changes
        first, after = bounds[0][0], bounds[-1][1]
        sections = [
            (memoryview(bytearray(offset - first)), first),
            (buffer, offset),
            (memoryview(bytearray(after - stop)), stop),
        ]
        for view, start in sections:
            if view and not self.read(view, self.layout.split(start, len(view)), blocking):
                return False
        for unit, record, (first, after) in zip(units, records, bounds, strict=True):
            checksum = checksum_of(self._name, unit)
            for view, start in sections:
                checksum.update(view[max(first - start, 0) : max(after - start, 0)])
            if checksum.intdigest() != record.checksum:
                return False
        if not self._writers and self._write_changes == write_changes:
            self._verification.add(units)
        return True

    def is_intact(self, unit: int) -> bool:
        """Return whether a unit is cached, can be read, and matches its checksum."""
        try:
            [record] = self.records(range(unit, unit + 1))
            if not 0 < record.length <= UNIT_BYTES:
                return False
            start, view = unit * UNIT_BYTES, memoryview(bytearray(record.length))
            return self.read_verified(view, start, start + record.length)
        except OSError:  # the disk cannot read it, or a data file is missing or not regular
            return False

    def dup(self, number: int, size_bytes: int) -> int | None:
        """Return a new descriptor of a data file, which the caller closes; they share an offset.

        None if the file has another size.

        Raises:
            OSError: there is no such file, or no descriptor is left.
        """
        fd = self._fd(number)
        return os.dup(fd) if os.fstat(fd).st_size == size_bytes else None

    def _read_part(
        self, view: memoryview, number: int, position: int, blocking: BlockingSection
    ) -> bool:
        fd = self._fds.get(number) or self._fd(number)
        if self._supports_nowait:
            try:
                if os.preadv(fd, (view,), position, NOWAIT) == len(view):
                    return True
            except BlockingIOError:
                pass  # none of the data is in the page cache
            except OSError:  # RWF_NOWAIT is unsupported, e.g. on tmpfs, or the read fails
                self._supports_nowait = False
        else:
            return os.preadv(fd, (view,), position) == len(view)
        with blocking():
            return os.preadv(fd, (view,), position) == len(view)

    def _fd(self, number: int, *, creates: bool = False) -> int:
        fd = self._fds.get(number)
        if fd is None:
            with self._lock:
                fd = self._fds.get(number)
                if fd is None:
                    fd = _open_owned(f"{self._directory}/{number}", creates=creates)
                    if not os.fstat(fd).st_size:  # new, perhaps in place of a removed file
                        self._verification.clear()
                    self._fds[number] = fd
        return fd


def checksum_of(name: str, unit: int) -> xxh3_64:
    """Return a new checksum that is seeded with the identity of the unit."""
    return xxh3_64(f"{name}/{unit}:".encode())


def open_replacing(path: str, flags: int) -> int:
    """Open or create a file of the cache; a file of another type is replaced.

    Raises:
        OSError: the file cannot be opened or created.
    """
    try:
        return open_regular(path, flags | os.O_CREAT)
    except OSError:
        if is_regular(path) or not os.path.lexists(path):
            raise
        remove(path)
        return open_regular(path, flags | os.O_CREAT)


def remove(path: str) -> None:
    """Remove a file of any type, or an empty directory.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        os.unlink(path)
    except OSError:
        os.rmdir(path)


def _create_layout(directory: str, wanted: DataLayout) -> None:
    """Create the layout file, unless there is one.

    Two processes may create different ones at the same time. The checksums of what the first one
    writes then do not match, and it is downloaded again.
    """
    path = f"{directory}/layout"
    if is_regular(path):
        return
    temporary = f"{directory}/.layout.{secrets.token_hex(8)}"
    with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(wanted.encode())
    try:
        if os.path.lexists(path):
            remove(path)
        os.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _read_layout(directory: str) -> DataLayout:
    """Return the layout on disk; one that is corrupt only makes checksums fail."""
    data = read_regular(f"{directory}/layout", _MAX_LAYOUT_BYTES)
    try:
        return decode_layout(data)
    except (ValueError, TypeError):
        return DataLayout()


def _open_owned(path: str, *, creates: bool) -> int:
    """Open a file, for writing if possible; refuse one that another user has put there."""
    if creates:
        fd = open_replacing(path, os.O_RDWR)
    else:
        try:
            fd = open_regular(path, os.O_RDWR)
        except OSError as error:
            if not errors.is_not_writable(error):
                raise
            fd = open_regular(path, os.O_RDONLY)
    if os.fstat(fd).st_uid != os.getuid():
        os.close(fd)
        raise errors.not_permitted(path, "the file belongs to another user")
    return fd


def _write_all(fd: int, rest: memoryview, offset: int) -> None:
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
