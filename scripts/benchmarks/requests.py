"""Count the FUSE requests of commands, from the debug output of libfuse (-d).

Run as the main module, this is the command `tinkerfs` with this option, so that libfuse prints each
request to standard error.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.benchmarks.comparison import unmount
from scripts.benchmarks.harness import Bench, daemon_environment, succeeds
from scripts.benchmarks.server import Server

RUNS, CHECKPOINTS = 100, 10
COMMANDS = (
    ("ls", "ls runs"),
    ("ls -l", "ls -l runs"),
    ("ls -lR", "ls -lR runs"),
    ("find -type f", "find runs -type f"),
    ("du -s", "du -s runs"),
    ("cat of every checkpoint's info.json", "cat runs/*/checkpoints/*/*/info.json"),
    ("stat of one info.json", "stat runs/{run}/checkpoints/weights/*1/info.json"),
    ("stat of an absent name", "! stat runs/{run}/nothing 2>/dev/null"),
)
_REQUEST = re.compile(r"opcode: (\w+)")
#: The kernel sends some requests after a command has exited (RELEASE, FORGET).
QUIET_S = 0.3
#: Time until cached entries and attributes expire in the kernel, and tinkerfs lets it cache small
#: files.
KERNEL_EXPIRY_S = 2.1


def count_requests(bench: Bench, binding: str, cache: Path) -> None:
    """Count the FUSE requests of each command on a mount with warm caches."""
    with (
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        mounted_with_debug(server, binding, cache) as (directory, log),
    ):
        assert succeeds("ls -lR runs", directory)
        for what, script in COMMANDS:
            wait_until_quiet(log)
            time.sleep(KERNEL_EXPIRY_S)
            before = log.stat().st_size
            assert succeeds(script.format(run=server.run_id), directory), what
            wait_until_quiet(log)
            with log.open("rb") as file:
                file.seek(before)
                text = file.read().decode(errors="replace")
            kinds = Counter(_REQUEST.findall(text))
            bench.add(
                f"FUSE requests of {what}, {RUNS} runs x {CHECKPOINTS}",
                kinds.total(),
                "requests",
                details=dict(kinds.most_common()),
            )


def wait_until_quiet(log: Path) -> None:
    size = -1
    while size != (size := log.stat().st_size):
        time.sleep(QUIET_S)


@contextmanager
def mounted_with_debug(server: Server, binding: str, cache: Path) -> Iterator[tuple[Path, Path]]:
    """Mount; yield the mountpoint and the file with the debug output."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as directory,
        tempfile.NamedTemporaryFile(prefix="tinkerfs-bench-requests-") as log,
    ):
        arguments = ["mount", "--foreground", "--ttl", "3600", "--cache-dir", str(cache), directory]
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            env=daemon_environment(server, binding),
            stdout=log,
            stderr=log,
        )
        try:
            while not os.path.ismount(directory):
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.05)
            yield Path(directory), Path(log.name)
        finally:
            unmount(directory)
            process.wait(30)


def main() -> None:
    from tinkerfs.cli.main import main
    from tinkerfs.fuse.binding import Binding

    options = Binding.mount_options

    def with_debug(self: Binding, **kwargs: Any) -> dict[str, str | bool]:
        return options(self, **kwargs) | {"debug": True}

    Binding.mount_options = with_debug  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    main()
