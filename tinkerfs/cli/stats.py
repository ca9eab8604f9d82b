"""The command `tinkerfs stats`: the activity of a mount over time."""

import itertools
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import click

from tinkerfs.cli.options import TIMEOUT, mountpoint_argument
from tinkerfs.errors import StartupError

#: A header is printed before this number of lines.
_LINES_PER_HEADER: Final = 20
#: Maximum number of intervals in a plot.
_MAX_PLOTTED: Final = 1000


@dataclass(frozen=True, slots=True)
class _StatsColumn:
    """A value of an interval: its key in JSON, its group and name, its width and decimals."""

    key: str
    group: str
    name: str
    width: int
    decimals: int = 0


_COLUMNS: Final = (
    _StatsColumn("operations_per_s", "fuse", "ops/s", 7),
    _StatsColumn("errors_per_s", "fuse", "err/s", 6),
    _StatsColumn("operation_ms", "fuse", "ms/op", 7, 2),
    _StatsColumn("api_requests_per_s", "api", "req/s", 6, 1),
    _StatsColumn("api_requests_in_flight", "api", "now", 4),
    _StatsColumn("store_mb_per_s", "MB/s", "store", 8, 1),
    _StatsColumn("cache_mb_per_s", "MB/s", "cache", 8, 1),
    _StatsColumn("kernel_mb_per_s", "MB/s", "kernel", 8, 1),
    _StatsColumn("metadata_hits_percent", "hits %", "meta", 5),
    _StatsColumn("block_hits_percent", "hits %", "block", 6),
    _StatsColumn("pending", "", "pending", 8),
)

#: The values of one interval by the keys of the columns; None if there is none.
Sample = dict[str, float | None]


@click.command(short_help="Show the activity of a mount, a line per interval.")
@mountpoint_argument(required=False)
@click.option(
    "--interval",
    "interval_s",
    metavar="S",
    type=TIMEOUT,
    default="1",
    show_default=True,
    help="Time between two lines.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N lines.")
@click.option("--plot", is_flag=True, help="Draw the values over time; needs a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
def stats(
    mountpoint: str | None, interval_s: float, count: int | None, plot: bool, as_json: bool
) -> None:
    """Print a line per interval with the activity of the mount at MOUNTPOINT, or the only mount.

    Operations are those that reach tinkerfs, without those that the kernel serves from its caches;
    reading the statistics adds about five per line. MB/s are data of weights from the object store
    and from the cache, and all data that reads returned to the kernel. Hits are those of the
    interval. `pending` counts waits, for example for an archive.

    Ends at Ctrl-C, or exits 1 when the mount is gone. Sends no API request.

    \b
        tinkerfs stats
        tinkerfs stats ~/tinker --interval 10 --count 6 --json
    """  # noqa: D301
    from tinkerfs.cli import screen  # lazy, like the next one, which imports the FUSE adapter
    from tinkerfs.cli.selection import select_mount

    if plot and (as_json or not screen.is_terminal()):
        raise click.UsageError("--plot needs a terminal, and cannot be combined with --json")
    samples = itertools.islice(_samples(select_mount(mountpoint).mountpoint, interval_s), count)
    if plot:
        _plot(samples, interval_s)
        return
    for number, sample in enumerate(samples):
        if as_json:
            click.echo(
                json.dumps({key: value and round(value, 3) for key, value in sample.items()})
            )
            continue
        if number % _LINES_PER_HEADER == 0:
            click.echo("\n".join(_header()))
        click.echo("".join(_cell(column, sample[column.key]) for column in _COLUMNS))


def _samples(mountpoint: str, interval_s: float) -> Iterator[Sample]:
    """Yield the values of each interval.

    Raises:
        StartupError: the mount is gone, or is not one of tinkerfs.
    """
    before = _read(mountpoint)
    due = time.monotonic()
    while True:
        due = max(due + interval_s, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0.0))
        after = _read(mountpoint)
        try:
            sample = rates(before, after)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise StartupError(f"{mountpoint}: its statistics are invalid") from None
        if sample is not None:
            yield sample
        before = after


def _read(mountpoint: str) -> dict[str, Any]:
    from tinkerfs.cli.selection import explain_lost_mount, explain_silence
    from tinkerfs.fuse import mount_table

    try:
        content = mount_table.read_file(f"{mountpoint}/.tinkerfs/stats.json")
    except TimeoutError:
        raise explain_silence(mountpoint) from None
    if content is None:
        raise explain_lost_mount(mountpoint)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise StartupError(f"{mountpoint}: its statistics are invalid")
    return values


