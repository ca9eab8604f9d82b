"""Counts of calls, waits while others wait, and memory."""

import shlex
import statistics
import tempfile
import time
from pathlib import Path

from bench_harness import (
    RUNS_OF_A_TIMED_THING,
    Bench,
    calls,
    daemon_of,
    mounted,
    resident_mb,
    seconds_to_leave,
    shell,
    start,
    timed,
)

from tinkerfs.demo.server import DemoServer


def count_calls(bench: Bench, binding: str, cache: Path) -> None:
    """Count the calls of common commands; the look at the key while mounting is not counted."""

    def count(what: str, script: str, bound: int) -> None:
        bench.add(f"{binding}: {what}", calls(server, script, folder), "calls", bound)

    def of_these(what: str, endpoint: str, bound: int) -> None:
        found = server.journal.count(endpoint)
        bench.add(f"{binding}: ... of these {what}", found, "calls", bound)

    with DemoServer(runs=1000, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        count("ls /runs, 1,000 runs", "ls runs", 10)
        count("the same, warm", "ls runs", 0)
    walk = "ls -lR runs"
    with DemoServer(runs=100, checkpoints=10) as server:
        with mounted(server, binding, cache, "--ttl", "600") as folder:
            count("ls -lR /runs, 100 runs x 10", walk, 1101)
            of_these("weights info", "POST weights_info", 1000)
            count("the same, warm", walk, 0)
            count("grep -r lora_rank /runs, warm", "grep -r lora_rank runs", 0)
            count("rm -r of one", 'set -- runs/*/checkpoints/weights/*; rm -r "$1"', 2)
            of_these("deletes", "DELETE checkpoint", 1)
        with mounted(server, binding, cache) as folder:
            count("ls -lR in the second mount", walk, 101)
            of_these("weights info", "POST weights_info", 0)
    with (
        DemoServer(runs=3, checkpoints=20, seed=3) as server,
        mounted(server, binding, cache) as folder,
    ):
        count("cat */info.json, 3 runs x 20", "cat runs/*/checkpoints/*/*/info.json", 64)
    with DemoServer(runs=300, latency_s=0.2) as server, mounted(server, binding, cache) as folder:
        readers = "for i in $(seq 16); do ls runs & done; wait"
        count("16 readers of one cold listing, 3 pages", readers, 3)


COLD_WAITS = (
    ("ls of a cold run", "ls runs/{run}/checkpoints", "GET training_runs/{run}/checkpoints"),
    ("stat of a new name", "stat runs/nobody", "GET training_runs/{run}"),
    ("cold ls /runs", "ls runs", "GET training_runs"),
    ("cat of a cold info.json", "cat runs/{run}/latest/info.json", "POST weights_info"),
)


def measure_waits(bench: Bench, binding: str, cache: Path) -> None:
    with DemoServer(runs=80, checkpoints=2) as server, mounted(server, binding, cache) as folder:
        shell("ls -R runs", folder)
        alone = timed(lambda: shell("ls -l runs", folder))
        urls = sorted(folder.glob("runs/*/checkpoints/*/*/archive_url"))[:64]
        rule = server.faults.add("GET archive", hang=True, times=None)
        readers = [start(["cat", str(url)], folder) for url in urls]
        rule.wait_for(len(urls))
        waiting = timed(lambda: shell("ls -l runs", folder))
        bench.add(f"{binding}: ls -l /runs, alone", alone, "s")
        bench.add(f"{binding}: the same while {len(urls)} reads hang", waiting, "s")
        left = statistics.median(seconds_to_leave(reader) for reader in readers)
        bench.add(f"{binding}: Ctrl-C of cat archive_url, median of {len(urls)}", left, "s")
        rule.release()
    for what, script, endpoint in COLD_WAITS:
        with (
            tempfile.TemporaryDirectory() as cold,
            DemoServer(runs=3, checkpoints=3) as server,
            mounted(server, binding, Path(cold)) as folder,
        ):
            rule = server.faults.add(endpoint, hang=True, times=None)
            reader = start(shlex.split(script.format(run=server.account.run_ids[0])), folder)
            rule.wait_for(1)
            bench.add(f"{binding}: Ctrl-C of {what}", seconds_to_leave(reader), "s")
            rule.release()


def measure_mounting(bench: Bench, binding: str, cache: Path) -> None:
    spans = []
    with DemoServer() as server:
        for _ in range(RUNS_OF_A_TIMED_THING):
            began = time.perf_counter()
            with mounted(server, binding, cache):
                spans.append(time.perf_counter() - began)
    bench.add(f"{binding}: until the mount answers, median", statistics.median(spans), "s")


def measure_memory(bench: Bench, cache: Path, runs: int, checkpoints: int) -> None:
    listed = f"{runs * checkpoints:,} checkpoints over {runs:,} runs"
    with (
        DemoServer(runs=runs, checkpoints=checkpoints) as server,
        mounted(server, "auto", cache, "--ttl", "3600") as folder,
    ):
        began = time.perf_counter()
        shell("ls -R runs", folder)
        bench.add(f"ls -R of {listed}, cold", time.perf_counter() - began, "s")
        bench.add(f"resident memory with {listed}", resident_mb(daemon_of(folder)), "MB")
