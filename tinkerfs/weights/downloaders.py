"""Store the blocks of a file as a response delivers them: a range, or the whole file.

A store that supports ranges sends one or two blocks at a time, to a `RangeDownloader`. A store
without range support, and a gzip archive, send the whole file, to a `SequentialDownloader`. The
response decides, because a store may ignore the range of any request.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, Self

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.block_check import BlockCheck
from tinkerfs.weights.block_download import BlockDownload, CacheWriteLost
from tinkerfs.weights.block_source import BlockSource, ByteStream


class BlockClaims:
    """Locks of a download on its blocks, against other processes. A context manager."""

    def __init__(self, disk: BlockFile) -> None:
        self._disk = disk
        self._locks: dict[int, ExitStack] = {}

    def claim(self, index: int, timeout_s: float) -> bool:
        """Wait for the lock on a block; return whether it was free in time."""
        self._locks[index] = ExitStack()
        return self._locks[index].enter_context(self._disk.lock_block(index, timeout_s))

    def claim_if_missing(self, index: int) -> bool:
        """Lock a block without a wait; return whether it is locked and still to be downloaded."""
        is_claimed = self.claim(index, 0.0)
        return is_claimed and not self._disk.has(index) and not self._disk.has_part(index)

    def release(self, index: int) -> None:
        """Unlock a block."""
        self._locks.pop(index).close()

    def release_all(self) -> None:
        """Unlock all blocks."""
        while self._locks:
            self._locks.popitem()[1].close()

    def __enter__(self) -> Self:
        """Return the claims themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Unlock all blocks."""
        self.release_all()


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """One request for a run of blocks.

    Attributes:
        run: block indexes.
        partial: the start of the first block, which an earlier request has stored.
        claims: the locks on all blocks of the run.
    """

    run: range
    partial: bytes
    claims: BlockClaims


class BlockSink:
    """Stores the blocks of one file, and wakes the readers that wait for them. Thread-safe.

    Attributes:
        lock: guards `in_flight`, and all state that must agree with it; reentrant.
        in_flight: future by block index. The result is the block, or None if it is on disk.
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
        disk: BlockFile,
        memory: BlockMemoryPool,
        check: BlockCheck,
        telemetry: Telemetry,
        timeout_s: float,
    ) -> None:
        self.lock = threading.RLock()
        self.in_flight: dict[int, Future[bytes | None]] = {}
        self.memory_only: set[int] = set()
        self.stale_error: OSError | None = None
        self._key = key
        self._path = path
        self._size_bytes = size_bytes
        self._source = source
        self._disk = disk
        self._memory = memory
        self._check = check
        self._telemetry = telemetry
        self._timeout_s = timeout_s

    def block_bytes(self, index: int) -> int:
        """Return the length of a block; the last one may be shorter."""
        return min(BLOCK_BYTES, self._size_bytes - index * BLOCK_BYTES)

    def add(self, run: range) -> "dict[int, Future[bytes | None]]":
        """Return new futures for a run up to the first block in flight; needs the lock."""
        stop = next((index for index in run if index in self.in_flight), run.stop)
        futures = {index: Future[bytes | None]() for index in range(run.start, stop)}
        self.in_flight |= futures
        return futures

    def receive(
        self, chunks: Iterable[bytes], index: int, *, keeps_partial: bool = True
    ) -> Iterator[tuple[int, BlockDownload]]:
        """Yield each completed block with its index, starting at `index`, for `commit`.

        If the chunks end within a block, its start is stored on disk (`keeps_partial`).

        Raises:
            ApiError: the download fails.
            OSError: ESTALE or EIO, as raised by the chunks; EIO if the file is longer than known.
        """
        download: BlockDownload | None = None
        try:
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    if download is None:
                        download = self._start_block(index)
                    rest = download.feed(rest)
                    if not download.remaining_bytes:
                        yield index, download
                        download.close()
                        download, index = None, index + 1
        finally:
            if download is not None:
                if keeps_partial and download.remaining_bytes:
                    download.commit_partial()
                download.close()

    def commit(self, index: int, download: BlockDownload) -> None:
        """Store a completed block, and wake the readers that wait for it.

        Raises:
            OSError: ESTALE if the block is of another version; EIO if it is corrupt.
        """
        if not download.is_intact():
            if self._check.is_needed:
                raise self._source.report_stale("the store has another version of it now")
            raise errors.corrupt(self._path, f"block {index} is not what it was")
        self._telemetry.count("blocks_downloaded")
        try:
            block = download.commit()
        except CacheWriteLost as error:
            future = self.in_flight.get(index)
            self.fail({} if future is None else {index: future}, error)
        else:
            self.resolve(index, block)

    def resolve(self, index: int, block: bytes | None) -> None:
        """Wake the readers that wait for a block."""
        with self.lock:
            future = self.in_flight.pop(index, None)
        if future is not None:
            future.set_result(block)

    def fail(
        self, futures: "dict[int, Future[bytes | None]]", error: BaseException | None = None
    ) -> None:
        """Raise an error in the readers that wait for those of these blocks still in flight.

        Without an error, the file has turned out to be shorter than expected.
        """
        error = error or errors.corrupt(self._path, "it is shorter than it was")
        with self.lock:
            if isinstance(error, OSError) and errors.is_stale(error):
                self.stale_error = error
                if self._check.is_needed:
                    self.drop_blocks()
            failed = [i for i, future in futures.items() if self.in_flight.get(i) is future]
            for index in failed:
                del self.in_flight[index]
        for index in failed:
            futures[index].set_exception(error)

    def drop_blocks(self) -> None:
        """Remove all cached blocks, because the next version may have the same key."""
        self._check.drop_all()
        self._memory.drop(self._key)

    def _start_block(self, index: int) -> BlockDownload:
        length = self.block_bytes(index)
        if length <= 0:
            raise errors.corrupt(self._path, "it is longer than it was")
        return BlockDownload(
            self._key,
            index,
            length,
            self._disk,
            self._memory,
            self._timeout_s,
            digest=self._check.expected_digest(index),
            uses_disk=index not in self.memory_only,
        )


