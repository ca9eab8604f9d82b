"""What readers of weights need of a block cache, whichever form its files have.

`block_cache` has the form for the directory of one host, and `shared_cache` that for a directory
that many hosts share. `directory.CachePaths` decides which one is used.
"""

import math
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Protocol

from tinkerfs.cache.data_files import BlockingSection
from tinkerfs.cache.data_layout import BLOCK_BYTES, DataLayout

_PLAIN = DataLayout()


class BlocksWriter(Protocol):
    """Writes consecutive units of one block; used by one thread, which closes it in any case.

    Attributes:
        start: offset of the first unit.
        is_in_memory: whether the data is in memory until it is committed.
    """

    start: int
    is_in_memory: bool

    def write(self, data: bytes | memoryview) -> None:
        """Append data.

        Raises:
            OSError: the disk rejects the data; `read_back` still returns the data before it.
        """
        ...

    def read_back(self) -> bytes:
        """Return all data that was written.

        Raises:
            OSError: a data file cannot be read.
        """
        ...

    def commit(self) -> bool:
        """Store the data; return whether it is stored.

        Raises:
            OSError: the disk has rejected the data.
        """
        ...

    def commit_complete_units(self) -> bool:
        """Store the complete units; see `commit`."""
        ...

    def close(self) -> None:
        """End writing; data that was not committed is not valid. To be called once."""
        ...


class FileBlocks(Protocol):
    """The cached bytes of one file. Thread-safe.

    Any run of units is stored and looked up. Blocks are only the usual length of such a run. No
    method raises for disk errors.
    """

    def close(self) -> None:
        """Allow the eviction of the file. No other method may be called afterwards."""
        ...

    def has(self, index: int) -> bool:
        """Return whether all of block `index` is cached; it is verified when it is read."""
        ...

    def missing(self, units: range, end: int | None = None) -> range:
        """Return the units from the first to the last one that is not cached.

        Args:
            units: not empty.
            end: if given, cached units are verified, the last of which ends there or before it.
        """
        ...

    def cached_bytes(self, start: int, stop: int) -> int:
        """Return how many of the bytes [start, stop) are cached; see `has`."""
        ...

    def read(self, index: int, start: int, stop: int, length: int) -> bytes | None:
        """Return the bytes [start, stop) of block `index`; None if `read_into` fails."""
        data = bytearray(stop - start)
        is_read = self.read_into(index, start, memoryview(data), length)
        return bytes(data) if is_read else None

    def read_into(
        self,
        index: int,
        start: int,
        buffer: memoryview,
        length: int,
        blocking: BlockingSection = nullcontext,
    ) -> bool:
        """Fill `buffer` from block `index`; return whether these bytes are cached and intact.

        Args:
            index: block index.
            start: offset within the block.
            buffer: not empty, and not longer than the rest of the block; its content is undefined
                if the method returns False.
            length: length of the whole block.
            blocking: entered while the disk is read.
        """
        ...

    def backing_fd(
        self,
        start: int,
        stop: int,
        max_verified_bytes: float = math.inf,
        blocking: BlockingSection = nullcontext,
    ) -> int | None:
        """Return a new descriptor of a local file with exactly the bytes [start, stop), or None.

        The caller closes it.
        """
        ...

    def put(self, index: int, data: bytes) -> bool:
        """Store a block; return whether it is on disk."""
        writer = self.begin_write(index * BLOCK_BYTES, len(data))
        if writer is None:
            return False
        with closing(writer):
            try:
                writer.write(data)
            except OSError as error:
                self.report(error)
                return False
            return self.commit(writer)

    def begin_write(self, start: int, length: int) -> BlocksWriter | None:
        """Return a writer for the units of [start, start + length), to be closed.

        None if they do not fit.
        """
        ...

    def commit(self, writer: BlocksWriter) -> bool:
        """Store completely written units; return whether they are on disk."""
        ...

    def commit_part(self, writer: BlocksWriter) -> None:
        """Store the units that are complete, so that the next download can resume."""
        ...

    def report(self, error: OSError) -> None:
        """Report an error that only makes reads slower, once for each errno."""
        ...

    def drop(self, index: int) -> None:
        """Remove a block."""
        ...

    def drop_all(self) -> None:
        """Remove all blocks; a process that reads them keeps the old data until then."""
        ...

    def lock_units(self, units: range, timeout_s: float) -> AbstractContextManager[bool]:
        """Return a context manager that locks units against other processes.

        Its body runs even if the lock is not free within `timeout_s` seconds, because a second
        download does no harm. The caller should check whether the units are cached by then.

        Its value is whether no other process is known to download any of the units.
        """
        ...

    def ensure_directory(self) -> None:
        """Create the directory and the lock file, so that other processes see the locks."""
        ...


class BlockRecord(FileBlocks, Protocol):
    """A value of at most a block that hosts share: block 0 of a file without a known length."""

    def read_record(self) -> bytes | None:
        """Return what `put` has stored as block 0 on any host; None if there is nothing."""
        ...


class Blocks(Protocol):
    """A cache of the blocks of remote files. Thread-safe."""

    def open(
        self,
        key: str,
        description: str,
        length_bytes: int | None = None,
        layout: DataLayout = _PLAIN,
    ) -> FileBlocks:
        """Return the file of `key`. It is not evicted until it is closed.

        Args:
            key: identifies the content; another version of a file needs another key.
            description: text for users.
            length_bytes: length of the whole file; None if unknown.
            layout: of new data files; those that exist keep theirs.
        """
        ...

    def open_record(self, key: str, description: str) -> BlockRecord | None:
        """Return the record of `key`; None if hosts share no records.

        Args:
            key: identifies the value.
            description: text for users.
        """
        ...

    def usage_bytes(self) -> int:
        """Return the disk usage of the cache, including other processes; it may be some s old.

        Raises:
            OSError: the cache directory cannot be read.
        """
        ...

    def free_bytes(self) -> int:
        """Return the free space on the disk of the cache.

        Raises:
            OSError: the cache directory cannot be read.
        """
        ...
