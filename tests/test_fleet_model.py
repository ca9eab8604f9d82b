"""The simulation of many hosts in `scripts/bench fleet`, compared with what can be calculated."""

import pytest

from scripts.benchmarks.fleet_model import Rates, Sharing, max_min, simulate

GB = 1e9
RATES = Rates(host=0.1 * GB, service=1.0 * GB, uplink=0.4 * GB)
ALONE = Sharing()
SHARED = Sharing(wait_s=0.5, shares_calls=True)


@pytest.mark.parametrize(
    ("hosts", "rate"), [(1, 0.1), (4, 0.1), (16, 0.4 / 16), (1000, 0.4 / 1000)]
)
def test_hosts_alone_share_the_uplink(hosts, rate):
    outcome = simulate(hosts, GB, RATES, ALONE)
    assert outcome.time_s == pytest.approx(1 / rate, rel=0.01)
    assert outcome.origin_ratio == hosts
    assert outcome.api_calls == (4 + 2 * int((1 / rate) // 30)) * hosts


@pytest.mark.parametrize(("hosts", "rate"), [(4, 0.1), (16, 1 / 16), (1000, 1 / 1000)])
def test_hosts_share_the_link_of_a_service(hosts, rate):
    outcome = simulate(hosts, GB, RATES, SHARED)
    assert outcome.time_s == pytest.approx(0.5 + 1 / rate, rel=0.05)
    assert outcome.origin_ratio == 1
    assert outcome.api_calls == 4 + 2 * int((0.5 + 1 / rate) // 30) + hosts - 1


def test_service_is_as_slow_as_the_uplink():
    slow = Rates(host=0.1 * GB, service=1.0 * GB, uplink=0.01 * GB)
    assert simulate(4, GB, slow, SHARED).time_s == pytest.approx(0.5 + 100, rel=0.01)


def test_each_of_several_services_fetches_the_file():
    outcome = simulate(1000, GB, RATES, SHARED, services=4)
    assert outcome.time_s == pytest.approx(0.5 + 250, rel=0.01)
    assert outcome.origin_ratio == 4
    many = simulate(1000, GB, RATES, SHARED, services=100)
    assert many.time_s == pytest.approx(0.5 + 100 / 0.4, rel=0.01)


def test_hosts_that_start_late_end_late():
    outcome = simulate(4, GB, RATES, SHARED, spread_s=1000)
    assert outcome.time_s == pytest.approx(1000 + 10, rel=0.02)
    crowd = simulate(1000, GB, RATES, SHARED, spread_s=60)
    assert crowd.time_s == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize(
    ("capacity", "limits", "counts", "rates"),
    [
        (10, [1, 9, 9], [1, 1, 1], [1, 4.5, 4.5]),
        (10, [9, 1], [2, 2], [4, 1]),
        (10, [1, 1], [1, 1], [1, 1]),
        (9, [5, 5], [1, 2], [3, 3]),
        (9, [0, 5], [5, 1], [0, 5]),
    ],
)
def test_max_min_gives_what_small_members_leave(capacity, limits, counts, rates):
    assert max_min(capacity, limits, counts) == pytest.approx(rates)
