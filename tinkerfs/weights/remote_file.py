"""One version of a remote file, read in units.

A unit is looked up in memory, then in the disk cache, and otherwise downloaded. Concurrent readers
of a unit share one download, also across processes that share the cache (byte-range locks).
Downloads run on threads of their own, by range requests of up to two blocks; readers only wait.
`downloaders` stores what a response contains, which may be the whole file. Thread-safe.
"""

import threading
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.blocks import FileBlocks
from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES, UNITS_PER_BLOCK, units_of
from tinkerfs.cache.memory_pool import BlockMemoryPool
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.block_check import BlockCheck
from tinkerfs.weights.block_download import CacheWriteLost, Piece
from tinkerfs.weights.block_math import hull, join_consecutive, split_by_block, split_units
from tinkerfs.weights.block_source import BlockSource
from tinkerfs.weights.downloaders import (
    BlockRequest,
    BlockSink,
    Downloader,
    FlightClaims,
    RangeDownloader,
    SequentialDownloader,
)
from tinkerfs.weights.flights import Flight, PieceFuture, future_of_all
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

#: Concurrent requests per file. Prefetches leave some of them to demand reads.
CONNECTIONS = 32

#: Maximum number of downloads of a unit for one reader, if it keeps disappearing from the disk.
_MAX_FETCHES = 3


