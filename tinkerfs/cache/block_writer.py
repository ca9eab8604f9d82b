"""Writer of units of a block: their data at its place in the data files, then their records."""

from collections.abc import Callable
from contextlib import suppress

from tinkerfs import errors
from tinkerfs.cache.data_files import DataFiles, Record, checksum_of
from tinkerfs.cache.data_layout import UNIT_BYTES, units_of


class BlockWriter:
    """Writes consecutive units; used by one thread, which must close it in any case.

    Args:
        name: identifies the file; part of the checksums.
        start: offset of the first unit.
        length: number of bytes of all units.
        on_close: called when the units are written or discarded.

    Attributes:
        start: offset of the first unit.
        is_in_memory: whether the data is in memory until it is committed.
    """

    is_in_memory = False

    def __init__(
        self, files: DataFiles, name: str, start: int, length: int, on_close: Callable[[], None]
    ) -> None:
        self.start = start
        self._on_close = on_close
        self._files = files
        self._name = name
        self._first = start // UNIT_BYTES
        self._size_bytes = 0
        #: Of the complete units, and of all units before the write.
        self._records: list[Record] = []
        self._stored = files.records(units_of(start, start + length))
        #: Usually none is, and a chunk is written by one call, although it has parts of many units.
        self._has_stored = any(record.length for record in self._stored)
        #: Bytes of a unit that is stored already, and not overwritten: others may read it.
        self._held = bytearray()
        self._checksum = checksum_of(name, self._first)
        files.begin_writing()

    def write(self, data: bytes | memoryview) -> None:
        """Append data.

        Raises:
            OSError: the disk rejects the data; `read_back` still returns the data before it.
        """
        with memoryview(data) as rest:
            while rest:
                chunk = rest
                if self._has_stored:
                    chunk = rest[: UNIT_BYTES - self._size_bytes % UNIT_BYTES]
                if self._is_held():
                    self._held += chunk
                else:
                    self._files.write(chunk, self.start + self._size_bytes)
                self._update_checksums(chunk)
                rest = rest[len(chunk) :]

    def read_back(self) -> bytes:
        """Return all data that was written.

        Raises:
            OSError: a data file cannot be read.
        """
        complete = len(self._records)
        held = b""
        if complete * UNIT_BYTES < self._size_bytes and self._is_held():
            held = bytes(self._held[: self._size_bytes - complete * UNIT_BYTES])
        data = bytearray(self._size_bytes - len(held))
        parts = self._files.layout.split(self.start, len(data))
        if data and not self._files.read(memoryview(data), parts):
            raise errors.corrupt("", "a data file was truncated while a block was written")
        return bytes(data) + held

    def commit(self) -> bool:
        """Record the data; return False if the directory was removed meanwhile.

        Raises:
            OSError: the disk has rejected the data.
        """
        if self._size_bytes % UNIT_BYTES:
            self._end_unit(self._size_bytes % UNIT_BYTES)
        return self.commit_complete_units()

    def commit_complete_units(self) -> bool:
        """Record the complete units; see `commit`."""
        self._files.flush()
        if self._files.is_removed():
            return False
        self._files.set_records(self._first, self._records)
        return True

    def close(self) -> None:
        """End writing; data without a record is not valid. To be called once."""
        with suppress(OSError):  # the files are then verified again
            self._files.end_writing()
        self._on_close()

    def _is_held(self) -> bool:
        """Return whether the current unit is stored already."""
        return bool(self._stored[len(self._records)].length)

    def _update_checksums(self, data: memoryview) -> None:
        """Record the units that data completes, once it is written or held."""
        while data:
            part = data[: UNIT_BYTES - self._size_bytes % UNIT_BYTES]
            self._checksum.update(part)
            self._size_bytes += len(part)
            if not self._size_bytes % UNIT_BYTES:
                self._end_unit(UNIT_BYTES)
            data = data[len(part) :]

    def _end_unit(self, length: int) -> None:
        record = Record(self._checksum.intdigest(), length)
        unit = self._first + len(self._records)
        if self._held and (
            record != self._stored[len(self._records)] or not self._files.is_intact(unit)
        ):
            self._files.write(memoryview(bytes(self._held)), unit * UNIT_BYTES)
        self._held.clear()
        self._records.append(record)
        self._checksum = checksum_of(self._name, self._first + len(self._records))