def rates(before: dict[str, Any], after: dict[str, Any]) -> Sample | None:
    """Return the values of the time between two statistics; None after a restart."""
    seconds = after["uptime_s"] - before["uptime_s"]
    if before["started"] != after["started"] or seconds <= 0:
        return None

    def grown(read: Any) -> float:
        return float(read(after) - read(before))

    def per_s(read: Any) -> float:
        return grown(read) / float(seconds)

    def percent(hits: str, misses: str) -> float | None:
        hit, missed = grown(_counter(hits)), grown(_counter(misses))
        return 100 * hit / (hit + missed) if hit + missed else None

    timed = grown(_timed_operations)
    return {
        "operations_per_s": per_s(_operations),
        "errors_per_s": per_s(_failures),
        "operation_ms": 1e3 * grown(_operation_seconds) / timed if timed else None,
        "api_requests_per_s": per_s(lambda stats: stats["api_requests_total"]),
        "api_requests_in_flight": float(after["gauges"]["api_permits_used"]),
        "store_mb_per_s": per_s(_downloaded_bytes) / 1e6,
        "cache_mb_per_s": per_s(_counter("block_cache_bytes_read")) / 1e6,
        "kernel_mb_per_s": per_s(lambda stats: stats["read_bytes"]) / 1e6,
        "metadata_hits_percent": percent("metadata_cache_hits", "metadata_cache_misses"),
        "block_hits_percent": percent("block_cache_hits", "block_cache_misses"),
        "pending": float(len(after["pending"])),
    }


def _counter(name: str) -> Any:
    return lambda stats: stats["counters"].get(name, 0)


def _downloaded_bytes(stats: dict[str, Any]) -> int:
    """Return the bytes of weights from the store, and from the caching proxy of the site."""
    counters = stats["counters"]
    total: int = sum(counters.get(f"{peer}_bytes_received", 0) for peer in ("store", "blob_proxy"))
    return total


def _timed_operations(stats: dict[str, Any]) -> int:
    return sum(int(each["count"]) for each in stats["operations"].values())


def _operations(stats: dict[str, Any]) -> int:
    return _timed_operations(stats) + sum(map(int, stats["cached_replies"].values()))


def _operation_seconds(stats: dict[str, Any]) -> float:
    return float(sum(each["duration_s"] for each in stats["operations"].values()))


def _failures(stats: dict[str, Any]) -> int:
    operations = stats["operations"].values()
    return sum(int(count) for each in operations for count in each["errors"].values())


def _header() -> tuple[str, str]:
    """Return the two lines of a header: groups and names."""
    groups = ""
    for group, columns in itertools.groupby(_COLUMNS, lambda column: column.group):
        width = sum(column.width for column in columns)
        groups += f" {f' {group} ':-^{width - 1}}" if group else " " * width
    return groups, "".join(f"{column.name:>{column.width}}" for column in _COLUMNS)


def _cell(column: _StatsColumn, value: float | None) -> str:
    return f"{_number(column, value):>{column.width}}"


def _number(column: _StatsColumn, value: float | None) -> str:
    return "-" if value is None else f"{value:.{column.decimals}f}"


def _plot(samples: Iterator[Sample], interval_s: float) -> None:
    from tinkerfs.cli.screen import Screen, sparkline

    shown, past = Screen(), deque[Sample](maxlen=_MAX_PLOTTED)
    label_width = max(len(_label(column)) for column in _COLUMNS)
    for sample in samples:
        past.append(sample)
        width = shutil.get_terminal_size().columns - label_width - 24
        lines = []
        for column in _COLUMNS:
            values = [each[column.key] for each in past]
            largest = max((value for value in values if value is not None), default=None)
            lines.append(
                f"{_label(column):<{label_width}} {_number(column, sample[column.key]):>9}"
                f" {sparkline(values, width)} {_number(column, largest):>9}"
            )
        lines.append(
            f"{'':<{label_width}} {'now':>9} {f'{interval_s:g} s each':>{width}} {'max':>9}"
        )
        shown.draw(lines)


def _label(column: _StatsColumn) -> str:
    return " ".join(filter(None, (column.group, column.name)))
