"""Progress of a transfer: written by the thread that transfers, read by the display."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands import this module for their help, without msgspec
    from tinkerfs.telemetry import Telemetry


@dataclass(slots=True, eq=False)
class Item:
    """Progress of one file.

    Attributes:
        name: path or tinker path to display.
        total_bytes: length of the file.
        done_bytes: bytes that are present so far.
        initial_bytes: bytes that were present at the start.
        started_s: start of the transfer, on the monotonic clock.
        finished_s: its end.
    """

    name: str
    total_bytes: int
    done_bytes: int
    initial_bytes: int = field(init=False)
    started_s: float = field(init=False)
    finished_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.initial_bytes = self.done_bytes
        self.started_s = self.finished_s = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are present."""
        return self.done_bytes == self.total_bytes


class TransferProgress:
    """Progress of all files of a transfer. One thread modifies it, others only read it.

    Attributes:
        items: the files; empty until their lengths are known.
        current: the file that made progress last.
        finished: the completed files that were not displayed yet, oldest first.
        telemetry: has the pending waits and the number of received bytes.
    """

    def __init__(self, telemetry: "Telemetry") -> None:
        self.telemetry = telemetry
        self.items: list[Item] = []
        self.current: Item | None = None
        self.finished: deque[Item] = deque()
        self._initially_received_bytes = 0

    def start(self, items: list[Item]) -> None:
        """Start to transfer files."""
        self._initially_received_bytes = self.telemetry.counter_value("bytes_received")
        self.items = items

    def advance(self, item: Item, size_bytes: int) -> None:
        """Record that more bytes of a file are present."""
        if item is not self.current and item.done_bytes == item.initial_bytes:
            item.started_s = time.monotonic()
        self.current = item
        item.done_bytes += size_bytes

    def finish(self, item: Item) -> None:
        """Record that a file is complete."""
        item.finished_s = time.monotonic()
        self.finished.append(item)

    def position_bytes(self) -> int:
        """Return how many bytes of all files are present."""
        initial_bytes = sum(item.initial_bytes for item in self.items)
        stored_bytes = sum(item.done_bytes for item in self.items) - initial_bytes
        # Received bytes are counted at once, stored bytes only in whole blocks.
        counted_bytes = self.telemetry.counter_value("bytes_received")
        received_bytes = counted_bytes - self._initially_received_bytes
        total_bytes = sum(item.total_bytes for item in self.items)
        return min(initial_bytes + max(stored_bytes, received_bytes), total_bytes)
