"""Calls that a first and a second look at each view make."""

from pathlib import Path

from bench_harness import Bench, calls, mounted

from tinkerfs.demo.server import DemoServer

#: View, and the most calls that a first look may make: of 4,000 checkpoints in pages of 100, of 200
#: runs, or of 500 sessions in pages of 200; a sampler is listed by no endpoint.
OF_RUNS = (
    ("checkpoints", 40),
    ("published", 40),
    ("expiring", 40),
    ("adapters", 40),
    ("models", 2),
)
OF_SESSIONS = (("sessions", 3), ("samplers", 0))


def count_views(bench: Bench, binding: str, cache: Path) -> None:
    def count(server: DemoServer, folder: Path, view: str, bound: int) -> None:
        (folder / ".tinkerfs/refresh").write_text("1")
        look = f"ls -l {view}"
        bench.add(look, calls(server, look, folder), "calls", bound)
        bench.add("... warm", calls(server, look, folder), "calls", 0)

    with (
        DemoServer(runs=200, checkpoints=20) as server,
        mounted(server, binding, cache, "--ttl", "600") as folder,
    ):
        for view, bound in OF_RUNS:
            count(server, folder, view, bound)
    with (
        DemoServer(runs=1000, checkpoints=1) as server,
        mounted(server, binding, cache, "--ttl", "600") as folder,
    ):
        for view, bound in OF_SESSIONS:
            count(server, folder, view, bound)
