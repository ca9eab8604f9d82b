"""A fluid simulation of more hosts than can be run, which load one checkpoint at once.

Bytes flow at rates that change at every step. The hosts that a link serves share it by max-min
fairness. A service fetches a byte once from the origin, as far ahead of the first reader as a mount
prefetches. Other hosts get it some time later, because they poll for the end of a download.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Share of a link that is left by the headers of Ethernet, IP and TCP.
GOODPUT = 1448 / 1514
#: How far a mount prefetches.
AHEAD_BYTES = 128 << 20
#: How long a mount caches the records of a checkpoint, by default.
TTL_S = 30.0
#: What every mount requests itself, also if it shares metadata.
KEY_CHECK_CALLS = 1
#: Hosts that start together behave alike, and are simulated as one.
MAX_GROUPS = 50
STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes per second that a site carries.

    Attributes:
        host: what a host loads, limited by its link or by its mount.
        service: what one service sends, limited by its link or its processors.
        uplink: what the origin sends to the site.
    """

    host: float
    service: float
    uplink: float


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What hosts share.

    Attributes:
        wait_s: maximum time after which other hosts find a byte that was fetched; None if hosts
            share no bytes.
        calls: API requests of a mount: at first, and whenever its records have expired.
        shares_calls: whether the hosts share responses.
    """

    wait_s: float | None = None
    calls: tuple[int, int] = (4, 2)
    shares_calls: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a simulation.

    Attributes:
        time_s: time until the last host has loaded.
        origin_ratio: origin bytes over the checkpoint's.
    """

    time_s: float
    origin_ratio: float
    api_calls: int


def simulate(
    hosts: int,
    size_bytes: float,
    rates: Rates,
    sharing: Sharing,
    *,
    services: int = 1,
    spread_s: float = 0.0,
) -> Outcome:
    """Let hosts load a checkpoint.

    Args:
        services: number of services, each of which serves an equal share of the hosts.
        spread_s: the hosts start evenly over this time.
    """
    if sharing.wait_s is None:
        time_s = flow(groups_of(hosts, spread_s), size_bytes, rates.host, rates.uplink)
        ratio = float(hosts)
    else:
        services = min(services, hosts)
        share = replace(rates, uplink=rates.uplink / services)
        groups = groups_of(-(-hosts // services), spread_s)
        wait_s = sharing.wait_s if hosts > 1 else 0.0
        time_s = flow(groups, size_bytes, share.host, share.service, share.uplink, wait_s)
        ratio = float(services)
    calls = requests_of(hosts, time_s, sharing)
    return Outcome(time_s=time_s, origin_ratio=ratio, api_calls=calls)


def requests_of(hosts: int, time_s: float, sharing: Sharing) -> int:
    """Return the maximum number of API requests of hosts that load for some time."""
    first, again = sharing.calls
    calls = first + again * int(time_s // TTL_S)
    return calls + KEY_CHECK_CALLS * (hosts - 1) if sharing.shares_calls else calls * hosts


def groups_of(hosts: int, spread_s: float) -> list[tuple[float, int]]:
    """Return groups of hosts: the start of each, seconds, and the number of its hosts.

    The first group is one host.
    """
    others = hosts - 1
    groups = min(others, MAX_GROUPS) if spread_s else min(others, 1)
    numbers = [others * (each + 1) // groups - others * each // groups for each in range(groups)]
    return [(0.0, 1)] + [
        (spread_s * (each + 1) / groups, count) for each, count in enumerate(numbers)
    ]


def flow(
    groups: Sequence[tuple[float, int]],
    size_bytes: float,
    host: float,
    link: float,
    fill: float | None = None,
    wait_s: float = 0.0,
) -> float:
    """Return the time until all hosts have received a file, seconds.

    Args:
        groups: start and number of hosts; the first host has no wait.
        host: maximum rate of a host, bytes per second.
        link: rate of the link to all hosts.
        fill: rate at which a service at the link receives the file; None if it has the file.
        wait_s: how long after a service the hosts have a byte.
    """
    hosts = sum(count for _, count in groups)
    step_s = size_bytes / min(host, link / hosts, fill or host) / STEPS
    received = [0.0] * len(groups)
    filled = [0.0 if fill else size_bytes]  # at the end of each step
    instants = [0.0]
    now = 0.0
    while min(received) < size_bytes * (1 - 1e-9):
        now += step_s
        first = max(received)
        if fill:
            wanted = min(size_bytes, first + AHEAD_BYTES + host * step_s)
            filled.append(max(filled[-1], min(filled[-1] + fill * step_s, wanted)))
            instants.append(now)
        seen = filled[max(bisect_right(instants, now - wait_s) - 1, 0)]
        limits = [
            min(host, max(0.0, until - have) / step_s) if start < now else 0.0
            for (start, _), have, until in zip(
                groups, received, [filled[-1]] + [seen] * (len(groups) - 1), strict=True
            )
        ]
        rates = max_min(link, limits, [count for _, count in groups])
        received = [have + rate * step_s for have, rate in zip(received, rates, strict=True)]
    return now


def max_min(capacity: float, limits: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Return the fair rate of each member of some groups.

    Args:
        limits: maximum rate of a member of each group.
        counts: number of members of each group.
    """
    rates = [0.0] * len(limits)
    members = sum(counts)
    for index in sorted(range(len(limits)), key=limits.__getitem__):
        rates[index] = min(limits[index], capacity / members)
        capacity -= rates[index] * counts[index]
        members -= counts[index]
    return rates
