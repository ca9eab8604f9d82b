"""Counts of API requests of common commands."""

import time
from pathlib import Path

from scripts.benchmarks.harness import Bench, calls, mounted
from tests.support.faulty_server import FaultyServer

#: Commands that send no request after a walk.
WARM_COMMANDS = "find runs -type f; du -s runs; stat runs/*; cat runs/*/checkpoints/*/*/info.json"
#: Longer than three small walks take.
TTL_S = 4


def count_calls(bench: Bench, binding: str, cache: Path) -> None:
    """Count the API requests of common commands, without the key check at mount."""

    def count(what: str, script: str, bound: int) -> None:
        bench.add(what, calls(server, script, directory), "calls", bound)

    def count_endpoint(what: str, endpoint: str, bound: int) -> None:
        found = server.journal.count(endpoint)
        bench.add(f"... of these {what}", found, "calls", bound)

    with (
        FaultyServer(runs=1000, checkpoints=2) as server,
        mounted(server, binding, cache) as directory,
    ):
        count("ls /runs, 1,000 runs", "ls runs", 10)
        count("... warm", "ls runs", 0)
    walk = "ls -lR runs"
    with FaultyServer(runs=100, checkpoints=10) as server:
        with mounted(server, binding, cache, "--ttl", "600") as directory:
            count("ls -lR /runs, 100 runs x 10", walk, 1101)
            count_endpoint("weights info", "POST weights_info", 1000)
            count("... warm", walk, 0)
            count("find, du, stat and cat of every info.json, warm", WARM_COMMANDS, 0)
            count("grep -r lora_rank /runs, warm", "grep -r lora_rank runs", 0)
            count("rm -r of one", 'set -- runs/*/checkpoints/weights/*; rm -r "$1"', 2)
            count_endpoint("deletes", "DELETE checkpoint", 1)
        with mounted(server, binding, cache) as directory:
            count("ls -lR in the second mount", walk, 101)
            count_endpoint("weights info", "POST weights_info", 0)
    with (
        FaultyServer(runs=10, checkpoints=5) as server,
        mounted(server, binding, cache, "--ttl", str(TTL_S)) as directory,
    ):
        count("ls -lR /runs, 10 runs x 5", walk, 61)
        time.sleep(TTL_S)
        count("... three times after the TTL", f"{walk}; {walk}; {walk}", 11)
    with (
        FaultyServer(runs=3, checkpoints=20, seed=3) as server,
        mounted(server, binding, cache) as directory,
    ):
        count("cat */info.json, 3 runs x 20", "cat runs/*/checkpoints/*/*/info.json", 64)
    with (
        FaultyServer(runs=300, latency_s=0.2) as server,
        mounted(server, binding, cache) as directory,
    ):
        readers = "for i in $(seq 16); do ls runs & done; wait"
        count("16 readers of one cold listing, 3 pages", readers, 3)
