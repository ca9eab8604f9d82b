"""The simulation beside the measured loads, and what it shows of a site with more hosts."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from scripts.benchmarks.downloaders import GB
from scripts.benchmarks.fleet_load import Load, cpu_of, read_all
from scripts.benchmarks.fleet_model import GOODPUT, Rates, simulate
from scripts.benchmarks.fleet_ways import ALONE, DIRECTORY, PROXY, Links, Way, site_of
from scripts.benchmarks.harness import Bench

#: Maximum error of the simulation, as a share of the measured time.
MAX_ERROR = 0.15
#: Links that do not limit a load on this machine.
FAST = Links(host=40e9, service=40e9, uplink=40e9)
#: A site with many hosts: its links, and the processors of a service.
SITE = Links(host=25e9, service=100e9, uplink=10e9)
SERVICE_CPUS = 16
SIMULATED_HOSTS = (1, 4, 16, 64, 256, 1000)
SIMULATED_SERVICES = (1, 4, 10, 16)

#: By way and number of hosts.
Loads = Mapping[Way, Mapping[int, Load]]


def compare(bench: Bench, loads: Loads, links: Links) -> None:
    """Add rows with the errors of the simulation, which uses the load of one host, and print them.

    The link of a host limits that load. A local directory is left out, because its hosts read it
    over no link.
    """
    lines = [
        "| hosts | way | last host loaded | simulated | error | API requests | simulated |",
        "|---" * 7 + "|",
    ]
    for way, each in loads.items():
        if way is DIRECTORY:
            continue
        rates = replace(rates_of(links), host=each[1].checkpoint_bytes / each[1].time_s)
        for hosts, found in each.items():
            simulated = simulate(hosts, found.checkpoint_bytes, rates, way.sharing)
            error = simulated.time_s / found.time_s - 1
            if hosts > 1:
                what = f"{hosts} hosts, {way.name}: error of the simulated time"
                bench.add(what, abs(error), "of the time", MAX_ERROR)
            lines.append(
                f"| {hosts} | {way.name} | {found.time_s:.1f} s | {simulated.time_s:.1f} s "
                f"| {error:+.1%} | {found.api_calls} | {simulated.api_calls} |"
            )
    print("\n".join(lines), file=sys.stderr)


def rates_of(links: Links) -> Rates:
    """Return what links carry of files."""
    return Rates(
        host=links.host / 8 * GOODPUT,
        service=links.service / 8 * GOODPUT,
        uplink=links.uplink / 8 * GOODPUT,
    )


@dataclass(frozen=True)
class Unlimited:
    """A load over links that do not limit it.

    Attributes:
        bytes_per_s: what the host loads.
        cpu_s: CPU time of the service for each byte.
    """

    bytes_per_s: float
    cpu_s: float


def measure_unlimited(bench: Bench, binding: str, way: Way) -> Unlimited:
    """Let a second host load what a first one has left in the service."""
    with site_of(FAST, 2, GB, binding) as site, way.start(site) as ready:
        read_all(ready.directories[:1])
        before = cpu_of(ready)
        ((time_s, digests),) = read_all(ready.directories[1:])
        spent = {name: cpu_s - before[name] for name, cpu_s in cpu_of(ready).items()}
        assert digests == ready.expected
    rate = site.checkpoint_bytes / time_s
    bench.add(f"the second host, {way.name}, fast links", rate / 1e6, "MB/s", details=spent)
    service_s = sum(cpu_s for name, cpu_s in spent.items() if name != "mounts")
    return Unlimited(rate, service_s / site.checkpoint_bytes)


def project(bench: Bench, binding: str, size_bytes: int) -> None:
    """Print a simulation of a site with many hosts, which uses measured figures."""
    found = measure_unlimited(bench, binding, PROXY)
    by_cpu = SERVICE_CPUS / found.cpu_s
    rates = rates_of(SITE)
    rates = replace(
        rates,
        host=min(rates.host, found.bytes_per_s),
        service=min(rates.service, by_cpu),
    )
    names = [f"proxies: {services}" for services in SIMULATED_SERVICES]
    lines = [
        f"GB/s: a host loads {rates.host / 1e9:.2f}, a proxy sends {rates.service / 1e9:.2f} "
        f"({by_cpu / 1e9:.2f} by its processors), the uplink carries {rates.uplink / 1e9:.2f}",
        f"| hosts | API requests | lone mounts | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for hosts in SIMULATED_HOSTS:
        outcomes = [simulate(hosts, size_bytes, rates, ALONE.sharing)]
        outcomes += [
            simulate(hosts, size_bytes, rates, PROXY.sharing, services=services)
            for services in SIMULATED_SERVICES
        ]
        cells = [f"{each.time_s:.1f} s, {each.origin_ratio:.0f} x" for each in outcomes]
        lines.append(f"| {hosts:,} | {outcomes[0].api_calls:,} | {' | '.join(cells)} |")
    print("\n".join(lines), file=sys.stderr)
