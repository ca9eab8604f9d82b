"""Store the blocks of a file as a response delivers them: a range, or the whole file.

A store that supports ranges sends up to two blocks at a time, to a `RangeDownloader`. A store
without range support, and a gzip archive, send the whole file, to a `SequentialDownloader`. The
response decides, because a store may ignore the range of any request.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, Self

from tinkerfs import errors
from tinkerfs.cache.blocks import FileBlocks
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.block_check import BlockCheck
from tinkerfs.weights.block_download import BlockDownload, CacheWriteLost, Piece
from tinkerfs.weights.block_source import BlockSource, ByteStream
from tinkerfs.weights.flights import Flight, FlightTable


class FlightClaims:
    """Locks of a download on its units, against other processes. A context manager."""

    def __init__(self, disk: FileBlocks) -> None:
        self._disk = disk
        self._locks: dict[Flight, ExitStack] = {}

    def claim(self, flight: Flight, timeout_s: float) -> bool:
        """Wait for the lock on a flight; return whether it was free in time."""
        self._locks[flight] = ExitStack()
        return self._locks[flight].enter_context(self._disk.lock_units(flight.units, timeout_s))

    def release(self, flight: Flight) -> None:
        """Unlock a flight."""
        self._locks.pop(flight).close()

    def release_all(self) -> None:
        """Unlock all flights."""
        while self._locks:
            self._locks.popitem()[1].close()

    def __enter__(self) -> Self:
        """Return the claims themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Unlock all flights."""
        self.release_all()


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """One request for the bytes [start, stop).

    Attributes:
        start: offset of the first missing unit.
        flights: of consecutive blocks; the first unit of the first one may be cached.
        claims: the locks on all flights.
    """

    start: int
    stop: int
    flights: Sequence[Flight]
    claims: FlightClaims


class BlockSink:
    """Stores the units of one file, and wakes the readers that wait for them. Thread-safe.

    Attributes:
        lock: guards `in_flight`, and all state that must agree with it; reentrant.
        in_flight: the units that readers may wait for.
        memory_only: blocks that disappeared from the disk while they were stored: the cache was
            cleared in that instant, or its disk is faulty. They stay in memory. Guarded by `lock`.
        stale_error: the error ESTALE of a download; None if there was none.
    """

    def __init__(
        self,
        key: str,
        path: str,
        size_bytes: int,
        source: BlockSource,
        disk: FileBlocks,
        memory: BlockMemoryPool,
        check: BlockCheck,
        telemetry: Telemetry,
        timeout_s: float,
    ) -> None:
        self.lock = threading.RLock()
        self.in_flight = FlightTable()
        self.memory_only: set[int] = set()
        self.stale_error: OSError | None = None
        self._key = key
        self.size_bytes = size_bytes
        self._path = path
        self._source = source
        self._disk = disk
        self._memory = memory
        self._check = check
        self._telemetry = telemetry
        self._timeout_s = timeout_s

    def block_bytes(self, index: int) -> int:
        """Return the length of a block; the last one may be shorter."""
        return min(BLOCK_BYTES, self.size_bytes - index * BLOCK_BYTES)

    def receive(
        self, chunks: Iterable[bytes], start: int, stop: int, *, keeps_partial: bool = True
    ) -> Iterator[BlockDownload]:
        """Yield the part of each block of [start, stop) once it is complete, for `commit`.

        If the chunks end within a block, its complete units are stored (`keeps_partial`).

        Raises:
            ApiError: the download fails.
            OSError: ESTALE or EIO, as raised by the chunks; EIO if there are more bytes.
        """
        download: BlockDownload | None = None
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    if download is None:
                        download = self._start_block(start, stop)
                    rest = download.feed(rest)
                    if not download.remaining_bytes:
                        yield download
                        download.close()
                        start, download = download.stop, None
        finally:
            if download is not None:
                if keeps_partial and download.remaining_bytes:
                    download.commit_partial()
                download.close()

    def commit(self, download: BlockDownload, flights: Sequence[Flight] | None = None) -> None:
        """Store complete units, and wake the readers of some flights; None for all of the block.

        Raises:
            OSError: ESTALE if the block is of another version; EIO if it is corrupt.
        """
        if not download.is_intact():
            if self._check.is_needed:
                raise self._source.report_stale("the store has another version of it now")
            raise errors.corrupt(self._path, f"block {download.index} is not what it was")
        self._telemetry.count("blocks_downloaded")
        piece, lost = None, None
        try:
            piece = download.commit()
        except CacheWriteLost as error:
            lost = error
        if flights is None:
            with self.lock:
                flights = self.in_flight.of_block(download.index)
        if lost is None:
            self.resolve(flights, piece)
        else:
            self.fail(flights, lost)

    def resolve(self, flights: Sequence[Flight], piece: Piece | None) -> None:
        """Wake the readers that wait for some flights."""
        with self.lock:
            resolved = [flight for flight in flights if self.in_flight.remove(flight)]
        for flight in resolved:
            flight.future.set_result(piece)

    def fail(self, flights: Sequence[Flight], error: BaseException | None = None) -> None:
        """Raise an error in the readers that wait for those of these flights still in flight.

        Without an error, the file has turned out to be shorter than expected.
        """
        error = error or errors.corrupt(self._path, "it is shorter than it was")
        with self.lock:
            if isinstance(error, OSError) and errors.is_stale(error):
                self.stale_error = error
                if self._check.is_needed:
                    self.drop_blocks()
            failed = [flight for flight in flights if self.in_flight.remove(flight)]
        for flight in failed:
            flight.future.set_exception(error)

    def drop_blocks(self) -> None:
        """Remove all cached blocks, because the next version may have the same key."""
        self._check.drop_all()
        self._memory.drop(self._key)

    def _start_block(self, start: int, stop: int) -> BlockDownload:
        """Return a download of the bytes from `start` to the end of its block, or to `stop`."""
        index = start // BLOCK_BYTES
        length = min((index + 1) * BLOCK_BYTES, stop) - start
        if length <= 0:
            raise errors.corrupt(self._path, "it is longer than it was")
        is_whole = length == self.block_bytes(index)
        return BlockDownload(
            self._key,
            start,
            length,
            self._disk,
            self._memory,
            self._timeout_s,
            digest=self._check.expected_digest(index) if is_whole else b"",
            uses_disk=index not in self.memory_only,
        )


class Downloader(Protocol):
    """Stores what a response contains."""

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Store bytes of the transfer, at least the requested ones unless a scan stores them.

        Raises:
            ApiError, OSError: as `BlockSink.receive` and `commit`.
        """
        ...


