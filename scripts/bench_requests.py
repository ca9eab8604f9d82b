"""How many FUSE requests commands make, by kind, as libfuse itself tells them (its option -d).

Run as a script it is `tinkerfs`, whose libfuse tells each request on standard error.
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

from bench_harness import Bench, daemon_environment, succeeds
from bench_server import Server
from bench_sides import unmount

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
#: The kernel sends some requests behind a command that has ended (RELEASE, FORGET).
QUIET_S = 0.3
#: What was looked at before is forgotten by the kernel, and small files' bytes may be kept by it.
FORGOTTEN_S = 2.1


def count_requests(bench: Bench, binding: str, cache: Path) -> None:
    """Count what each command asks of a mount that knows the answers, 100 runs x 10."""
    with (
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        telling(server, binding, cache) as (folder, told),
    ):
        assert succeeds("ls -lR runs", folder)
        for what, script in COMMANDS:
            until_quiet(told)
            time.sleep(FORGOTTEN_S)
            before = told.stat().st_size
            assert succeeds(script.format(run=server.run_id), folder), what
            until_quiet(told)
            with told.open("rb") as file:
                file.seek(before)
                text = file.read().decode(errors="replace")
            kinds = Counter(_REQUEST.findall(text))
            bench.add(
                f"FUSE requests of {what}, {RUNS} runs x {CHECKPOINTS}",
                kinds.total(),
                "requests",
                beside=dict(kinds.most_common()),
            )


def until_quiet(told: Path) -> None:
    size = -1
    while size != (size := told.stat().st_size):
        time.sleep(QUIET_S)


@contextmanager
def telling(server: Server, binding: str, cache: Path) -> Iterator[tuple[Path, Path]]:
    """Mount; yield the mountpoint, and the file that tells the requests."""
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-") as folder,
        tempfile.NamedTemporaryFile(prefix="tinkerfs-bench-requests-") as told,
    ):
        arguments = ["mount", "--foreground", "--ttl", "3600", "--cache-dir", cache, folder]
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=daemon_environment(server, binding),
            stdout=told,
            stderr=told,
        )
        try:
            while not os.path.ismount(folder):
                assert process.poll() is None, Path(told.name).read_text()
                time.sleep(0.05)
            yield Path(folder), Path(told.name)
        finally:
            unmount(folder)
            process.wait(30)


def main() -> None:
    from tinkerfs.cli.main import main
    from tinkerfs.fuse.binding import Binding

    options = Binding.mount_options

    def with_debug(self: Binding, **kwargs: bool) -> dict[str, str | bool]:
        return options(self, **kwargs) | {"debug": True}

    Binding.mount_options = with_debug  # type: ignore[method-assign,assignment]
    main()


if __name__ == "__main__":
    main()
