"""Requests and times of an export on a server without archives."""

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from scripts.benchmarks.harness import TINKERFS, Bench, daemon_environment, mounted, stderr_of
from scripts.benchmarks.server import Server

LATENCY_S = 0.05
SIZE_BYTES = 20 << 20
#: Exports are detected when they are done by polls, at most so far apart.
POLL_S = 5.0

#: What is done, in the directory of a checkpoint, and the maximum number of API requests. Two
#: requests read the checkpoint's version, before and after the export. One reads the size.
STEPS = (
    ("echo 1h > export", "echo 1h > export", 9),
    ("cat export", "cat export", 0),
    ("ls files/", "ls files/", 2),
    ("cat of a file of 20 MB", "cat files/adapter_model.safetensors", 0),
    ("echo 2h > export, again", "echo 2h > export", 2),
    ("echo never > export", "echo never > export", 1),
)


def measure_exports(bench: Bench, binding: str, queue_s: float) -> None:
    """Count the requests of an export, and measure them.

    Args:
        queue_s: Time that the server has no capacity, seconds; 0 to leave that out.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tinkerfs-bench-cache-") as cache,
        Server(
            runs=1,
            checkpoints=2,
            profile="official-0.36",
            latency_s=LATENCY_S,
            size_bytes=SIZE_BYTES,
        ) as server,
    ):
        with mounted(server, binding, Path(cache)) as root:
            directory = next((root / "runs" / server.run_id / "checkpoints/weights").iterdir())
            for what, script, bound in STEPS:
                took_s, counts = run(server, script, directory)
                bench.add(what, took_s, "s")
                bench.add("... its API requests", counts["api"], "calls", bound)
            if queue_s:
                measure_queue(bench, server, directory, queue_s)
        path = f"tinker://{server.run_id}/weights/{directory.name}"
        options = ["--export", "--cache-dir", f"{cache}/another"]

        def get() -> None:
            subprocess.run(
                [*TINKERFS, "get", *options, path, f"{cache}/copy"],
                env=daemon_environment(server, binding),
                stderr=subprocess.DEVNULL,
                check=True,
            )

        took_s, counts = measure(server, get)
        bench.add("tinkerfs get --export, 20 MB", took_s, "s")
        bench.add("... its API requests", counts["api"], "calls", 15)


def measure_queue(bench: Bench, server: Server, directory: Path, queue_s: float) -> None:
    server.ask("exports", {"load_s": queue_s, "queue_state": "paused_capacity"})
    took_s, counts = run(server, "echo 1h > export", directory)
    server.ask("exports", {"load_s": 0.0, "queue_state": "active"})
    what = f"export after {queue_s:g} s in the queue"
    bench.add(what, took_s, "s", goal=queue_s + POLL_S + 10 * LATENCY_S)
    bench.add("... polls", counts["POST retrieve_future"], "calls", int(queue_s / POLL_S) + 6)
    bench.add("... heartbeats", counts["POST session_heartbeat"], "calls", int(queue_s / 10) + 1)

    run(server, "echo never > export", directory)


def run(server: Server, script: str, directory: Path) -> tuple[float, Counter[str]]:
    """Run a script, which must succeed; return as `measure`."""

    def work() -> None:
        message = stderr_of(script, directory)
        assert not message, f"{script}: {message}"

    return measure(server, work)


def measure(server: Server, work: Callable[[], None]) -> tuple[float, Counter[str]]:
    """Return the seconds of some work, and its requests by endpoint and in all as `api`."""
    server.ask("clear")
    began = time.perf_counter()
    work()
    took_s = time.perf_counter() - began
    entries = [entry for entry in server.ask("entries") if entry["origin"] == "api"]
    return took_s, Counter([*(entry["endpoint"] for entry in entries), *["api"] * len(entries)])
