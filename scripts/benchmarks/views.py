"""Count the API requests of a cold and a warm listing of each view."""

from pathlib import Path

from scripts.benchmarks.harness import Bench, calls, mounted
from tests.support.faulty_server import FaultyServer

#: View -> maximum number of requests of a cold listing. There are 4,000 checkpoints in pages of
#: 1,000, 200 runs, and 500 sessions in pages of 200. No endpoint lists samplers.
RUN_VIEWS = (
    ("checkpoints", 4),
    ("published", 4),
    ("expiring", 4),
    ("adapters", 4),
    ("models", 2),
)
SESSION_VIEWS = (("sessions", 3), ("samplers", 0))


def count_views(bench: Bench, binding: str, cache: Path) -> None:
    def count(server: FaultyServer, directory: Path, view: str, bound: int) -> None:
        (directory / ".tinkerfs/refresh").write_text("1")
        command = f"ls -l {view}"
        bench.add(command, calls(server, command, directory), "calls", bound)
        bench.add("... warm", calls(server, command, directory), "calls", 0)

    with (
        FaultyServer(runs=200, checkpoints=20) as server,
        mounted(server, binding, cache, "--ttl", "600") as directory,
    ):
        for view, bound in RUN_VIEWS:
            count(server, directory, view, bound)
    with (
        FaultyServer(runs=1000, checkpoints=1) as server,
        mounted(server, binding, cache, "--ttl", "600") as directory,
    ):
        for view, bound in SESSION_VIEWS:
            count(server, directory, view, bound)