class RemoteFile:
    """One version of a file, usable from `acquire` to `release`. Thread-safe.

    Each download counts as a use too. The last `release` frees memory and closes `disk`.

    Args:
        key: unique for a file and its version.
        path: the path that a user requested, for messages.
        source: downloads bytes of the file.
        disk: the disk cache of the file; owned.
        memory: the pool for units that the disk cache does not take.
        timeout_s: how long to wait for free memory, or for another process.
        digests: of each block; empty if unknown.
    """

    def __init__(
        self,
        key: str,
        path: str,
        size_bytes: int,
        source: BlockSource,
        disk: FileBlocks,
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
        self._ranges = RangeDownloader(self._sink)
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

    def read_into(
        self, buffer: memoryview, start: int, ctx: RequestContext, granule_bytes: int = BLOCK_BYTES
    ) -> None:
        """Fill `buffer`, which is not empty, with bytes at `start`, all within the file.

        `ctx` cancels the wait. Its timeout is ignored: each download has its own, and a slow
        download that makes progress is not aborted.

        Args:
            granule_bytes: what is missing is downloaded in multiples of it, `UNIT_BYTES` or
                `BLOCK_BYTES`.

        Raises:
            ApiError: the download fails.
            OSError: ESTALE if the file has changed or is gone; EIO if it is corrupt; EINTR if the
                caller was interrupted; see also `SignedUrlCache.url`.
        """
        if self._sink.stale_error is not None:
            raise errors.stale(self._path, self._sink.stale_error.strerror or "")
        missing: list[tuple[memoryview, int, list[Flight]]] = []
        for view, offset in split_by_block(buffer, start):
            is_cached = self._fill(view, offset, ctx)
            self._telemetry.count("block_cache_hits" if is_cached else "block_cache_misses")
            if is_cached:
                self._telemetry.count("block_cache_bytes_read", len(view))
            if not is_cached:
                units = self._units_around(offset, offset + len(view), granule_bytes)
                missing.append((view, offset, self._ensure_download(units, units, ctx)))
        if missing:
            unbounded = replace(ctx, timeout_s=None)
            for view, offset, flights in missing:
                self._fill_from(flights, view, offset, unbounded)

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) if all are in memory or on disk, else None."""
        data = bytearray(stop - start)
        views = split_by_block(memoryview(data), start)
        is_cached = all(self._fill(*view, BACKGROUND_CONTEXT) for view in views)
        return bytes(data) if is_cached else None

    def fetch_ahead(
        self, start: int, stop: int, request_bytes: int, granule_bytes: int = BLOCK_BYTES
    ) -> int:
        """Start to prefetch what is missing of [start, stop), as far as memory allows.

        One request is for `request_bytes`, but up to a block if that is less; see `read_into`.

        Returns:
            the offset up to which everything is cached or in flight.
        """
        units = self._units_around(start, stop, granule_bytes)
        max_units = max(request_bytes // BLOCK_BYTES, 1) * UNITS_PER_BLOCK
        for run in join_consecutive(map(self._wanted, split_units(units)), max_units):
            if not self._start_prefetch(run):
                return max(start, run.start * UNIT_BYTES)
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

    def cached_bytes(self, start: int, stop: int) -> int:
        """Return how many of the bytes [start, stop) are on disk."""
        return self._disk.cached_bytes(start, stop)

    def backing_fd(
        self, start: int, stop: int, ctx: RequestContext, max_verified_bytes: float
    ) -> int | None:
        """Return a new descriptor of the local file with the bytes [start, stop); see `FileBlocks`.

        None for a store where only `BlockCheck` can distinguish versions.
        """
        if self._check.is_needed or self._sink.stale_error is not None:
            return None
        return self._disk.backing_fd(start, stop, max_verified_bytes, ctx.blocking)

    def fetch(self, index: int, ctx: RequestContext, count: int = 1) -> PieceFuture:
        """Return the future of a block; start its download unless it is in flight.

        One request may cover `count` blocks from this one on. `ctx` bounds the wait for an archive
        build, which is the only wait of this method.

        Raises:
            ApiError, OSError: as `prepare`. Errors of the download are raised by the future.
        """
        start = index * BLOCK_BYTES
        block = self._units_around(start, start + 1, BLOCK_BYTES)
        run = self._units_around(start, min(start + count * BLOCK_BYTES, self.size_bytes))
        return future_of_all(self._ensure_download(block, run, ctx))

    def block_bytes(self, index: int) -> int:
        """Return the length of a block; the last one may be shorter."""
        return self._sink.block_bytes(index)

    def _units_around(self, start: int, stop: int, granule_bytes: int = BLOCK_BYTES) -> range:
        """Return the units of the granules that contain [start, stop)."""
        if self._check.needs_whole_blocks:
            granule_bytes = BLOCK_BYTES
        stop = -(-stop // granule_bytes) * granule_bytes
        return units_of(start // granule_bytes * granule_bytes, min(stop, self.size_bytes))

    def _missing(self, units: range, *, verifies: bool = False) -> range:
        """Return the units of a flight from the first to the last one that is not cached."""
        index = units.start // UNITS_PER_BLOCK
        missing, in_memory = units, set[int]()
        if not self._memory.is_empty():
            in_memory = {unit for unit in units if self._memory.has((self.key, unit))}
        if index not in self._sink.memory_only:
            missing = self._disk.missing(units, self.size_bytes if verifies else None)
            if verifies and not missing and not self._check.verify_block(index):
                missing = units
            missing = hull((unit for unit in missing if unit not in in_memory), units.start)
        elif in_memory.issuperset(units):
            missing = units[:0]
        return units if missing and self._check.has_digests else missing

    def _wanted(self, units: range) -> range:
        """Return the units of a block from the first to the last one to be prefetched."""
        with self._sink.lock:
            in_flight = [flight.units for flight in self._sink.in_flight.overlapping(units)]
        if not in_flight:
            return self._missing(units)
        missing = (u for u in self._missing(units) if not any(u in run for run in in_flight))
        return hull(missing, units.start)

    def _fill(
        self,
        buffer: memoryview,
        offset: int,
        ctx: RequestContext,
        pieces: Sequence[Piece | None] = (),
    ) -> bool:
        """Fill a buffer from memory, `pieces` or disk; return whether all of it is there."""
        if not any(pieces) and self._memory.is_empty():
            return self._fill_from_disk(buffer, offset, ctx)
        for unit in units_of(offset, offset + len(buffer)):
            start = unit * UNIT_BYTES
            view = buffer[max(start - offset, 0) : start + UNIT_BYTES - offset]
            data = self._memory.get((self.key, unit))
            arrived = [Piece(start, data)] if data is not None else filter(None, pieces)
            begin = max(start, offset)
            if not any(piece.fill(view, begin) for piece in arrived) and not self._fill_from_disk(
                view, begin, ctx
            ):
                return False
        return True

    def _fill_from_disk(self, buffer: memoryview, offset: int, ctx: RequestContext) -> bool:
        index, first = divmod(offset, BLOCK_BYTES)
        length = self.block_bytes(index)
        is_on_disk = self._disk.read_into(index, first, buffer, length, ctx.blocking)
        return is_on_disk and self._check.verify_block(index)

    def _fill_from(
        self, flights: Sequence[Flight], buffer: memoryview, offset: int, ctx: RequestContext
    ) -> None:
        """Fill a buffer from units in flight."""
        index = offset // BLOCK_BYTES
        units = self._units_around(offset, offset + len(buffer), UNIT_BYTES)
        for _ in range(_MAX_FETCHES):
            try:
                pieces = [ctx.wait_for(flight.future) for flight in flights]
                if self._fill(buffer, offset, ctx, pieces):
                    return
            except CacheWriteLost:
                pass
            with self._sink.lock:
                self._sink.memory_only.add(index)
            flights = self._ensure_download(units, units, ctx)
        raise errors.corrupt(self._path, "the disk of the cache loses what is downloaded of it")

    def _ensure_download(self, units: range, run: range, ctx: RequestContext) -> list[Flight]:
        """Return the flights of units; start to download a run that begins with them if needed."""
        with self._sink.lock:
            in_flight = self._sink.in_flight
            if in_flight.is_covered(units):
                return in_flight.overlapping(units)
        self._source.prepare(ctx)
        return self._start_download(units, run)

    def _start_prefetch(self, run: range) -> bool:
        """Start to prefetch a run of units if resources allow; return whether."""
        is_busy = self._requests >= READAHEAD_CONCURRENCY
        # A speculative request must not trigger an archive build or count against its rate limit.
        if is_busy or not self._memory.can_prefetch(BLOCK_BYTES) or not self._source.is_ready():
            return False
        self._start_download(run, run)
        return True

    def _start_download(self, units: range, run: range) -> list[Flight]:
        """Download what is not in flight of a run; return the flights of units."""
        with self._sink.lock:
            added = self._sink.in_flight.add(run)
            flights = self._sink.in_flight.overlapping(units)
            if not added or self._sequential.join(added):
                return flights
            requests = _split_at_gaps(added)
            self._users += len(requests)
            self._requests += len(requests)
        for number, request in enumerate(requests):
            name = f"block {request[0].index} of {self._path}"
            try:
                run_in_thread(partial(self._run_download, request), name)
            except BaseException as error:  # no thread can be started
                for left in requests[number:]:
                    self._end_request(left, error)
                raise
        return flights

    def _run_download(self, flights: Sequence[Flight]) -> None:
        """Download consecutive flights; runs on its own thread."""
        error: BaseException | None = None
        try:
            with self._connections:
                self._fetch(flights)
        except BaseException as failure:  # noqa: BLE001  (the waiting readers raise it)
            error = failure
        self._end_request(flights, error)

    def _end_request(self, flights: Sequence[Flight], error: BaseException | None) -> None:
        """Fail the flights that were not delivered, except those left to a full scan."""
        with self._sink.lock:
            self._requests -= 1
            left = [each for each in flights if not self._sequential.delivers(each.index)]
        self._sink.fail(left, error)
        self.release()

    def _fetch(self, flights: Sequence[Flight]) -> None:
        """Download flights by one request, split where another process downloads their units."""
        self._disk.ensure_directory()
        with FlightClaims(self._disk) as claims:
            while flights:
                first, count = flights[0], 1
                claims.claim(first, self._timeout_s)
                is_pending = not first.future.done()  # else by a scan
                missing = self._missing(first.units, verifies=True) if is_pending else range(0)
                if missing:
                    stop = missing.stop
                    for each in flights[1:]:
                        is_next = each.units.start == stop and claims.claim(each, 0.0)
                        if not is_next or self._missing(each.units) != each.units:
                            break
                        stop, count = each.units.stop, count + 1
                    self._request(range(missing.start, stop), flights[:count], claims)
                elif is_pending:
                    # They arrived since the cache lookup, or another process has stored them.
                    self._sink.resolve((first,), self._piece_in_memory(first.units))
                claims.release_all()
                flights = flights[count:]

    def _piece_in_memory(self, units: range) -> Piece | None:
        """Return cached units if some are only in memory, where they may be evicted."""
        if self._memory.is_empty():
            return None
        start, stop = units.start * UNIT_BYTES, min(units.stop * UNIT_BYTES, self.size_bytes)
        data = self.peek(start, stop)
        return None if data is None else Piece(start, data)

    def _request(self, units: range, flights: Sequence[Flight], claims: FlightClaims) -> None:
        """Download the missing units of flights by one request."""
        start, stop = units.start * UNIT_BYTES, min(units.stop * UNIT_BYTES, self.size_bytes)
        with self._source.open(start, stop, self._check.before(start)) as transfer:
            downloader: Downloader = self._sequential if transfer.is_full_body else self._ranges
            downloader.receive(transfer, BlockRequest(start, stop, flights, claims))


def _split_at_gaps(flights: Sequence[Flight]) -> list[list[Flight]]:
    """Return runs of flights that follow each other."""
    runs: list[list[Flight]] = []
    for flight in flights:
        if runs and runs[-1][-1].units.stop == flight.units.start:
            runs[-1].append(flight)
        else:
            runs.append([flight])
    return runs
