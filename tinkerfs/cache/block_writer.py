"""Writer of a cached block: its data at its place in the data files, then its records."""

from collections.abc import Callable
from contextlib import suppress

from tinkerfs import errors
from tinkerfs.cache.data_files import DataFiles, Record, checksum_of
from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES, UNITS_PER_BLOCK


class BlockWriter:
    """Writes one block; used by one thread, which must close it in any case.

    Args:
        name: identifies the file; part of the checksums.
        index: block index.
        on_close: called when the block is written or discarded.
    """

    def __init__(
        self, files: DataFiles, name: str, index: int, on_close: Callable[[], None]
    ) -> None:
        self._on_close = on_close
        self._files = files
        self._name = name
        self._first = index * UNITS_PER_BLOCK
        self._start = index * BLOCK_BYTES
        self._size_bytes = 0
        #: Of the complete units, and of all units before the write.
        self._records: list[Record] = []
        self._stored = files.records(range(self._first, self._first + UNITS_PER_BLOCK))
        #: Bytes of a unit that is stored already, and not overwritten: others may read it.
        self._held = bytearray()
        self._checksum = checksum_of(name, self._first)
        files.begin_writing()

    def write(self, data: bytes | memoryview) -> None:
        """Append data to the block.

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
                    self._files.write(chunk, self._start + size_bytes)
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
        parts = self._files.layout.split(self._start, len(data))
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
        """Record the start of a block, as far as it has complete units; see `commit`."""
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
