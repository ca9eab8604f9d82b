"""Which units of a file are in flight, and the futures that their readers wait for."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tinkerfs.cache.data_layout import UNITS_PER_BLOCK
from tinkerfs.weights.block_download import Piece
from tinkerfs.weights.block_math import split_units

#: The result is the downloaded units if they are in memory, and None if they are on disk.
PieceFuture = Future[Piece | None]


@dataclass(eq=False, slots=True)
class Flight:
    """Consecutive units of one block that are in flight."""

    units: range
    future: PieceFuture = field(default_factory=Future)

    @property
    def index(self) -> int:
        """The index of the block."""
        return self.units.start // UNITS_PER_BLOCK


class FlightTable:
    """The flights of one file, which do not overlap. Not thread-safe."""

    def __init__(self) -> None:
        self._flights: dict[int, list[Flight]] = {}  # by block index

    def __len__(self) -> int:
        """Return the number of blocks with a flight."""
        return len(self._flights)

    def add(self, units: range) -> list[Flight]:
        """Return new flights for all units that are not in flight."""
        added = [Flight(part) for part in self._free(units)]
        for flight in added:
            self._flights.setdefault(flight.index, []).append(flight)
        return added

    def remove(self, flight: Flight) -> bool:
        """Remove a flight; return whether it was in the table."""
        flights = self._flights.get(flight.index, [])
        if flight not in flights:
            return False
        flights.remove(flight)
        if not flights:
            del self._flights[flight.index]
        return True

    def of_block(self, index: int) -> Sequence[Flight]:
        """Return the flights of a block."""
        return tuple(self._flights.get(index, ()))

    def overlapping(self, units: range) -> list[Flight]:
        """Return the flights that contain any of some units."""
        return [
            flight
            for part in split_units(units)
            for flight in self.of_block(part.start // UNITS_PER_BLOCK)
            if flight.units.start < part.stop and part.start < flight.units.stop
        ]

    def is_covered(self, units: range) -> bool:
        """Return whether all of some units are in flight."""
        return not any(True for _ in self._free(units))

    def _free(self, units: range) -> Iterator[range]:
        """Yield the runs of units that are not in flight, each within a block."""
        for part in split_units(units):
            start = part.start
            for flight in sorted(self.overlapping(part), key=lambda each: each.units.start):
                if start < flight.units.start:
                    yield range(start, flight.units.start)
                start = max(start, flight.units.stop)
            if start < part.stop:
                yield range(start, part.stop)


def future_of_all(flights: Sequence[Flight]) -> PieceFuture:
    """Return a future that is done when some flights are; its result counts only if it is one."""
    if len(flights) == 1:
        return flights[0].future
    combined, lock = PieceFuture(), threading.Lock()
    left = len(flights)

    def on_done(future: PieceFuture) -> None:
        nonlocal left
        with lock:
            left -= 1
            if combined.done():
                return
            if (error := future.exception()) is not None:
                combined.set_exception(error)
            elif not left:
                combined.set_result(None)

    for flight in flights:
        flight.future.add_done_callback(on_done)
    return combined
