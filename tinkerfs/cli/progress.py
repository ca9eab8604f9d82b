"""What a long transfer shows while it runs: one line that is written over, a line a file after it.

On a terminal the line has a bar, the rate and the time left, of the file under way and of all; and
which archives are being built, for how long. Elsewhere there are the lines of the files alone, and
one for each archive that is waited for.
"""

import shutil
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import click

from tinkerfs.cli.formatting import format_duration, format_size
from tinkerfs.printable import printable
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

#: How often the line is written, seconds; and over how much time the rate is taken.
_STEP_S = 0.1
_WINDOW_S = 10.0

#: An archive is said to be waited for after so many seconds: most are there at once.
_BUILDING_S = 1.0

#: How `Archives` calls a wait for one.
_ARCHIVE = "archive "

_BAR_CHARACTERS = 20

#: Of less no rate is told: it would be that of a request.
_LEAST_BYTES = 1 << 20


@dataclass(slots=True)
class Item:
    """One file on its way. Changed by one thread, read by others.

    Attributes:
        name: what it is called.
        total_bytes: its length.
        done_bytes: how much of it is there.
        had_bytes: how much of it was there before.
        began_s: when it was first worked on, on the monotonic clock.
    """

    name: str
    total_bytes: int
    done_bytes: int
    initial_bytes: int = field(init=False)
    began_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.initial_bytes = self.done_bytes
        self.began_s = time.monotonic()

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self.done_bytes == self.total_bytes


class Progress:
    """What is shown of one transfer. `run` is the main thread's, the rest for any one other.

    Args:
        telemetry: tells what is waited for, and what came in so far.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._is_terminal = sys.stderr.isatty()
        self._items: list[Item] = []
        self._current: Item | None = None
        self._lines: deque[str] = deque()
        #: Since when which archive is waited for, on the monotonic clock.
        self._waits: dict[str, float] = {}
        self._is_drawn = False
        #: When how many bytes were there, for the rate.
        self._places: deque[tuple[float, int]] = deque()
        self._received_bytes = 0

    def start(self, items: list[Item]) -> None:
        """Begin to show files; before this only waits are shown."""
        self._received_bytes = self._telemetry.counter_value("bytes_received")
        self._items = items

    def advance(self, item: Item, size_bytes: int) -> None:
        """Take note that more of a file is there."""
        if item is not self._current and item.done_bytes == item.initial_bytes:
            item.began_s = time.monotonic()
        self._current = item
        item.done_bytes += size_bytes

    def log(self, line: str) -> None:
        """Print a line above."""
        self._lines.append(printable(line))

    def finish(self, item: Item) -> None:
        """Tell that a file is whole."""
        came_bytes = item.done_bytes - item.initial_bytes
        took_s = max(time.monotonic() - item.began_s, 0.001)
        words = format_size(item.total_bytes)
        if came_bytes:
            words += f" in {format_duration(took_s)}"
        if came_bytes >= _LEAST_BYTES:
            words += f", {format_size(came_bytes / took_s)}/s"
        if item.initial_bytes:
            had = (
                ""
                if item.initial_bytes == item.total_bytes
                else f"{format_size(item.initial_bytes)} "
            )
            words += f", {had}there already"
        self.log(f"{item.name}: {words}")

    def run(self, future: "Future[T]") -> T:
        """Show how it goes until work on another thread is done; return its result.

        Raises:
            KeyboardInterrupt: as the signal's handler raises it; the work goes on meanwhile.
            Exception: what the work raised.
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
        self._tell_waits()
        while self._lines:
            click.echo(self._lines.popleft(), err=True)
        if is_last or not self._is_terminal:
            return
        line = printable(self._line(now))
        if line:
            width = shutil.get_terminal_size().columns
            click.echo(line[: width - 1], err=True, nl=False)
            self._is_drawn = True

    def _tell_waits(self) -> None:
        now = time.monotonic()
        waits = {
            what.removeprefix(_ARCHIVE): now - for_s
            for what, for_s in self._telemetry.pending()
            if what.startswith(_ARCHIVE) and for_s >= _BUILDING_S
        }
        if not self._is_terminal:
            for path in waits.keys() - self._waits.keys():
                self.log(f"{path}: its archive is being built")
        for path, since_s in self._waits.items():
            if path not in waits:
                self.log(f"{path}: waited {format_duration(now - since_s)} for its archive")
        self._waits = waits

    def _line(self, now: float) -> str:
        building = ""
        if self._waits:
            longest = now - min(self._waits.values())
            what = "an archive is" if len(self._waits) == 1 else f"{len(self._waits)} archives are"
            building = f"{what} being built, {format_duration(longest)}"
        items = self._items
        total_bytes = sum(item.total_bytes for item in items)
        if not total_bytes:
            return building
        had_bytes = sum(item.initial_bytes for item in items)
        came_bytes = sum(item.done_bytes for item in items) - had_bytes
        # What comes in is seen at once; what is kept, by whole blocks.
        received_bytes = self._telemetry.counter_value("bytes_received") - self._received_bytes
        place = min(had_bytes + max(came_bytes, received_bytes), total_bytes)
        rate = self._rate(now, place)
        parts = [
            _bar(place / total_bytes),
            f"{place / total_bytes:4.0%}",
            f"{format_size(place)} of {format_size(total_bytes)}",
            f"{format_size(rate)}/s",
            _left(total_bytes - place, rate),
        ]
        current = self._current
        if current is not None and len(items) > 1:
            left_bytes = current.total_bytes - current.done_bytes
            share = current.done_bytes / current.total_bytes
            number = 1 + next(n for n, item in enumerate(items) if item is current)
            of = f"file {number} of {len(items)}"
            parts.append(f"{of}: {share:.0%}, {_left(left_bytes, rate)}: {_short(current)}")
        elif current is not None:
            parts.append(_short(current))
        return "  ".join([*parts, *filter(None, [building])])

    def _rate(self, now: float, place: int) -> float:
        """Return the bytes a second of the last time."""
        self._places.append((now, place))
        while len(self._places) > 2 and now - self._places[0][0] > _WINDOW_S:
            self._places.popleft()
        since, first = self._places[0]
        return max(place - first, 0) / (now - since) if now > since else 0.0


def _bar(share: float) -> str:
    done = int(share * _BAR_CHARACTERS)
    return f"[{'#' * done}{'-' * (_BAR_CHARACTERS - done)}]"


def _left(left_bytes: int, rate: float) -> str:
    return f"{format_duration(left_bytes / rate)} left" if rate else "- left"


def _short(item: Item) -> str:
    return item.name.rpartition("/")[2]
