"""One version of a remote file, read in blocks.

A block is looked up in memory, then in the disk cache, and otherwise downloaded. Concurrent readers
of a block share one download, also across processes that share the cache (byte-range locks).
Downloads run on threads of their own, by range requests of one or two blocks; readers only wait.
`downloaders` stores what a response contains, which may be the whole file. Thread-safe.
"""

import threading
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.block_check import BlockCheck
from tinkerfs.weights.block_download import CacheWriteLost
from tinkerfs.weights.block_math import block_range, group_consecutive, split_by_block
from tinkerfs.weights.block_source import BlockSource
from tinkerfs.weights.downloaders import (
    BlockClaims,
    BlockRequest,
    BlockSink,
    Downloader,
    RangeDownloader,
    SequentialDownloader,
)
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

if TYPE_CHECKING:
    from concurrent.futures import Future

#: Concurrent requests per file. Prefetches leave some of them to demand reads.
CONNECTIONS = 24

#: Maximum number of downloads of a block for one reader, if it keeps disappearing from the disk.
_MAX_FETCHES = 3


class RemoteFile:
    """One version of a file, usable from `acquire` to `release`. Thread-safe.

    Each download counts as a use too. The last `release` frees memory and closes `disk`.

    Args:
        key: unique for a file and its version.
        path: the path that a user requested, for messages.
        source: downloads bytes of the file.
        disk: the disk cache of the file's blocks; owned.
        memory: the pool for blocks that the disk cache does not take.
        timeout_s: how long to wait for free memory, or for another process.
        digests: of each block; empty if unknown.
    """

    def __init__(
        self,
        key: str,
        path: str,
        size_bytes: int,
        source: BlockSource,
        disk: BlockFile,
        memory: BlockMemoryPool,
        telemetry: Telemetry,
        *,
        timeout_s: float,
        digests: tuple[bytes, ...] = (),
    ) -> None:
        self.size_bytes = size_bytes
        self.key = key
        self._path = path
        self._source = source
        self._disk = disk
        self._memory = memory
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        is_needed = not source.is_exact
        self._check = BlockCheck(disk, self.peek, size_bytes, digests=digests, is_needed=is_needed)
        source.use_samples(self._check.sample)
        self._sink = BlockSink(
            key, path, size_bytes, source, disk, memory, self._check, telemetry, timeout_s
        )
        self._ranges = RangeDownloader(self._sink, disk)
        self._sequential = SequentialDownloader(self._sink, is_in_use=lambda: self._users > 1)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        # All guarded by the lock of the sink.
        self._users = 0
        self._is_closed = False
        self._requests = 0

    def acquire(self) -> bool:
        """Begin a use; return False if the file is closed or stale."""
        with self._sink.lock:
            if self._is_closed or self._sink.stale_error is not None:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """End a use of the file; close it after the last one."""
        with self._sink.lock:
            self._users -= 1
            is_last = self._is_closed = not self._users
        if is_last:
            self._memory.demote_prefetched(self.key)
            if self._sink.stale_error is not None and self._check.is_needed:
                self._sink.drop_blocks()  # also blocks that arrived after the change was detected
            self._disk.close()

    def read_into(self, buffer: memoryview, start: int, ctx: RequestContext) -> None:
        """Fill `buffer`, which is not empty, with bytes at `start`, all within the file.

        `ctx` cancels the wait. Its timeout is ignored: each download has its own, and a slow
        download that makes progress is not aborted.

        Raises:
            ApiError: the download fails.
            OSError: ESTALE if the file has changed or is gone; EIO if it is corrupt; EINTR if the
                caller was interrupted; see also `SignedUrlCache.url`.
        """
        if self._sink.stale_error is not None:
            raise errors.stale(self._path, self._sink.stale_error.strerror or "")
        missing: list[tuple[memoryview, int, int, Future[bytes | None]]] = []
        for view, index, first in split_by_block(buffer, start):
            is_cached = self._fill(view, index, first, ctx)
            self._telemetry.count("block_cache_hits" if is_cached else "block_cache_misses")
            if is_cached:
                self._telemetry.count("block_cache_bytes_read", len(view))
            if not is_cached:
                future = self._ensure_download(range(index, index + 1), ctx)
                missing.append((view, index, first, future))
        if missing:
            unbounded = replace(ctx, timeout_s=None)
            for view, index, first, future in missing:
                self._fill_from(future, view, index, first, unbounded)

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) if all are in memory or on disk, else None."""
        data = bytearray(stop - start)
        views = split_by_block(memoryview(data), start)
        is_cached = all(self._fill(*view, BACKGROUND_CONTEXT) for view in views)
        return bytes(data) if is_cached else None

    def fetch_ahead(self, start: int, stop: int, request_bytes: int) -> int:
        """Start to prefetch the missing blocks of [start, stop), as far as memory allows.

        One request is for `request_bytes`, but at least for a block.

        Returns:
            the offset up to which everything is cached or in flight.
        """
        missing = (
            index for index in block_range(start, stop) if not self._is_cached_or_in_flight(index)
        )
        for run in group_consecutive(missing, max(request_bytes // BLOCK_BYTES, 1)):
            if not self._start_prefetch(run):
                return max(start, run.start * BLOCK_BYTES)
        return stop

    def is_idle(self) -> bool:
        """Return whether no download is in flight."""
        with self._sink.lock:
            return not self._sink.in_flight

    def blocks_in_flight(self) -> int:
        """Return the number of blocks that are being downloaded, or will be."""
        with self._sink.lock:
            return len(self._sink.in_flight)

    def prepare(self, ctx: RequestContext) -> None:
        """Get a signed URL; wait until the archive is built.

        Raises:
            ApiError: the request fails.
            OSError: ESTALE if the file is gone; see also `SignedUrlCache.url`.
        """
        self._source.prepare(ctx)

    def is_on_disk(self, index: int) -> bool:
        """Return whether a block is on disk; it is verified only when it is read."""
        return self._disk.has(index)

    def backing_fd(
        self, start: int, stop: int, ctx: RequestContext, max_verified_bytes: float
    ) -> int | None:
        """Return a new descriptor of the local file with the bytes [start, stop); see `BlockFile`.

        None for a store where only `BlockCheck` can distinguish versions.
        """
        if self._check.is_needed or self._sink.stale_error is not None:
            return None
        return self._disk.backing_fd(start, stop, max_verified_bytes, ctx.blocking)

    def fetch(self, index: int, ctx: RequestContext, count: int = 1) -> "Future[bytes | None]":
        """Return the future of a block; start its download unless cached or in flight.

        One request may cover `count` blocks from this one on. `ctx` bounds the wait for an archive
        build, which is the only wait of this method.

        Raises:
            ApiError, OSError: as `prepare`. Errors of the download are raised by the future.
        """
        return self._ensure_download(range(index, index + count), ctx)

    def block_bytes(self, index: int) -> int:
        """Return the length of a block; the last one may be shorter."""
        return self._sink.block_bytes(index)

    def _is_cached(self, index: int) -> bool:
        return self._memory.has((self.key, index)) or self._disk.has(index)

    def _is_cached_or_in_flight(self, index: int) -> bool:
        """Return whether a block is cached or in flight."""
        return index in self._sink.in_flight or self._is_cached(index)

    def _fill(self, buffer: memoryview, index: int, first: int, ctx: RequestContext) -> bool:
        """Fill a buffer from a block in memory or on disk; return whether it is there."""
        data = self._memory.get((self.key, index))
        if data is not None:
            buffer[:] = memoryview(data)[first : first + len(buffer)]
            return True
        length = self.block_bytes(index)
        is_on_disk = self._disk.read_into(index, first, buffer, length, ctx.blocking)
        return is_on_disk and self._check.verify_block(index)

    def _fill_from(
        self,
        future: "Future[bytes | None]",
        buffer: memoryview,
        index: int,
        first: int,
        ctx: RequestContext,
    ) -> None:
        """Fill a buffer from a block in flight."""
        for _ in range(_MAX_FETCHES):
            try:
                data = ctx.wait_for(future)
                if data is not None:
                    self._memory.get((self.key, index))  # mark it used
                    buffer[:] = memoryview(data)[first : first + len(buffer)]
                    return
                if self._fill(buffer, index, first, ctx):
                    return
            except CacheWriteLost:
                pass
            with self._sink.lock:
                self._sink.memory_only.add(index)
            future = self._ensure_download(range(index, index + 1), ctx)
        raise errors.corrupt(self._path, "the disk of the cache loses what is downloaded of it")

    def _ensure_download(self, run: range, ctx: RequestContext) -> "Future[bytes | None]":
        """Return the future of the first block of a run; start its download if necessary."""
        with self._sink.lock:
            future = self._sink.in_flight.get(run[0])
        if future is None:
            self._source.prepare(ctx)
            future = self._start_download(run)
        return future

    def _start_prefetch(self, run: range) -> bool:
        """Start to prefetch a run of blocks if resources allow; return whether."""
        is_busy = self._requests >= READAHEAD_CONCURRENCY
        # A speculative request must not trigger an archive build or count against its rate limit.
        if is_busy or not self._memory.can_prefetch(BLOCK_BYTES) or not self._source.is_ready():
            return False
        self._start_download(run)
        return True

    def _start_download(self, run: range) -> "Future[bytes | None]":
        """Download a run up to the next block in flight; return the first future."""
        with self._sink.lock:
            future = self._sink.in_flight.get(run[0])
            if future is not None:
                return future
            futures = self._sink.add(run)
            if self._sequential.join(futures, run[0]):
                return futures[run[0]]
            self._users += 1
            self._requests += 1
        name = f"block {run[0]} of {self._path}"
        try:
            run_in_thread(lambda: self._run_download(futures), name)
        except BaseException as error:  # no thread can be started
            self._end_request(futures, error)
            raise
        return futures[run[0]]

    def _run_download(self, futures: "dict[int, Future[bytes | None]]") -> None:
        """Download a run of blocks; runs on its own thread."""
        error: BaseException | None = None
        try:
            with self._connections:
                self._fetch(futures)
        except BaseException as failure:  # noqa: BLE001  (the waiting readers raise it)
            error = failure
        self._end_request(futures, error)

    def _end_request(
        self, futures: "dict[int, Future[bytes | None]]", error: BaseException | None
    ) -> None:
        """Fail the blocks that were not delivered, except those left to a full scan."""
        with self._sink.lock:
            self._requests -= 1
            left = {i: f for i, f in futures.items() if not self._sequential.delivers(i)}
        self._sink.fail(left, error)
        self.release()

    def _fetch(self, futures: "dict[int, Future[bytes | None]]") -> None:
        """Download a run by one request, split where another process downloads a block."""
        self._disk.ensure_directory()
        run = range(min(futures), max(futures) + 1)
        with BlockClaims(self._disk) as claims:
            while run:
                first, stop = run[0], run[0] + 1
                claims.claim(first, self._timeout_s)
                data = self._memory.get((self.key, first))
                is_pending = self._sink.in_flight.get(first) is futures[first]  # else by a scan
                if is_pending and (data is not None or self._is_intact_on_disk(first)):
                    # It arrived since the cache lookup, or another process has stored it.
                    self._sink.resolve(first, data)
                elif is_pending:
                    while stop < run.stop and claims.claim_if_missing(stop):
                        stop += 1
                    self._request(range(first, stop), claims)
                claims.release_all()
                run = range(stop, run.stop)

    def _is_intact_on_disk(self, index: int) -> bool:
        is_on_disk = index not in self._sink.memory_only and self._disk.is_intact(
            index, self.block_bytes(index)
        )
        return is_on_disk and self._check.verify_block(index)

    def _request(self, run: range, claims: BlockClaims) -> None:
        """Download a run by one request; unlock each block once it is stored."""
        partial = self._disk.read_part(run[0])
        partial = partial if len(partial) < self.block_bytes(run[0]) else b""
        start = run[0] * BLOCK_BYTES + len(partial)
        stop = run[-1] * BLOCK_BYTES + self.block_bytes(run[-1])
        with self._source.open(start, stop, self._check.before(start, partial)) as transfer:
            downloader: Downloader = self._sequential if transfer.is_full_body else self._ranges
            downloader.receive(transfer, BlockRequest(run, partial, claims))