class RangeDownloader:
    """Stores the range that was requested."""

    def __init__(self, sink: BlockSink) -> None:
        self._sink = sink

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Store all units of a request; unlock each flight once it is stored."""
        flights = iter(request.flights)
        for download in self._sink.receive(transfer, request.start, request.stop):
            flight = next(flights)
            self._sink.commit(download, (flight,))
            request.claims.release(flight)


class SequentialDownloader:
    """Stores a full body: one scan at a time, for all readers of the blocks after its position.

    Args:
        sink: stores the blocks; its lock guards the state of the scan.
        is_in_use: returns whether the file is open, besides for downloads.
    """

    def __init__(self, sink: BlockSink, is_in_use: Callable[[], bool]) -> None:
        self._sink = sink
        self._is_in_use = is_in_use
        #: Index of the next block of the running scan, None if there is none.
        self._position: int | None = None
        #: Blocks in flight that the scan will deliver.
        self._expected: set[int] = set()

    def join(self, flights: Sequence[Flight]) -> bool:
        """Leave flights to the running scan; return False if it does not reach the first one.

        The caller holds the lock of the sink.
        """
        if self._position is None or flights[0].index < self._position:
            return False
        self._expected.update(flight.index for flight in flights)
        return True

    def delivers(self, index: int) -> bool:
        """Return whether the running scan will deliver a block."""
        return index in self._expected

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Scan the body, unless a scan is running: then store only what that has passed."""
        run = [flight.index for flight in request.flights]
        with self._sink.lock:
            is_running = self._position is not None
            position = self._position = self._position or 0
            self._expected.update(index for index in run if index >= position)
        if not is_running:
            self._scan(transfer)
        elif run[0] < position:
            start = run[0] * BLOCK_BYTES
            chunks = _skip_bytes(transfer, start)
            for download in self._receive(chunks, start):
                self._sink.commit(download)
                if download.index + 1 == min(run[-1] + 1, position):
                    return

    def _receive(self, chunks: Iterable[bytes], start: int) -> Iterator[BlockDownload]:
        return self._sink.receive(chunks, start, self._sink.size_bytes, keeps_partial=False)

    def _scan(self, transfer: ByteStream) -> None:
        """Store all blocks, as long as the file is in use."""
        error: BaseException | None = None
        try:
            for download in self._receive(transfer, 0):
                with self._sink.lock:  # before the commit: afterwards the block may be evicted
                    self._position = download.index + 1
                self._sink.commit(download)
                with self._sink.lock:
                    self._expected.discard(download.index)
                    if not self._is_in_use() and not self._sink.in_flight:
                        return
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._end_scan(error)

    def _end_scan(self, error: BaseException | None) -> None:
        with self._sink.lock:
            self._position = None
            of_block = self._sink.in_flight.of_block
            left = [flight for index in self._expected for flight in of_block(index)]
            self._expected.clear()
        if left:
            self._sink.fail(left, error)


def _skip_bytes(chunks: Iterable[bytes], skipped_bytes: int) -> Iterator[bytes]:
    """Yield the chunks without the first `skipped_bytes` bytes."""
    for chunk in chunks:
        rest = chunk[skipped_bytes:]
        skipped_bytes -= len(chunk) - len(rest)
        if rest:
            yield rest
