"""Sums of the lines of an access log, for `tinkerfs profile`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from tinkerfs.access_log import AccessLine, parse_line
from tinkerfs.formatting import format_size
from tinkerfs.printable import escape_control_chars

#: Maximum number of paths and of processes; further ones are added up in one row.
_MAX_NAMES: Final = 50_000
_OTHERS: Final = "(others)"


@dataclass(slots=True)
class _Sum:
    """Sum of some operations."""

    count: int = 0
    failures: int = 0
    duration_s: float = 0.0
    size_bytes: int = 0

    def add(self, line: AccessLine) -> None:
        self.count += 1
        self.failures += line.outcome != "OK"
        self.duration_s += line.duration_s
        self.size_bytes += line.size_bytes


@dataclass(slots=True)
class Totals:
    """Sums of the operations of an access log: all, by operation, path and process."""

    all: _Sum = field(default_factory=_Sum)
    dropped_lines: int = 0
    by_operation: dict[str, _Sum] = field(default_factory=dict)
    by_path: dict[str, _Sum] = field(default_factory=dict)
    by_process: dict[str, _Sum] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Add a line; ignore other texts, but count the lines that the mount dropped."""
        line = parse_line(text)
        if line is None:
            words = text.split()
            if len(words) == 4 and words[::2] == ["#", "lines"] and words[1].isdecimal():
                self.dropped_lines += int(words[1])
            return
        self.all.add(line)
        _sum_of(self.by_operation, line.operation).add(line)
        _sum_of(self.by_path, line.path).add(line)
        process = f"{line.command}[{line.pid}]" if line.pid else "(unknown)"
        _sum_of(self.by_process, process).add(line)

    def report(self, rows: int = 10) -> list[str]:
        """Return a summary, and three tables of a number of rows."""
        everything = self.all
        summary = (
            f"{everything.count:,} operations, {everything.failures:,} failed,"
            f" {everything.duration_s:.3f} s, {format_size(everything.size_bytes)}"
        )
        dropped = f", {self.dropped_lines:,} more were dropped" * (self.dropped_lines > 0)
        return [
            summary + dropped,
            *self._table("OPERATION", self.by_operation, rows),
            *self._table("PATH", self.by_path, rows),
            *self._table("PROCESS", self.by_process, rows),
        ]

    def _table(self, title: str, sums: dict[str, _Sum], rows: int) -> Iterator[str]:
        largest = sorted(sums.items(), key=lambda item: item[1].duration_s, reverse=True)
        yield ""
        yield f"{'SECONDS':>10} {'%':>5} {'COUNT':>9} {'MS EACH':>9} {'BYTES':>10}  {title}"
        for name, each in largest[:rows]:
            percent = 100 * each.duration_s / (self.all.duration_s or 1.0)
            yield (
                f"{each.duration_s:>10.3f} {percent:>5.1f} {each.count:>9,}"
                f" {1e3 * each.duration_s / each.count:>9.3f} {format_size(each.size_bytes):>10}"
                f"  {escape_control_chars(name)}"
            )


def _sum_of(sums: dict[str, _Sum], name: str) -> _Sum:
    if name not in sums and len(sums) >= _MAX_NAMES:
        name = _OTHERS
    return sums.setdefault(name, _Sum())
