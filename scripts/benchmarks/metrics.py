"""Cost of --metrics: a walk, and reading 1 GB of cached weights, with it and without it."""

import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benchmarks.comparison import Side, Work, compare, on_one_cpu, tmpfs
from scripts.benchmarks.harness import Bench, daemon_of, mounted
from scripts.benchmarks.server import Server
from scripts.benchmarks.throughput import GB, drop_page_cache, read_all, weights

RUNS, CHECKPOINTS = 100, 20
PORT = 19464
#: How often the metrics are scraped meanwhile, seconds: a common interval of Prometheus.
SCRAPE_INTERVAL_S = 15.0
ROUNDS = 9
GOAL = 1.02


def measure_metrics(bench: Bench, binding: str) -> None:
    with (
        tmpfs() as directory,
        Server(runs=RUNS, checkpoints=CHECKPOINTS) as server,
        sides(server, binding, directory, lambda mount: mount) as both,
    ):
        for side in both:
            walk(side.root)
            walk(side.root)
        with on_one_cpu(both):
            add(bench, "ls -lR", in_both_orders(both, walk))
    with (
        tmpfs() as directory,
        Server(runs=1, checkpoints=1, size_bytes=GB) as server,
        sides(server, binding, directory, weights) as both,
    ):
        for side in both:
            read_all(side.root)
        add(bench, "1 GB that is cached", in_both_orders(both, read_all, drop_page_cache))


@contextmanager
def sides(
    server: Server, binding: str, cache: Path, target: Callable[[Path], Path]
) -> Iterator[tuple[Side, Side]]:
    """Mount an account twice, and scrape the metrics of one of them during the block."""
    options, stop = ("--ttl=3600",), threading.Event()

    def scrape() -> None:
        while not stop.wait(SCRAPE_INTERVAL_S):
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as response:
                assert response.read().startswith(b"# HELP ")

    with (
        mounted(server, binding, cache, *options) as plain,
        mounted(server, binding, cache, *options, f"--metrics={PORT}") as measured,
    ):
        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            yield (
                Side("with", target(measured), daemon_of(measured)),
                Side("without", target(plain), daemon_of(plain)),
            )
        finally:
            stop.set()
            scraper.join()


def in_both_orders(
    both: tuple[Side, Side], work: Work, before: Work | None = None
) -> dict[str, float]:
    """Return the mean of the medians in both orders: the first side runs after a pause."""
    forward, backward = (compare(order, work, ROUNDS, before) for order in (both, both[::-1]))
    return {name: (span + backward[name]) / 2 for name, span in forward.items()}


def walk(directory: Path) -> None:
    subprocess.run(
        ["ls", "-lR", "runs"], cwd=directory, stdout=subprocess.DEVNULL, check=True, timeout=300
    )


def add(bench: Bench, what: str, spans: dict[str, float]) -> None:
    ratio = spans["with"] / spans["without"]
    bench.add(f"{what} with --metrics, of without", ratio, "x", goal=GOAL, details=spans)
