"""Text that is redrawn in place on a terminal."""

import shutil
import sys
from collections.abc import Sequence
from typing import Final

import click

_LEVELS: Final = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS: Final = "._-:=+*#"


class Screen:
    """Lines on standard output, the last ones of which are replaced by new ones."""

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines in place of those of the last call, truncated to the terminal."""
        size = shutil.get_terminal_size()
        shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        # J clears what a longer text has left below.
        click.echo(f"{up}\r" + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J", nl=False)
        self._drawn = len(shown)


def rows_of_tables(tables: int) -> int:
    """Return the number of rows of each table below a summary, with two lines above its rows."""
    return max((shutil.get_terminal_size().lines - 2) // tables - 2, 1)


def is_terminal() -> bool:
    """Return whether standard output is a terminal that can redraw lines."""
    return sys.stdout.isatty()


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return the last values as one character each, from 0 to the largest of them.

    None, for which there is no value, is a space.
    """
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    levels = _LEVELS if is_unicode else _ASCII_LEVELS
    shown = values[-width:] if width > 0 else ()
    largest = max((value for value in shown if value is not None), default=0.0)
    return "".join(
        " "
        if value is None
        else levels[min(int(value / largest * len(levels)), len(levels) - 1)]
        if largest > 0
        else levels[0]
        for value in shown
    ).rjust(width)
