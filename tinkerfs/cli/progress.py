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
from concurrent.futures import Future
from typing import TypeVar

import click

from tinkerfs.formatting import format_duration, format_size
from tinkerfs.printable import escape_control_chars
from tinkerfs.transfer.progress import Item, TransferProgress

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


class Progress:
    """Progress display of one transfer on standard error."""

    def __init__(self, progress: TransferProgress) -> None:
        self._progress = progress
        self._is_terminal = sys.stderr.isatty()
        #: Archive -> start of the wait for it, on the monotonic clock.
        self._archive_waits: dict[str, float] = {}
        self._is_drawn = False
        #: (time, position in bytes) samples for the rate.
        self._samples: deque[tuple[float, int]] = deque()

    def run(self, future: Future[T]) -> T:
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
        lines = self._update_waits(now)
        while self._progress.finished:
            lines.append(_completed_line(self._progress.finished.popleft()))
        for line in lines:
            click.echo(escape_control_chars(line), err=True)
        if is_last or not self._is_terminal:
            return
        line = escape_control_chars(self._status_line(now))
        if line:
            width = shutil.get_terminal_size().columns
            click.echo(line[: width - 1], err=True, nl=False)
            self._is_drawn = True

    def _update_waits(self, now: float) -> list[str]:
        """Update the waits for archives; return a line for each that started or ended."""
        waits = {
            what.removeprefix(_ARCHIVE): now - elapsed_s
            for what, elapsed_s in self._progress.telemetry.pending()
            if what.startswith(_ARCHIVE) and elapsed_s >= _BUILDING_S
        }
        started = [] if self._is_terminal else waits.keys() - self._archive_waits.keys()
        lines = [f"{path}: waiting for the server to build the archive" for path in started]
        lines += [
            f"{path}: waited {format_duration(now - since_s)} for the archive"
            for path, since_s in self._archive_waits.items()
            if path not in waits
        ]
        self._archive_waits = waits
        return lines

    def _status_line(self, now: float) -> str:
        building = ""
        if self._archive_waits:
            longest_s = now - min(self._archive_waits.values())
            count = len(self._archive_waits)
            archives = "an archive" if count == 1 else f"{count} archives"
            building = f"building {archives}, {format_duration(longest_s)}"
        items = self._progress.items
        total_bytes = sum(item.total_bytes for item in items)
        if not total_bytes:
            return building
        position = self._progress.position_bytes()
        rate = self._update_rate(now, position)
        columns = [
            _bar(position / total_bytes),
            f"{position / total_bytes:4.0%}",
            f"{format_size(position)} of {format_size(total_bytes)}",
            f"{format_size(rate)}/s",
            _time_left(total_bytes - position, rate),
        ]
        current = self._progress.current
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


def _completed_line(item: Item) -> str:
    transferred_bytes = item.done_bytes - item.initial_bytes
    elapsed_s = max(item.finished_s - item.started_s, 0.001)
    text = format_size(item.total_bytes)
    if transferred_bytes:
        text += f" in {format_duration(elapsed_s)}"
    if transferred_bytes >= _MIN_RATE_BYTES:
        text += f", {format_size(transferred_bytes / elapsed_s)}/s"
    if item.initial_bytes == item.total_bytes and item.total_bytes:
        text += ", already present"
    elif item.initial_bytes:
        text += f", {format_size(item.initial_bytes)} already present"
    return f"{item.name}: {text}"


def _bar(share: float) -> str:
    done = int(share * _BAR_CHARACTERS)
    return f"[{'#' * done}{'-' * (_BAR_CHARACTERS - done)}]"


def _time_left(remaining_bytes: int, rate: float) -> str:
    return f"{format_duration(remaining_bytes / rate)} left" if rate else "- left"


def _base_name(item: Item) -> str:
    return item.name.rpartition("/")[2]
