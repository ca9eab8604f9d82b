"""One file of a store as blocks: from memory, from disk, else fetched, once however many ask.

Each block is fetched on a thread of its own, by a range request; who waits for it only waits. A
store that heeds no ranges, and an archive that is packed, come whole: one such pass hands every
block to whoever waits for it, and to the cache, while the file is open. Other processes that share
the cache are waited for by its locks. Thread-safe.
"""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Protocol, Self

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.cache.blocks import BlockFile
from tinkerfs.cache.flight import in_thread
from tinkerfs.cache.memory import BlockMemory
from tinkerfs.call import IN_PROCESS, Call
from tinkerfs.telemetry import Telemetry

__all__ = [
    "BLOCK_BYTES",
    "CONNECTIONS_AHEAD",
    "Arriving",
    "Origin",
    "RemoteFile",
    "blocks_of",
    "digest_of",
]

#: What is fetched, checked and kept at a time: at 100 MB/s and 50 ms to the store 16 of them at a
#: time hide the latency, and one is soon there.
BLOCK_BYTES = 4 << 20

#: Requests of one file at a time; fetching ahead leaves some to those who wait. Measured through a
#: mount at 50 ms latency and 40 MB/s a connection: 8 ahead gave 171 MB/s, 16 ahead and a quicker
#: start 268 to 297, curl with 8 ranges 295. Where the processor is what is slow, nothing is gained.
CONNECTIONS = 24
CONNECTIONS_AHEAD = 16


class Arriving(Protocol):
    """Bytes on their way, in order: `Transfer`, or it unpacked."""

    @property
    def is_whole(self) -> bool:
        """Whether all of the file comes, whatever was asked for."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yield them."""
        ...

    def __enter__(self) -> Self:
        """Return the same."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Let go of the connection."""
        ...


