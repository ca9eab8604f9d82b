"""Progress display of a transfer: a status line, and one line per file.

On a terminal the status line has a bar, the rate and the time left, for the current file and for
the whole transfer. It also counts the archives that the server is building. Without a terminal
there is one line per completed file and one per archive that is being built.
"""

import shutil
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import click

from tinkerfs.formatting import format_duration, format_size
from tinkerfs.printable import escape_control_chars
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

#: Redraw interval of the status line, and the period over which the rate is averaged, seconds.
_STEP_S = 0.1
_WINDOW_S = 10.0

#: Report a wait for an archive after this time, seconds; most archives exist already.
_BUILDING_S = 1.0

#: Prefix of the pending waits for archives in the telemetry.
_ARCHIVE = "archive "

_BAR_CHARACTERS = 20

#: Report no rate for fewer bytes than this; it would only measure the latency of a request.
_MIN_RATE_BYTES = 1 << 20


@dataclass(slots=True)
class Item:
    """Progress of one file. One thread modifies it, others only read it.

    Attributes:
        name: Path or tinker path to display.
        total_bytes: Length of the file.
        done_bytes: Bytes that are present so far.
        initial_bytes: Bytes that were present at the start.
        started_s: Start of the transfer, on the monotonic clock.
    """

    name: str
    total_bytes: int
    done_bytes: int
    initial_bytes: int = field(init=False)
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.initial_bytes = self.done_bytes
        self.started_s = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are present."""
        return self.done_bytes == self.total_bytes


class Progress:
    """Progress display of one transfer on standard error.

    `run` is called by the main thread, all other methods by one worker thread.

    Args:
        telemetry: Source of the pending waits and of the number of received bytes.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._is_terminal = sys.stderr.isatty()
        self._items: list[Item] = []
        self._current: Item | None = None
        self._lines: deque[str] = deque()
        #: Archive -> start of the wait for it, on the monotonic clock.
        self._archive_waits: dict[str, float] = {}
        self._is_drawn = False
        #: (time, position in bytes) samples for the rate.
        self._samples: deque[tuple[float, int]] = deque()
        self._initially_received_bytes = 0

    def start(self, items: list[Item]) -> None:
        """Start to display files; before that, only waits are displayed."""
        self._initially_received_bytes = self._telemetry.counter_value("bytes_received")
        self._items = items

    def advance(self, item: Item, size_bytes: int) -> None:
        """Record that more bytes of a file are present, and make it the current file."""
        if item is not self._current and item.done_bytes == item.initial_bytes:
            item.started_s = time.monotonic()
        self._current = item
        item.done_bytes += size_bytes

    def log(self, line: str) -> None:
        """Print a line above the status line."""
        self._lines.append(escape_control_chars(line))

    def finish(self, item: Item) -> None:
        """Print the line of a completed file."""
        transferred_bytes = item.done_bytes - item.initial_bytes
        elapsed_s = max(time.monotonic() - item.started_s, 0.001)
        text = format_size(item.total_bytes)
        if transferred_bytes:
            text += f" in {format_duration(elapsed_s)}"
        if transferred_bytes >= _MIN_RATE_BYTES:
            text += f", {format_size(transferred_bytes / elapsed_s)}/s"
        if item.initial_bytes == item.total_bytes and item.total_bytes:
            text += ", already present"
        elif item.initial_bytes:
            text += f", {format_size(item.initial_bytes)} already present"
        self.log(f"{item.name}: {text}")

    def run(self, future: "Future[T]") -> T:
        """Display progress until work on another thread is done; return its result.

        Raises:
            KeyboardInterrupt: A signal handler raised it; the work continues.
            Exception: The exception of the work.
        """
        done = threading.Event()
        future.add_done_callback(lambda _future: done.set())
        try:
            while not done.wait(_STEP_S):
                self._show()
        finally:
            self._show(is_last=True)
        return future.result()

    def _show(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if self._is_drawn:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._is_drawn = False
        self._update_waits()
        while self._lines:
            click.echo(self._lines.popleft(), err=True)
        if is_last or not self._is_terminal:
            return
        line = escape_control_chars(self._status_line(now))
        if line:
            width = shutil.get_terminal_size().columns
            click.echo(line[: width - 1], err=True, nl=False)
            self._is_drawn = True

    def _update_waits(self) -> None:
        now = time.monotonic()
        waits = {
            what.removeprefix(_ARCHIVE): now - elapsed_s
            for what, elapsed_s in self._telemetry.pending()
            if what.startswith(_ARCHIVE) and elapsed_s >= _BUILDING_S
        }
        if not self._is_terminal:
            for path in waits.keys() - self._archive_waits.keys():
                self.log(f"{path}: waiting for the server to build the archive")
        for path, since_s in self._archive_waits.items():
            if path not in waits:
                self.log(f"{path}: waited {format_duration(now - since_s)} for the archive")
        self._archive_waits = waits

    def _status_line(self, now: float) -> str:
        building = ""
        if self._archive_waits:
            longest_s = now - min(self._archive_waits.values())
            count = len(self._archive_waits)
            archives = "an archive" if count == 1 else f"{count} archives"
            building = f"building {archives}, {format_duration(longest_s)}"
        items = self._items
        total_bytes = sum(item.total_bytes for item in items)
        if not total_bytes:
            return building
        initial_bytes = sum(item.initial_bytes for item in items)
        stored_bytes = sum(item.done_bytes for item in items) - initial_bytes
        # Received bytes are counted at once, stored bytes only in whole blocks.
        received_bytes = (
            self._telemetry.counter_value("bytes_received") - self._initially_received_bytes
        )
        position = min(initial_bytes + max(stored_bytes, received_bytes), total_bytes)
        rate = self._update_rate(now, position)
        columns = [
            _bar(position / total_bytes),
            f"{position / total_bytes:4.0%}",
            f"{format_size(position)} of {format_size(total_bytes)}",
            f"{format_size(rate)}/s",
            _time_left(total_bytes - position, rate),
        ]
        current = self._current
        if current is not None and len(items) > 1:
            remaining_bytes = current.total_bytes - current.done_bytes
            share = current.done_bytes / current.total_bytes
            number = 1 + next(n for n, item in enumerate(items) if item is current)
            label = f"file {number} of {len(items)}: {share:.0%}"
            columns.append(f"{label}, {_time_left(remaining_bytes, rate)}: {_base_name(current)}")
        elif current is not None:
            columns.append(_base_name(current))
        return "  ".join([*columns, *filter(None, [building])])

    def _update_rate(self, now: float, position: int) -> float:
        """Add a sample; return the rate over the window, bytes per second."""
        self._samples.append((now, position))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_S:
            self._samples.popleft()
        since, first = self._samples[0]
        return max(position - first, 0) / (now - since) if now > since else 0.0


def _bar(share: float) -> str:
    done = int(share * _BAR_CHARACTERS)
    return f"[{'#' * done}{'-' * (_BAR_CHARACTERS - done)}]"


def _time_left(remaining_bytes: int, rate: float) -> str:
    return f"{format_duration(remaining_bytes / rate)} left" if rate else "- left"


def _base_name(item: Item) -> str:
    return item.name.rpartition("/")[2]
