"""One load: hosts that read a checkpoint at once, and what it costs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.fleet_ways import Ready, Site, Way

#: Read all files of a directory after a line on standard input.
READER = """
import hashlib, json, os, sys, time
sys.stdin.readline()
began, digests = time.monotonic(), {}
for name in sorted(os.listdir(sys.argv[1])):
    with open(os.path.join(sys.argv[1], name), "rb") as file:
        digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
print(json.dumps([time.monotonic() - began, digests]))
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A checkpoint that some hosts have loaded.

    Attributes:
        times_s: time of each host, from the common start until it has read everything.
        api_calls: requests of all hosts to the API, including those of mounting.
        origin_bytes: what the store has sent.
        checkpoint_bytes: length of the checkpoint's archive.
        wrong_hosts: number of hosts that read wrong bytes.
        errors: what the mounts reported.
        cpu_s: CPU time by kind of process.
        busy: share of the machine's CPU time that was not idle.
    """

    times_s: tuple[float, ...]
    api_calls: int
    origin_bytes: int
    checkpoint_bytes: int
    wrong_hosts: int
    errors: tuple[str, ...]
    cpu_s: dict[str, float]
    busy: float

    @property
    def time_s(self) -> float:
        """The time until the last host has loaded."""
        return max(self.times_s)

    @property
    def origin_ratio(self) -> float:
        """The bytes that the store has sent over those of the checkpoint."""
        return self.origin_bytes / self.checkpoint_bytes


def load(site: Site, way: Way) -> Load:
    """Let all hosts load the checkpoint at once."""
    site.server.ask("clear")
    with way.start(site) as ready:
        cpu_before, busy_before = cpu_of(ready), machine_cpu()
        replies = read_all(ready.directories)
        cpu_after, busy_after = cpu_of(ready), machine_cpu()
        errors = [line for path in ready.error_logs for line in path.read_text().splitlines()]
        counts = site.server.ask("counts")
    busy_s, all_s = (after - before for before, after in zip(busy_before, busy_after, strict=True))
    return Load(
        times_s=tuple(span for span, _ in replies),
        api_calls=counts["api"],
        origin_bytes=counts["sent"],
        checkpoint_bytes=site.checkpoint_bytes,
        wrong_hosts=sum(digests != ready.expected for _, digests in replies),
        errors=tuple(errors),
        cpu_s={name: cpu_after[name] - before for name, before in cpu_before.items()},
        busy=busy_s / all_s,
    )


def read_all(directories: Sequence[Path]) -> list[tuple[float, dict[str, str]]]:
    """Read all files of each directory at once; return the seconds and checksums of each."""
    command = [sys.executable, "-S", "-c", READER]
    readers = [
        subprocess.Popen(
            [*command, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for directory in directories
    ]
    try:
        time.sleep(0.2)  # the interpreters start before the common start
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
        return [json.loads(reader.communicate()[0]) for reader in readers]
    finally:
        # A daemon serves the open files of its mount even after it is unmounted.
        for reader in readers:
            reader.kill()
            reader.wait()


def cpu_of(ready: Ready) -> dict[str, float]:
    """Return the CPU time of each kind of process."""
    return {name: sum(map(tree_cpu_s, pids)) for name, pids in ready.pids.items()}


def tree_cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its descendants, also of those that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own_s = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own_s + sum(tree_cpu_s(int(child)) for child in children)


def machine_cpu() -> tuple[float, float]:
    """Return the CPU time of the machine that was not idle, and all of it."""
    ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return float(sum(ticks) - idle), float(sum(ticks))
