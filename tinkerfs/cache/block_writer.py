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
        #: Bytes of a unit that is stored already, and not overwritten: others may read it.
        self._held = bytearray()
        self._checksum = checksum_of(name, self._first)
        files.begin_writing()

    def write(self, data: bytes | memoryview) -> None:
        """Append data.

        Raises:
            OSError: the disk rejects the data; `read_back` still returns the data before it.
        """
        size_bytes = self._size_bytes
        with memoryview(data) as rest:
            while rest:
                chunk = rest[: UNIT_BYTES - size_bytes % UNIT_BYTES]
                self._checksum.update(chunk)
                if self._stored[len(self._records)].length:
                    self._held += chunk
                else:
                    self._files.write(chunk, self.start + size_bytes)
                size_bytes += len(chunk)
                if not size_bytes % UNIT_BYTES:
                    self._end_unit(UNIT_BYTES)
                rest = rest[len(chunk) :]
        self._size_bytes = size_bytes

    def read_back(self) -> bytes:
        """Return all data that was written.

        Raises:
            OSError: a data file cannot be read.
        """
        complete = len(self._records)
        held = b""
        if complete * UNIT_BYTES < self._size_bytes and self._stored[complete].length:
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
