"""The command `tinkerfs profile`: which operations, paths and processes take the time."""

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator
from typing import Final

import click

from tinkerfs.cli.options import TIMEOUT
from tinkerfs.errors import StartupError

#: Duration without a terminal, on which the command runs until Ctrl-C, seconds.
_DURATION_S: Final = 10.0
_REDRAW_S: Final = 1.0
_POLL_S: Final = 0.2
_READ_BYTES: Final = 1 << 16


@click.command(short_help="Show which operations, paths and processes take the time.")
@click.argument("source", metavar="[MOUNTPOINT|FILE]", required=False)
@click.option(
    "--duration",
    "duration_s",
    metavar="S",
    type=TIMEOUT,
    help="How long to observe a mount; by default until Ctrl-C on a terminal, and 10 s otherwise.",
)
def profile(source: str | None, duration_s: float | None) -> None:
    """Show which operations, paths and processes took the most time of a mount.

    Observes the mount at MOUNTPOINT, or the only mount, through its access log. On a terminal the
    tables are redrawn each second. FILE is a saved access log. The time is that in tinkerfs,
    including waits for the server. Operations that the kernel serves from its caches are not seen.

    \b
        tinkerfs profile
        tinkerfs profile ~/tinker --duration 30
        cat ~/tinker/.tinkerfs/access_log > slow.log
        tinkerfs profile slow.log
    """  # noqa: D301
    from tinkerfs.cli import screen  # lazy, like the next ones, which import the FUSE adapter
    from tinkerfs.cli.profile_totals import Totals
    from tinkerfs.cli.selection import explain_lost_mount, select_mount
    from tinkerfs.fuse import mount_table

    is_mount = source is None or mount_table.find_mount(mount_table.canonical_mountpoint(source))
    totals = Totals()
    if source is not None and not is_mount:
        for line in _lines_of_file(source):
            totals.add(line)
        if not totals.all.count:
            raise StartupError(f"{source} has no line of an access log")
        click.echo("\n".join(totals.report()))
        return
    mountpoint = select_mount(source).mountpoint
    is_live = screen.is_terminal()
    if duration_s is None and not is_live:
        duration_s = _DURATION_S
    shown, drawn_at, is_interrupted, is_lost = screen.Screen(), 0.0, False, False
    try:
        for lines in _follow(mountpoint, duration_s):
            for line in lines:
                totals.add(line)
            if is_live and time.monotonic() - drawn_at >= _REDRAW_S:
                drawn_at = time.monotonic()
                shown.draw(totals.report(screen.rows_of_tables(3)))
    except KeyboardInterrupt:
        is_interrupted = True
    except EOFError:
        is_lost = True
    if is_live:
        shown.draw(totals.report(screen.rows_of_tables(3)))
    else:
        click.echo("\n".join(totals.report()))
    if is_lost:
        raise explain_lost_mount(mountpoint)
    if is_interrupted and not is_live:
        raise KeyboardInterrupt


def _lines_of_file(path: str) -> Iterator[str]:
    from tinkerfs.safe_open import open_regular

    try:
        fd = open_regular(path, os.O_RDONLY, follow_symlinks=True)
    except OSError as error:
        raise StartupError(
            f"{path}: {error.strerror} (hint: name a mount or a saved access log)"
        ) from None
    with open(fd, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield from file


def _follow(mountpoint: str, duration_s: float | None) -> Iterator[list[str]]:
    """Yield the lines of a mount's access log as they arrive, at least every 0.2 s.

    Another process reads them, because a read of a mount that hangs cannot be interrupted.

    Raises:
        EOFError: the log ended, or the mount is gone.
        StartupError: the mount did not reply, even with the first line of the log.
    """
    from tinkerfs.access_log import ACCESS_LOG_PATH
    from tinkerfs.cli.selection import explain_silence
    from tinkerfs.fuse import mount_table

    command = ["cat", "--", f"{mountpoint}{ACCESS_LOG_PATH}"]
    process = subprocess.Popen(  # noqa: S603  (a list, no shell)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for this process
    )
    assert process.stdout is not None
    output, rest, deadline, has_replied = process.stdout.fileno(), b"", None, False
    if duration_s is not None:
        deadline = time.monotonic() + duration_s
    try:
        while deadline is None or time.monotonic() < deadline:
            lines: list[bytes] = []
            if select.select([output], [], [], _POLL_S)[0]:
                chunk = os.read(output, _READ_BYTES)
                if not chunk:
                    raise EOFError
                has_replied = True
                *lines, rest = (rest + chunk).split(b"\n")
            elif mount_table.find_mount(mountpoint) is None:
                raise EOFError  # a lazy unmount leaves the open log as it is
            yield [os.fsdecode(line) for line in lines]
        if not has_replied:
            raise explain_silence(mountpoint)
    finally:
        process.kill()
        process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL_S)
