"""Writer of units of a block, which collects them in memory and stores them as one extent."""

from collections.abc import Callable

from tinkerfs.cache.data_layout import UNIT_BYTES, units_of
from tinkerfs.cache.extent_files import Extent


class SharedWriter:
    """Collects units; used by one thread.

    Args:
        store: stores an extent, and returns whether there was space for it.

    Attributes:
        start: offset of the first unit.
    """

    is_in_memory = True

    def __init__(self, start: int, store: Callable[[Extent, bytes], bool]) -> None:
        self.start = start
        self._store = store
        self._chunks: list[bytes] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append data."""
        self._chunks.append(bytes(data))

    def read_back(self) -> bytes:
        """Return all data that was written."""
        return b"".join(self._chunks)

    def commit(self) -> bool:
        """Store the data; return whether it is on disk.

        Raises:
            OSError: it cannot be stored.
        """
        return self._commit(self.read_back())

    def commit_complete_units(self) -> bool:
        """Store the complete units; see `commit`."""
        data = self.read_back()
        return self._commit(data[: len(data) // UNIT_BYTES * UNIT_BYTES])

    def close(self) -> None:
        """Discard what was not stored."""
        self._chunks.clear()

    def _commit(self, data: bytes) -> bool:
        units = units_of(self.start, self.start + len(data))
        return bool(units) and self._store(Extent(units.start, units.stop), data)
