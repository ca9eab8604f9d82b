"""Outages under people who go on looking: what fails, what it costs, how soon all is well again."""

import time
from pathlib import Path

from bench_harness import Bench, mounted, succeeds, told

from tinkerfs.demo.server import DemoServer

KINDS: dict[str, dict[str, object]] = {
    "refused": {"refuse": True},
    "hanging": {"hang": True},
    "500": {"status": 500},
    "HTML": {"html": True, "status": 200},
    "half JSON": {"half_json": True},
}
SEEN = "ls -lR runs && cat runs/*/latest/info.json && ls checkpoints sessions"
#: An endpoint that is out is probed once a second, and before it counts as out a few times more:
#: runs, a run, checkpoints of a run, weights info, the user's checkpoints, sessions.
ENDPOINTS = 6


def measure_outages(bench: Bench, binding: str, cache: Path, seconds: float) -> None:
    """Look on through an outage of each kind, each `seconds` long."""
    for kind, fault in KINDS.items():
        with (
            DemoServer(runs=10, checkpoints=5) as server,
            mounted(server, binding, cache / kind, "--ttl", "5") as folder,
        ):
            assert succeeds(SEEN, folder)
            rule = server.faults.add("api", times=None, **fault)
            time.sleep(5)  # the TTL
            server.journal.clear()
            failed, spans = 0, []
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                look = time.monotonic()
                failed += not succeeds(SEEN, folder)
                spans.append(time.monotonic() - look)
                succeeds(f"stat runs/never-{len(spans)}", folder)
                time.sleep(0.5)
            lasted = time.monotonic() - began
            made = server.journal.count("api")
            rule.remove()
            back = time.monotonic()
            # A name that nobody knows is an answer that nothing but the server can give.
            while "No such" not in told("ls runs/nobody", folder) or not succeeds(SEEN, folder):
                time.sleep(0.05)
            name = f"{kind} for {lasted:.0f} s"
            bench.add(f"{name}: of {len(spans)} looks at what was seen failed", failed, "looks", 0)
            bench.add(f"{name}: calls made", made, "calls", ENDPOINTS * (lasted + 10))
            bench.add(f"{name}: first look", spans[0], "s")
            bench.add(f"{name}: longest look after it", max(spans[1:], default=0.0), "s")
            bench.add(f"{name}: until all was well", time.monotonic() - back, "s")
