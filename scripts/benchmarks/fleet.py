"""Many hosts that load one checkpoint at once: API requests, origin bytes, time, wrong bytes."""

import os
import sys
from dataclasses import dataclass

from scripts.benchmarks.downloaders import GB
from scripts.benchmarks.fleet_load import Load, load
from scripts.benchmarks.fleet_model import requests_of
from scripts.benchmarks.fleet_scale import Loads, compare, project
from scripts.benchmarks.fleet_ways import (
    ALONE,
    DIRECTORY,
    PROXY,
    TOGETHER,
    WAYS,
    Links,
    Way,
    site_of,
)
from scripts.benchmarks.harness import Bench

#: The store may send more than the checkpoint: the ETag, and the index of each host.
MAX_ORIGIN_RATIO = 1.05
#: API requests of hosts that share responses, beside those that are expected.
MAX_MORE_CALLS = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a benchmark runs.

    Attributes:
        hosts: numbers of hosts, each of which is measured with each way.
        size_bytes: size of the adapter.
    """

    ways: tuple[Way, ...]
    hosts: tuple[int, ...]
    size_bytes: int
    links: Links


FULL = Shape(
    ways=WAYS,
    hosts=(1, 4, 16),
    size_bytes=GB,
    links=Links(host=100e6, service=1e9, uplink=400e6),
)
SHORT = Shape(
    ways=(ALONE, DIRECTORY, PROXY, TOGETHER),
    hosts=(4,),
    size_bytes=32_000_000,
    links=Links(host=400e6, service=1e9, uplink=400e6),
)


def measure_fleet(bench: Bench, binding: str, *, is_short: bool) -> None:
    """Add rows for each number of hosts and each way, and print tables."""
    if os.geteuid():
        print("fleet: needs root for network namespaces: not measured", file=sys.stderr)
        return
    shape = SHORT if is_short else FULL
    loads: dict[Way, dict[int, Load]] = {way: {} for way in shape.ways}
    for hosts in shape.hosts:
        with site_of(shape.links, hosts, shape.size_bytes, binding) as site:
            for way in shape.ways:
                found = loads[way][hosts] = load(site, way)
                add_rows(bench, f"{hosts} hosts, {way.name}", way, found)
    print(table_of(loads, shape), file=sys.stderr)
    if not is_short:
        compare(bench, loads, shape.links)
        project(bench, binding, loads[ALONE][1].checkpoint_bytes)


def add_rows(bench: Bench, what: str, way: Way, found: Load) -> None:
    """Add the rows of one load."""
    hosts = len(found.times_s)
    calls = requests_of(hosts, found.time_s, way.sharing)
    if way.sharing.shares_calls:
        calls += MAX_MORE_CALLS
    bench.add(f"{what}: API requests", found.api_calls, "requests", calls)
    ratio = MAX_ORIGIN_RATIO * (hosts if way.sharing.wait_s is None else 1)
    bench.add("... origin bytes over those of the checkpoint", found.origin_ratio, "x", ratio)
    bench.add("... hosts that read wrong bytes", found.wrong_hosts, "hosts", 0)
    bench.add("... errors that mounts reported", len(found.errors), "errors", 0)
    for line in found.errors:
        print(line, file=sys.stderr)
    details = {"first host": min(found.times_s), "CPU in use": found.busy} | found.cpu_s
    bench.add("... until the last host has loaded", found.time_s, "s", details=details)


def table_of(loads: Loads, shape: Shape) -> str:
    """Return a table of the loads."""
    lines = [
        "| hosts | way | API requests | origin bytes / checkpoint | last host loaded "
        "| hosts with wrong bytes | uplink, host links, CPUs in use |",
        "|---" * 7 + "|",
    ]
    for hosts in shape.hosts:
        for name, found in ((way.name, each[hosts]) for way, each in loads.items()):
            uplink = found.origin_bytes * 8 / found.time_s / shape.links.uplink
            link = found.checkpoint_bytes * 8 / found.time_s / shape.links.host
            lines.append(
                f"| {hosts} | {name} | {found.api_calls} | {found.origin_ratio:.3f} "
                f"| {found.time_s:.1f} s | {found.wrong_hosts} "
                f"| {uplink:.0%}, {link:.0%}, {found.busy:.0%} |"
            )
    return "\n".join(lines)
