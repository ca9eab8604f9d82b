"""Delays while other processes wait for the server."""

import shlex
import statistics
import tempfile
from pathlib import Path

from scripts.benchmarks.harness import Bench, mounted, seconds_to_leave, shell, start, timed
from tests.support.faulty_server import FaultyServer

COLD_WAITS = (
    ("ls of a cold run", "ls runs/{run}/checkpoints", "GET training_runs/{run}/checkpoints"),
    ("stat of a new name", "stat runs/missing", "GET training_runs/{run}"),
    ("cold ls /runs", "ls runs", "GET training_runs"),
    ("cat of a cold info.json", "cat runs/{run}/latest/info.json", "POST weights_info"),
)


def measure_waits(bench: Bench, binding: str, cache: Path) -> None:
    with (
        FaultyServer(runs=80, checkpoints=2) as server,
        mounted(server, binding, cache) as directory,
    ):
        shell("ls -R runs", directory)
        alone = timed(lambda: shell("ls -l runs", directory))
        urls = sorted(directory.glob("runs/*/checkpoints/*/*/archive_url"))[:64]
        rule = server.faults.add("GET archive", hang=True, times=None)
        readers = [start(["cat", str(url)], directory) for url in urls]
        rule.wait_for(len(urls))
        waiting = timed(lambda: shell("ls -l runs", directory))
        bench.add("ls -l /runs, alone", alone, "s")
        bench.add(f"the same while {len(urls)} reads hang", waiting, "s")
        left = statistics.median(seconds_to_leave(reader) for reader in readers)
        bench.add(f"Ctrl-C of cat archive_url, median of {len(urls)}", left, "s")
        rule.release()
    for what, script, endpoint in COLD_WAITS:
        with (
            tempfile.TemporaryDirectory() as cold,
            FaultyServer(runs=3, checkpoints=3) as server,
            mounted(server, binding, Path(cold)) as directory,
        ):
            rule = server.faults.add(endpoint, hang=True, times=None)
            reader = start(shlex.split(script.format(run=server.account.run_ids[0])), directory)
            rule.wait_for(1)
            bench.add(f"Ctrl-C of {what}", seconds_to_leave(reader), "s")
            rule.release()