class Downloader(Protocol):
    """Stores what a response contains."""

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Store blocks of the transfer, at least the requested ones unless a scan stores them.

        Raises:
            ApiError, OSError: as `BlockSink.receive` and `commit`.
        """
        ...


class RangeDownloader:
    """Stores the range that was requested."""

    def __init__(self, sink: BlockSink, disk: BlockFile) -> None:
        self._sink = sink
        self._disk = disk

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Store all blocks of a request; unlock each once it is stored."""
        run, partial = request.run, request.partial
        chunks = chain([partial], transfer) if partial else transfer
        for index, download in self._sink.receive(chunks, run[0]):
            self._sink.commit(index, download)
            request.claims.release(index)


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

    def join(self, blocks: Iterable[int], first: int) -> bool:
        """Leave blocks to the running scan; return False if it does not reach the first one.

        The caller holds the lock of the sink.
        """
        if self._position is None or first < self._position:
            return False
        self._expected.update(blocks)
        return True

    def delivers(self, index: int) -> bool:
        """Return whether the running scan will deliver a block."""
        return index in self._expected

    def receive(self, transfer: ByteStream, request: BlockRequest) -> None:
        """Scan the body, unless a scan is running: then store only what that has passed."""
        run = request.run
        with self._sink.lock:
            is_running = self._position is not None
            position = self._position = self._position or 0
            self._expected.update(index for index in run if index >= position)
        if not is_running:
            self._scan(transfer)
        elif run[0] < position:
            stop = min(run.stop, position)
            chunks = _skip_bytes(transfer, run[0] * BLOCK_BYTES)
            for index, download in self._sink.receive(chunks, run[0], keeps_partial=False):
                self._sink.commit(index, download)
                if index + 1 == stop:
                    return

    def _scan(self, transfer: ByteStream) -> None:
        """Store all blocks, as long as the file is in use."""
        error: BaseException | None = None
        try:
            for index, download in self._sink.receive(transfer, 0, keeps_partial=False):
                with self._sink.lock:  # before the commit: afterwards the block may be evicted
                    self._position = index + 1
                self._sink.commit(index, download)
                with self._sink.lock:
                    self._expected.discard(index)
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
            in_flight = self._sink.in_flight
            left = {index: in_flight[index] for index in self._expected & in_flight.keys()}
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
