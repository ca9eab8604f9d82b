"""API outages during use: failures, requests, delays, and time to recovery."""

import time
from pathlib import Path

from scripts.benchmarks.harness import Bench, mounted, stderr_of, succeeds
from tests.support.faulty_server import FaultyServer

KINDS: dict[str, dict[str, object]] = {
    "refused": {"refuse": True},
    "hanging": {"hang": True},
    "500": {"status": 500},
    "HTML": {"html": True, "status": 200},
    "half JSON": {"half_json": True},
}
SEEN_COMMANDS = "ls -lR runs && cat runs/*/latest/info.json && ls checkpoints sessions"
#: Number of endpoints in use: runs, a run, checkpoints of a run, weights info, all checkpoints,
#: sessions. Each is probed once a second while its circuit breaker is open, after some failures.
ENDPOINTS = 6


def measure_outages(bench: Bench, binding: str, cache: Path, seconds: float) -> None:
    """Run commands during an outage of each kind, each `seconds` long."""
    for kind, fault in KINDS.items():
        with (
            FaultyServer(runs=10, checkpoints=5) as server,
            mounted(server, binding, cache / kind, "--ttl", "5") as directory,
        ):
            assert succeeds(SEEN_COMMANDS, directory)
            rule = server.faults.add("api", times=None, **fault)
            time.sleep(5)  # the TTL
            server.journal.clear()
            failed, spans = 0, []
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                started = time.monotonic()
                failed += not succeeds(SEEN_COMMANDS, directory)
                spans.append(time.monotonic() - started)
                succeeds(f"stat runs/never-{len(spans)}", directory)
                time.sleep(0.5)
            lasted = time.monotonic() - began
            made = server.journal.count("api")
            rule.remove()
            back = time.monotonic()
            # Only the server can report that an unknown run does not exist.
            while "No such" not in stderr_of("ls runs/missing", directory) or not succeeds(
                SEEN_COMMANDS, directory
            ):
                time.sleep(0.05)
            name = f"{kind} for {lasted:.0f} s"
            bench.add(
                f"{name}: of {len(spans)} commands on cached paths failed", failed, "commands", 0
            )
            bench.add(f"{name}: calls made", made, "calls", ENDPOINTS * (lasted + 10))
            bench.add(f"{name}: first command", spans[0], "s")
            bench.add(f"{name}: longest command after it", max(spans[1:], default=0.0), "s")
            bench.add(f"{name}: until recovery", time.monotonic() - back, "s")
