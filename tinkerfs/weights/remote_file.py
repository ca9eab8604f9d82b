"""One version of a remote file, read in blocks.

A block is looked up in memory, then in the disk cache, and otherwise downloaded. Concurrent readers
of a block share one download, also across processes that share the cache (byte-range locks).
Downloads run on threads of their own, by range requests of one or two blocks; readers only wait.
A store without range support and a gzip archive send the whole file. One full scan of that body
serves all waiting readers and fills the cache, as long as the file is open. Thread-safe.
"""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import chain

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.block_cache import BlockFile
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.block_check import BlockCheck
from tinkerfs.weights.block_download import BlockDownload, CacheWriteLost
from tinkerfs.weights.block_math import BLOCK_BYTES, block_range, group_consecutive, split_by_block
from tinkerfs.weights.block_source import BlockSource, ByteStream
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

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
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.RLock()
        # All guarded by _lock.
        self._users = 0
        self._is_closed = False
        #: By block index. The result is the block, or None if it is on disk.
        self._in_flight: dict[int, Future[bytes | None]] = {}
        self._requests = 0
        #: Index of the next block of the running full scan, None if there is none.
        self._scan_position: int | None = None
        #: Blocks in flight that the full scan will deliver.
        self._left_to_scan: set[int] = set()
        #: Blocks that disappeared from the disk while they were stored: the cache was cleared in
        #: that instant, or its disk is faulty. They stay in memory.
        self._memory_only: set[int] = set()
        self._stale_error: OSError | None = None

    def acquire(self) -> bool:
        """Begin a use; return False if the file is closed or stale."""
        with self._lock:
            if self._is_closed or self._stale_error is not None:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """End a use of the file; close it after the last one."""
        with self._lock:
            self._users -= 1
            is_last = self._is_closed = not self._users
        if is_last:
            self._memory.demote_prefetched(self.key)
            if self._stale_error is not None and self._check.is_needed:
                self._drop_blocks()  # also blocks that arrived after the change was detected
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
        if self._stale_error is not None:
            raise errors.stale(self._path, self._stale_error.strerror or "")
        index, first = divmod(start, BLOCK_BYTES)
        is_one_block = first + len(buffer) <= BLOCK_BYTES
        is_one_block = is_one_block and not self._check.verifies_cached
        if is_one_block and self._disk.read_from_open_fd(index, first, buffer, ctx.blocking):
            self._telemetry.count("block_cache_hits")
            return
        missing: list[tuple[memoryview, int, int, Future[bytes | None]]] = []
        for view, index, first in split_by_block(buffer, start):
            is_cached = self._fill(view, index, first, ctx)
            self._telemetry.count("block_cache_hits" if is_cached else "block_cache_misses")
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
        with self._lock:
            return not self._in_flight

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
        return min(BLOCK_BYTES, self.size_bytes - index * BLOCK_BYTES)

    def _drop_blocks(self) -> None:
        """Remove all cached blocks, because the next version may have the same key."""
        self._check.drop_all()
        self._memory.drop(self.key)

    def _is_cached(self, index: int) -> bool:
        return self._memory.has((self.key, index)) or self._disk.has(index)

    def _is_cached_or_in_flight(self, index: int) -> bool:
        """Return whether a block is cached or in flight."""
        return index in self._in_flight or self._is_cached(index)

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
            with self._lock:
                self._memory_only.add(index)
            future = self._ensure_download(range(index, index + 1), ctx)
        raise errors.corrupt(self._path, "the disk of the cache loses what is downloaded of it")

    def _ensure_download(self, run: range, ctx: RequestContext) -> "Future[bytes | None]":
        """Return the future of the first block of a run; start its download if necessary."""
        with self._lock:
            future = self._in_flight.get(run[0])
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
        with self._lock:
            future = self._in_flight.get(run[0])
            if future is not None:
                return future
            stop = next((index for index in run if index in self._in_flight), run.stop)
            futures = {index: Future[bytes | None]() for index in range(run.start, stop)}
            self._in_flight |= futures
            if self._scan_position is not None and run[0] >= self._scan_position:
                self._left_to_scan |= futures.keys()
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
        with self._lock:
            self._requests -= 1
            left = {i: future for i, future in futures.items() if i not in self._left_to_scan}
        self._fail(left, error or self._too_short())
        self.release()

    def _fetch(self, futures: "dict[int, Future[bytes | None]]") -> None:
        """Download a run by one request, split where another process downloads a block."""
        self._disk.ensure_directory()
        run = range(min(futures), max(futures) + 1)
        claims: dict[int, ExitStack] = {}
        try:
            while run:
                first, stop = run[0], run[0] + 1
                self._claim(first, claims, self._timeout_s)
                data = self._memory.get((self.key, first))
                is_pending = self._in_flight.get(first) is futures[first]  # not delivered by a scan
                if is_pending and (data is not None or self._is_intact_on_disk(first)):
                    # It arrived since the cache lookup, or another process has stored it.
                    self._resolve(first, data)
                elif is_pending:
                    while stop < run.stop and self._try_claim_next(stop, claims):
                        stop += 1
                    self._request(range(first, stop), claims)
                for index in list(claims):
                    claims.pop(index).close()
                run = range(stop, run.stop)
        finally:
            for claim in claims.values():
                claim.close()

    def _claim(self, index: int, claims: dict[int, ExitStack], timeout_s: float) -> bool:
        claims[index] = ExitStack()
        return claims[index].enter_context(self._disk.lock_block(index, timeout_s))

    def _is_intact_on_disk(self, index: int) -> bool:
        probe = memoryview(bytearray(1))
        length = self.block_bytes(index)
        is_on_disk = index not in self._memory_only and self._disk.read_into(
            index, 0, probe, length
        )
        return is_on_disk and self._check.verify_block(index)

    def _try_claim_next(self, index: int, claims: dict[int, ExitStack]) -> bool:
        """Lock the next block for the same request; return whether it is still needed."""
        is_claimed = self._claim(index, claims, 0.0)
        return is_claimed and not self._disk.has(index) and not self._disk.has_partial(index)

    def _request(self, run: range, claims: dict[int, ExitStack]) -> None:
        """Download a run by one request; unlock each block once it is stored."""
        begin, stop = run[0] * BLOCK_BYTES, run[-1] * BLOCK_BYTES + self.block_bytes(run[-1])
        partial = self._disk.read_partial(run[0])
        partial = partial if len(partial) < self.block_bytes(run[0]) else b""
        before = self._check.before(begin + len(partial), partial)
        with self._source.open(begin + len(partial), stop, before) as transfer:
            if not transfer.is_full_body:
                chunks = chain([partial], transfer) if partial else transfer
                for index, download in self._downloads(chunks, run[0]):
                    self._commit_block(index, download)
                    claims.pop(index).close()
                    if partial:
                        self._disk.drop_partial(index)
                        partial = b""
                return
            with self._lock:
                is_first_scan = self._scan_position is None
                position = self._scan_position = self._scan_position or 0
                self._left_to_scan |= {index for index in run if index >= position}
            if is_first_scan:
                self._full_scan(transfer, None)
            elif run[0] < position:
                self._full_scan(transfer, range(run[0], min(run.stop, position)))

    def _full_scan(self, transfer: ByteStream, only: range | None) -> None:
        """Store blocks of a full body: all while the file is in use, or just `only`."""
        error: BaseException | None = None
        first = 0 if only is None else only[0]
        chunks = _skip_bytes(transfer, first * BLOCK_BYTES)
        try:
            for index, download in self._downloads(chunks, first, keeps_partial=False):
                if only is None:
                    with self._lock:
                        self._scan_position = index + 1
                self._commit_block(index, download)
                with self._lock:
                    if only is None:
                        self._left_to_scan.discard(index)
                        is_done = self._users <= 1 and not self._in_flight
                    else:
                        is_done = index == only[-1]
                if is_done:
                    return
        except BaseException as failure:
            error = failure
            raise
        finally:
            if only is None:
                self._end_full_scan(error)

    def _end_full_scan(self, error: BaseException | None) -> None:
        with self._lock:
            self._scan_position = None
            left = {
                index: self._in_flight[index]
                for index in self._left_to_scan & self._in_flight.keys()
            }
            self._left_to_scan.clear()
        if left:
            self._fail(left, error or self._too_short())

    def _too_short(self) -> OSError:
        return errors.corrupt(self._path, "it is shorter than it was")

    def _downloads(
        self, chunks: Iterable[bytes], index: int, *, keeps_partial: bool = True
    ) -> Iterator[tuple[int, BlockDownload]]:
        """Yield each completed block with its index, starting at `index`.

        If the chunks end within a block, its start is stored on disk (`keeps_partial`).
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

    def _start_block(self, index: int) -> BlockDownload:
        length = self.block_bytes(index)
        if length <= 0:
            raise errors.corrupt(self._path, "it is longer than it was")
        return BlockDownload(
            self.key,
            index,
            length,
            self._disk,
            self._memory,
            self._timeout_s,
            digest=self._check.expected_digest(index),
            uses_disk=index not in self._memory_only,
        )

    def _commit_block(self, index: int, download: BlockDownload) -> None:
        """Store a completed block, and wake the waiting readers."""
        if not download.is_intact():
            if self._check.is_needed:
                raise self._source.report_stale("the store has another version of it now")
            raise errors.corrupt(self._path, f"block {index} is not what it was")
        self._telemetry.count("blocks_downloaded")
        try:
            block = download.commit()
        except CacheWriteLost as error:
            future = self._in_flight.get(index)
            self._fail({} if future is None else {index: future}, error)
        else:
            self._resolve(index, block)

    def _resolve(self, index: int, block: bytes | None) -> None:
        with self._lock:
            future = self._in_flight.pop(index, None)
        if future is not None:
            future.set_result(block)

    def _fail(self, futures: "dict[int, Future[bytes | None]]", error: BaseException) -> None:
        with self._lock:
            if isinstance(error, OSError) and errors.is_stale(error):
                self._stale_error = error
                if self._check.is_needed:
                    self._drop_blocks()
            failed = [i for i, future in futures.items() if self._in_flight.get(i) is future]
            for index in failed:
                del self._in_flight[index]
        for index in failed:
            futures[index].set_exception(error)


def _skip_bytes(chunks: Iterable[bytes], skipped_bytes: int) -> Iterator[bytes]:
    """Yield the chunks without the first `skipped_bytes` bytes."""
    for chunk in chunks:
        rest = chunk[skipped_bytes:]
        skipped_bytes -= len(chunk) - len(rest)
        if rest:
            yield rest