class Origin(Protocol):
    """Where a file comes from: a `Source`, or it unpacked."""

    def prepare(self, call: Call) -> None:
        """Have at hand what `open` needs, as long as it takes."""
        ...

    def is_ready(self) -> bool:
        """Tell whether `open` has what it needs."""
        ...

    def open(self, start: int, stop: int) -> Arriving:
        """Ask for [start, stop)."""
        ...


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
        origin: Origin,
        disk: BlockFile,
        memory: BlockMemory,
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
        self._digests = digests
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.RLock()
        # All guarded by _lock.
        self._users = 0
        self._is_closed = False
        self._flights: dict[int, Future[bytes]] = {}
        #: The next block of the pass under way, None where there is none.
        self._passing: int | None = None
        #: The flights that are left to the pass.
        self._awaited: set[int] = set()
        self._stale: OSError | None = None

    def acquire(self) -> bool:
        """Begin a use, and return whether that can be: not once it is closed or stale."""
        with self._lock:
            if self._is_closed or self._stale is not None:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """End a use."""
        with self._lock:
            self._users -= 1
            is_last = self._is_closed = not self._users
        if is_last:
            self._disk.close()

    def read_into(self, buffer: memoryview, start: int, call: Call) -> None:
        """Fill `buffer` with the bytes from `start` on, which lie within the file.

        Args:
            buffer: of bytes, not empty.
            start: of the first byte.
            call: tells when to give up. The wait has no bound of its own: a fetch has, and a slow
                one that moves goes on.

        Raises:
            ApiError: they cannot be had.
            OSError: ESTALE when the file is another one now, or gone; EIO when it is damaged; EINTR
                when the caller gave up; as `Archives.url` where an archive must be built first.
        """
        if self._stale is not None:
            raise errors.stale(self._path, self._stale.strerror or "")
        missing: list[tuple[memoryview, int, Future[bytes]]] = []
        for part, index, first in _parts(buffer, start):
            is_kept = self._fill(part, index, first, call)
            self._telemetry.count("block_hits" if is_kept else "block_misses")
            if not is_kept:
                missing.append((part, first, self._wanted(index, call)))
        if missing:
            patient = replace(call, timeout_s=None)
            for part, first, flight in missing:
                part[:] = memoryview(patient.wait(flight))[first : first + len(part)]

    def peek(self, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) where they are all in memory or on disk."""
        data = bytearray(stop - start)
        parts = _parts(memoryview(data), start)
        is_kept = all(self._fill(*part, IN_PROCESS) for part in parts)
        return bytes(data) if is_kept else None

    def fetch_ahead(self, start: int, stop: int) -> int:
        """Begin to fetch what of [start, stop) is not there, as far as there is room now.

        Returns:
            up to where it is there or under way.
        """
        for index in blocks_of(start, stop):
            with self._lock:
                is_under_way = index in self._flights
                is_busy = len(self._flights) >= CONNECTIONS_AHEAD
            if is_under_way or self._has(index):
                continue
            # Nobody waits for an archive to be built, or is counted as asking, for a guess.
            if is_busy or not self._memory.has_room(BLOCK_BYTES) or not self._origin.is_ready():
                return max(start, index * BLOCK_BYTES)
            self._flight(index)
        return stop

    def is_idle(self) -> bool:
        """Tell whether nothing is being fetched."""
        with self._lock:
            return not self._flights

    def prepare(self, call: Call) -> None:
        """Have a URL at hand, waiting for the archive to be built.

        Raises:
            ApiError: none is to be had.
            OSError: ESTALE when the file is gone; as `Archives.url`.
        """
        self._origin.prepare(call)

    def is_on_disk(self, index: int) -> bool:
        """Tell whether a block is kept; whether it is sound turns out when it is read."""
        return self._disk.has(index)

    def fetch(self, index: int, call: Call) -> "Future[bytes]":
        """Begin to fetch a block, or join who does; a block on disk is read from there.

        Args:
            index: which block.
            call: waits where the archive must be built first; for nothing else.

        Raises:
            ApiError, OSError: as `prepare`; what else goes wrong is the future's.
        """
        return self._wanted(index, call)

    def block_bytes(self, index: int) -> int:
        """Return the length of a block."""
        return min(BLOCK_BYTES, self.size_bytes - index * BLOCK_BYTES)

    def _has(self, index: int) -> bool:
        return self._memory.get((self.key, index)) is not None or self._disk.has(index)

    def _fill(self, buffer: memoryview, index: int, first: int, call: Call) -> bool:
        """Fill a buffer from a block, if that is in memory or on disk."""
        data = self._memory.get((self.key, index))
        if data is not None:
            buffer[:] = memoryview(data)[first : first + len(buffer)]
            return True
        length = self.block_bytes(index)
        return self._disk.read_into(index, first, buffer, length, call.waiting)

    def _wanted(self, index: int, call: Call) -> "Future[bytes]":
        """Return the flight of a block that somebody waits for."""
        with self._lock:
            flight = self._flights.get(index)
        if flight is None:
            self._origin.prepare(call)
            flight = self._flight(index)
        return flight

    def _flight(self, index: int) -> "Future[bytes]":
        with self._lock:
            flight = self._flights.get(index)
            if flight is not None:
                return flight
            flight = self._flights[index] = Future()
            if self._passing is not None and index >= self._passing:
                self._awaited.add(index)
                return flight
            self._users += 1
        in_thread(lambda: self._fly(index, flight), f"block {index} of {self._path}")
        return flight

    def _fly(self, index: int, flight: "Future[bytes]") -> None:
        """Fetch a block; runs on a thread of its own."""
        try:
            with self._connections:
                self._fetch(index)
            with self._lock:
                is_left = self._flights.get(index) is flight and index not in self._awaited
            if is_left:
                self._failed({index: flight}, self._too_short())
        except BaseException as error:  # noqa: BLE001  (it belongs to whoever waits)
            self._failed({index: flight}, error)
        finally:
            self.release()

    def _fetch(self, index: int) -> None:
        begin, length = index * BLOCK_BYTES, self.block_bytes(index)
        self._disk.prepare()
        with self._disk.claimed(index, self._timeout_s):
            # Looked for first: to read it memory is made, and cleared.
            data = self._disk.read(index, 0, length, length) if self._disk.has(index) else None
            if data is not None:  # another process had it under way
                self._landed(index, data)
                return
            part = self._disk.part(index)
            part = part if len(part) < length else b""
            with self._origin.open(begin + len(part), begin + length) as transfer:
                if not transfer.is_whole:
                    for number, block in self._blocks(transfer, index, part):
                        self._take(number, block)
                    if part:
                        self._disk.drop_part(index)
                    return
                with self._lock:
                    if self._passing is not None and index >= self._passing:
                        self._awaited.add(index)
                        return
                    is_pass = self._passing is None
                    if is_pass:
                        self._passing = 0
                        self._awaited.add(index)
                self._pass(transfer, None if is_pass else index)

    def _pass(self, transfer: Arriving, only: int | None) -> None:
        """Take the blocks of a file that comes whole: all while it is used, or one alone."""
        error: BaseException | None = None
        try:
            for index, block in self._blocks(transfer, 0):
                if only is None:
                    with self._lock:
                        self._passing = index + 1
                if only is None or index == only:
                    self._take(index, block)
                else:
                    self._memory.release(len(block))
                with self._lock:
                    if only is None:
                        self._awaited.discard(index)
                    is_over = index == only or (self._users <= 1 and not self._flights)
                if is_over:
                    return
        except BaseException as failure:
            error = failure
            raise
        finally:
            if only is None:
                self._end_pass(error)

    def _end_pass(self, error: BaseException | None) -> None:
        with self._lock:
            self._passing = None
            left = {index: self._flights[index] for index in self._awaited & self._flights.keys()}
            self._awaited.clear()
        if left:
            self._failed(left, error or self._too_short())

    def _too_short(self) -> OSError:
        return errors.damaged(self._path, "it is shorter than it was")

    def _blocks(
        self, transfer: Arriving, index: int, part: bytes = b""
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the blocks that come, from `index` on; the room of each is the caller's then.

        What comes follows `part`, the start of the first. Where it breaks off within a block, the
        start of that is kept.
        """
        pieces = [part]
        have, room = len(part), 0
        try:
            for piece in transfer:
                rest = piece
                while rest:
                    length = self.block_bytes(index)
                    if not room:
                        if length <= 0:
                            raise errors.damaged(self._path, "it is longer than it was")
                        self._reserve(length)
                        room = length
                    pieces.append(rest[: length - have])
                    have += len(pieces[-1])
                    rest = rest[len(pieces[-1]) :]
                    if have == length:
                        block = b"".join(pieces)
                        pieces, have, room = [], 0, 0
                        yield index, block
                        index += 1
        finally:
            if have and not transfer.is_whole:
                self._disk.put_part(index, b"".join(pieces))
            if room:
                self._memory.release(room)

    def _reserve(self, size_bytes: int) -> None:
        if not self._memory.reserve(size_bytes, self._timeout_s):
            raise errors.TimedOut("no memory was free for a block in time")

    def _take(self, index: int, block: bytes) -> None:
        """Keep a block, whose room is reserved, and hand it to those who wait."""
        if self._digests and digest_of(block) != self._digests[index]:
            self._memory.release(len(block))
            raise errors.damaged(self._path, f"block {index} is not what it was")
        self._telemetry.count("blocks_fetched")
        if self._disk.put(index, block):
            self._memory.release(len(block))
        else:
            self._memory.keep((self.key, index), block)
        self._landed(index, block)

    def _landed(self, index: int, block: bytes) -> None:
        with self._lock:
            flight = self._flights.pop(index, None)
        if flight is not None:
            flight.set_result(block)

    def _failed(self, flights: "dict[int, Future[bytes]]", error: BaseException) -> None:
        with self._lock:
            if isinstance(error, OSError) and errors.is_stale(error):
                self._stale = error
            mine = [index for index, each in flights.items() if self._flights.get(index) is each]
            for index in mine:
                del self._flights[index]
        for index in mine:
            flights[index].set_exception(error)


def blocks_of(start: int, stop: int) -> range:
    """Return the blocks that hold the bytes [start, stop)."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES) if stop > start else 0)


def _parts(buffer: memoryview, start: int) -> Iterator[tuple[memoryview, int, int]]:
    """Yield the parts of a buffer for what is at `start`: of which block, and where in that."""
    index, first = divmod(start, BLOCK_BYTES)
    while buffer:
        part = buffer[: BLOCK_BYTES - first]
        yield part, index, first
        buffer, index, first = buffer[len(part) :], index + 1, 0


def digest_of(block: bytes) -> bytes:
    """Return what tells a block from any other."""
    return hashlib.sha256(block).digest()[:16]
