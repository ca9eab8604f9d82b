"""One file of a store as blocks: from memory, from disk, else fetched, once however many ask.

Blocks are fetched on threads of their own, by range requests: of one block, or of two in a row
ahead of who reads on and on; who waits for one only waits. A store that heeds no ranges, and an
archive that is packed, come whole: one such pass hands every block to whoever waits for it, and to
the cache, while the file is open. Other processes that share the cache are waited for by its locks.
Thread-safe.
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
from tinkerfs.weights.origin import BlockSource, ByteStream
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

#: Requests of one file at a time; fetching ahead leaves some to those who wait.
CONNECTIONS = 24

#: How often a block is fetched for one who waits for it and finds it gone from the disk by then.
_FETCHES = 3


class RemoteFile:
    """The bytes of one version of one file. Thread-safe; used from `acquire` to `release`.

    What it holds is let go with the last use, those of its own fetches included.

    Args:
        key: another file or version has another one.
        path: the file that a user asked for, for messages.
        size_bytes: its length.
        origin: where it comes from.
        disk: where its blocks are kept; closed with the last `release`.
        memory: where they are otherwise, within its bound.
        telemetry: counts hits and misses.
        timeout_s: how long to wait for room, or for another process.
        digests: what each block must be; empty where nobody knows.
    """

    def __init__(
        self,
        key: str,
        path: str,
        size_bytes: int,
        origin: BlockSource,
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
        self._origin = origin
        self._disk = disk
        self._memory = memory
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        is_needed = not origin.is_exact
        self._check = BlockCheck(disk, self.peek, size_bytes, digests=digests, is_needed=is_needed)
        origin.use_samples(self._check.sample)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.RLock()
        # All guarded by _lock.
        self._users = 0
        self._is_closed = False
        #: By block: in the end it is told where that is in memory, None where it is on disk.
        self._in_flight: dict[int, Future[bytes | None]] = {}
        self._requests = 0
        #: The next block of the pass under way, None where there is none.
        self._scan_position: int | None = None
        #: The flights that are left to the pass.
        self._left_to_scan: set[int] = set()
        #: Blocks that went from the disk as they came: the cache was cleared in that instant, or
        #: its disk is bad. They are kept in memory.
        self._memory_only: set[int] = set()
        self._stale_error: OSError | None = None

    def acquire(self) -> bool:
        """Begin a use, and return whether that can be: not once it is closed or stale."""
        with self._lock:
            if self._is_closed or self._stale_error is not None:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """End a use."""
        with self._lock:
            self._users -= 1
            is_last = self._is_closed = not self._users
        if is_last:
            self._memory.demote_prefetched(self.key)
            if self._stale_error is not None and self._check.is_needed:
                self._drop_blocks()  # those too that arrived after it was found out
            self._disk.close()

    def read_into(self, buffer: memoryview, start: int, ctx: RequestContext) -> None:
        """Fill `buffer` with the bytes from `start` on, which lie within the file.

        Args:
            buffer: of bytes, not empty.
            start: of the first byte.
            ctx: tells when to give up. The wait has no bound of its own: a fetch has, and a slow
                one that moves goes on.

        Raises:
            ApiError: they cannot be had.
            OSError: ESTALE when the file is another one now, or gone; EIO when it is damaged; EINTR
                when the caller gave up; as `Archives.url` where an archive must be built first.
        """
        if self._stale_error is not None:
            raise errors.stale(self._path, self._stale_error.strerror or "")
        index, first = divmod(start, BLOCK_BYTES)
        is_in_one = first + len(buffer) <= BLOCK_BYTES
        is_in_one = is_in_one and not self._check.looks_at_cached
        if is_in_one and self._disk.read_from_open_fd(index, first, buffer, ctx.blocking):
            self._telemetry.count("block_hits")
            return
        missing: list[tuple[memoryview, int, int, Future[bytes | None]]] = []
        for part, index, first in split_by_block(buffer, start):
            is_kept = self._fill(part, index, first, ctx)
            self._telemetry.count("block_hits" if is_kept else "block_misses")
            if not is_kept:
                missing.append(
                    (part, index, first, self._ensure_download(range(index, index + 1), ctx))
                )
        if missing:
            patient = replace(ctx, timeout_s=None)
            for part, index, first, flight in missing:
                self._fill_from(flight, part, index, first, patient)

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) where they are all in memory or on disk."""
        data = bytearray(stop - start)
        parts = split_by_block(memoryview(data), start)
        is_kept = all(self._fill(*part, BACKGROUND_CONTEXT) for part in parts)
        return bytes(data) if is_kept else None

    def fetch_ahead(self, start: int, stop: int, request_bytes: int) -> int:
        """Begin to fetch what of [start, stop) is not there, as far as there is room now.

        Args:
            start: where to begin.
            stop: behind the last byte.
            request_bytes: what a request is for; a block at least.

        Returns:
            up to where it is there or under way.
        """
        missing = (index for index in block_range(start, stop) if not self._is_there(index))
        for run in group_consecutive(missing, max(request_bytes // BLOCK_BYTES, 1)):
            if not self._start_prefetch(run):
                return max(start, run.start * BLOCK_BYTES)
        return stop

    def is_idle(self) -> bool:
        """Tell whether nothing is being fetched."""
        with self._lock:
            return not self._in_flight

    def prepare(self, ctx: RequestContext) -> None:
        """Have a URL at hand, waiting for the archive to be built.

        Raises:
            ApiError: none is to be had.
            OSError: ESTALE when the file is gone; as `Archives.url`.
        """
        self._origin.prepare(ctx)

    def is_on_disk(self, index: int) -> bool:
        """Tell whether a block is kept; whether it is sound turns out when it is read."""
        return self._disk.has(index)

    def fetch(self, index: int, ctx: RequestContext, count: int = 1) -> "Future[bytes | None]":
        """Begin to fetch a block, or join who does; one that is on disk is not fetched.

        Args:
            index: which block.
            ctx: waits where the archive must be built first; for nothing else.
            count: of blocks, this one and what follows, that one request may be for.

        Raises:
            ApiError, OSError: as `prepare`; what else goes wrong is the future's.
        """
        return self._ensure_download(range(index, index + count), ctx)

    def block_bytes(self, index: int) -> int:
        """Return the length of a block."""
        return min(BLOCK_BYTES, self.size_bytes - index * BLOCK_BYTES)

    def _drop_blocks(self) -> None:
        """Remove what is cached: the next version may have the same key."""
        self._check.drop_all()
        self._memory.drop(self.key)

    def _is_cached(self, index: int) -> bool:
        return self._memory.has((self.key, index)) or self._disk.has(index)

    def _is_there(self, index: int) -> bool:
        """Tell whether a block is there or under way."""
        return index in self._in_flight or self._is_cached(index)

    def _fill(self, buffer: memoryview, index: int, first: int, ctx: RequestContext) -> bool:
        """Fill a buffer from a block, if that is in memory or on disk."""
        data = self._memory.get((self.key, index))
        if data is not None:
            buffer[:] = memoryview(data)[first : first + len(buffer)]
            return True
        length = self.block_bytes(index)
        is_there = self._disk.read_into(index, first, buffer, length, ctx.blocking)
        return is_there and self._check.is_proven(index)

    def _fill_from(
        self,
        flight: "Future[bytes | None]",
        buffer: memoryview,
        index: int,
        first: int,
        ctx: RequestContext,
    ) -> None:
        """Fill a buffer from a block that is under way."""
        for _ in range(_FETCHES):
            try:
                data = ctx.wait_for(flight)
                if data is not None:
                    self._memory.get((self.key, index))  # it is used
                    buffer[:] = memoryview(data)[first : first + len(buffer)]
                    return
                if self._fill(buffer, index, first, ctx):
                    return
            except CacheWriteLost:
                pass
            with self._lock:
                self._memory_only.add(index)
            flight = self._ensure_download(range(index, index + 1), ctx)
        raise errors.corrupt(self._path, "what is fetched of it is lost on the disk of the cache")

    def _ensure_download(self, run: range, ctx: RequestContext) -> "Future[bytes | None]":
        """Return the flight of the first of some blocks, which somebody waits for."""
        with self._lock:
            flight = self._in_flight.get(run[0])
        if flight is None:
            self._origin.prepare(ctx)
            flight = self._start_download(run)
        return flight

    def _start_prefetch(self, run: range) -> bool:
        """Begin to fetch blocks that nobody waits for, if there is room; return whether it was."""
        is_busy = self._requests >= READAHEAD_CONCURRENCY
        # Nobody waits for an archive to be built, or is counted as asking, for a guess.
        if is_busy or not self._memory.can_prefetch(BLOCK_BYTES) or not self._origin.is_ready():
            return False
        self._start_download(run)
        return True

    def _start_download(self, run: range) -> "Future[bytes | None]":
        """Begin to fetch blocks in a row, up to one under way; return the flight of the first."""
        with self._lock:
            flight = self._in_flight.get(run[0])
            if flight is not None:
                return flight
            stop = next((index for index in run if index in self._in_flight), run.stop)
            flights = {index: Future[bytes | None]() for index in range(run.start, stop)}
            self._in_flight |= flights
            if self._scan_position is not None and run[0] >= self._scan_position:
                self._left_to_scan |= flights.keys()
                return flights[run[0]]
            self._users += 1
            self._requests += 1
        name = f"block {run[0]} of {self._path}"
        try:
            run_in_thread(lambda: self._run_download(flights), name)
        except BaseException as error:  # there can be no more threads
            self._end(flights, error)
            raise
        return flights[run[0]]

    def _run_download(self, flights: "dict[int, Future[bytes | None]]") -> None:
        """Fetch blocks in a row; runs on a thread of its own."""
        error: BaseException | None = None
        try:
            with self._connections:
                self._fetch(flights)
        except BaseException as failure:  # noqa: BLE001  (it belongs to whoever waits)
            error = failure
        self._end(flights, error)

    def _end(self, flights: "dict[int, Future[bytes | None]]", error: BaseException | None) -> None:
        """Tell who waits still that nothing comes, but for what is left to a pass."""
        with self._lock:
            self._requests -= 1
            left = {i: each for i, each in flights.items() if i not in self._left_to_scan}
        self._failed(left, error or self._too_short())
        self.release()

    def _fetch(self, flights: "dict[int, Future[bytes | None]]") -> None:
        """Fetch blocks in a row: by one request, but for those that another process is at."""
        self._disk.ensure_directory()
        run = range(min(flights), max(flights) + 1)
        claims: dict[int, ExitStack] = {}
        try:
            while run:
                first, stop = run[0], run[0] + 1
                self._claim(first, claims, self._timeout_s)
                data = self._memory.get((self.key, first))
                is_left = self._in_flight.get(first) is flights[first]  # none that a pass took
                if is_left and (data is not None or self._is_sound_on_disk(first)):
                    # It came between the look and the launch, or another process had it.
                    self._landed(first, data)
                elif is_left:
                    while stop < run.stop and self._try_claim_next(stop, claims):
                        stop += 1
                    self._request(range(first, stop), claims)
                for index in list(claims):
                    claims.pop(index).close()
                run = range(stop, run.stop)
        finally:
            for claim in claims.values():
                claim.close()

    def _claim(self, index: int, claims: dict[int, ExitStack], patience_s: float) -> bool:
        claims[index] = ExitStack()
        return claims[index].enter_context(self._disk.lock_block(index, patience_s))

    def _is_sound_on_disk(self, index: int) -> bool:
        a_byte = memoryview(bytearray(1))
        length = self.block_bytes(index)
        is_there = index not in self._memory_only and self._disk.read_into(index, 0, a_byte, length)
        return is_there and self._check.is_proven(index)

    def _try_claim_next(self, index: int, claims: dict[int, ExitStack]) -> bool:
        """Claim a block that follows in the same request, if nothing of it is there, or comes."""
        is_claimed = self._claim(index, claims, 0.0)
        return is_claimed and not self._disk.has(index) and not self._disk.has_partial(index)

    def _request(self, run: range, claims: dict[int, ExitStack]) -> None:
        """Fetch blocks in a row; the claim of each ends when it is there."""
        begin, stop = run[0] * BLOCK_BYTES, run[-1] * BLOCK_BYTES + self.block_bytes(run[-1])
        part = self._disk.read_partial(run[0])
        part = part if len(part) < self.block_bytes(run[0]) else b""
        before = self._check.before(begin + len(part), part)
        with self._origin.open(begin + len(part), stop, before) as transfer:
            if not transfer.is_full_body:
                pieces = chain([part], transfer) if part else transfer
                for index, arrival in self._arrivals(pieces, run[0]):
                    self._commit_block(index, arrival)
                    claims.pop(index).close()
                    if part:
                        self._disk.drop_partial(index)
                        part = b""
                return
            with self._lock:
                is_pass = self._scan_position is None
                place = self._scan_position = self._scan_position or 0
                self._left_to_scan |= {index for index in run if index >= place}
            if is_pass:
                self._full_scan(transfer, None)
            elif run[0] < place:
                self._full_scan(transfer, range(run[0], min(run.stop, place)))

    def _full_scan(self, transfer: ByteStream, only: range | None) -> None:
        """Take the blocks of a file that comes whole: all while it is used, or some alone."""
        error: BaseException | None = None
        first = 0 if only is None else only[0]
        pieces = _skip_bytes(transfer, first * BLOCK_BYTES)
        try:
            for index, arrival in self._arrivals(pieces, first, keeps_part=False):
                if only is None:
                    with self._lock:
                        self._scan_position = index + 1
                self._commit_block(index, arrival)
                with self._lock:
                    if only is None:
                        self._left_to_scan.discard(index)
                        is_over = self._users <= 1 and not self._in_flight
                    else:
                        is_over = index == only[-1]
                if is_over:
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
            self._failed(left, error or self._too_short())

    def _too_short(self) -> OSError:
        return errors.corrupt(self._path, "it is shorter than it was")

    def _arrivals(
        self, pieces: Iterable[bytes], index: int, *, keeps_part: bool = True
    ) -> Iterator[tuple[int, BlockDownload]]:
        """Yield the blocks that come, from `index` on, when they are whole.

        Where it breaks off within a block, the start of that is kept, if so wanted.
        """
        arrival: BlockDownload | None = None
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    if arrival is None:
                        arrival = self._arrival(index)
                    rest = arrival.feed(rest)
                    if not arrival.remaining_bytes:
                        yield index, arrival
                        arrival.close()
                        arrival, index = None, index + 1
        finally:
            if arrival is not None:
                if keeps_part and arrival.remaining_bytes:
                    arrival.keep_part()
                arrival.close()

    def _arrival(self, index: int) -> BlockDownload:
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

    def _commit_block(self, index: int, arrival: BlockDownload) -> None:
        """Keep a block, and tell those who wait."""
        if not arrival.is_sound():
            if self._check.is_needed:
                raise self._origin.stale("the store has another version of it now")
            raise errors.corrupt(self._path, f"block {index} is not what it was")
        self._telemetry.count("blocks_fetched")
        try:
            block = arrival.keep()
        except CacheWriteLost as lost:
            flight = self._in_flight.get(index)
            self._failed({} if flight is None else {index: flight}, lost)
        else:
            self._landed(index, block)

    def _landed(self, index: int, block: bytes | None) -> None:
        with self._lock:
            flight = self._in_flight.pop(index, None)
        if flight is not None:
            flight.set_result(block)

    def _failed(self, flights: "dict[int, Future[bytes | None]]", error: BaseException) -> None:
        with self._lock:
            if isinstance(error, OSError) and errors.is_stale(error):
                self._stale_error = error
                if self._check.is_needed:
                    self._drop_blocks()
            mine = [index for index, each in flights.items() if self._in_flight.get(index) is each]
            for index in mine:
                del self._in_flight[index]
        for index in mine:
            flights[index].set_exception(error)


def _skip_bytes(pieces: Iterable[bytes], skipped_bytes: int) -> Iterator[bytes]:
    """Yield what follows so many bytes."""
    for piece in pieces:
        rest = piece[skipped_bytes:]
        skipped_bytes -= len(piece) - len(rest)
        if rest:
            yield rest
