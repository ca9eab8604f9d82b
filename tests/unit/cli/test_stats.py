"""Values of `tinkerfs stats` from two statistics of a mount."""

import pytest

from tests.support.clocks import FakeTime
from tinkerfs.cli import screen
from tinkerfs.cli.profile_totals import Totals
from tinkerfs.cli.stats import rates
from tinkerfs.telemetry import Telemetry


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def telemetry(time):
    telemetry = Telemetry(time.clock)
    telemetry.operations.counts.record("getattr", 1.0)
    telemetry.count("metadata_cache_hits", 7)
    return telemetry


def snapshot(telemetry):
    return {**telemetry.snapshot(), "gauges": {"api_permits_used": 2}}


def test_rates_are_differences_per_second(telemetry, time):
    before = snapshot(telemetry)
    time.advance(4)
    counts = telemetry.operations.counts
    for _ in range(4):
        counts.record("read", 0.002, read_bytes=1_000_000)
    counts.record("getattr", 0.012, 2)
    counts.cached_getattrs += 3
    telemetry.record_request("GET x", "200", 0.1)
    telemetry.record_request("GET x", "500", 0.1)
    for name, amount in {
        "store_bytes_received": 8_000_000,
        "block_cache_bytes_read": 2_000_000,
        "metadata_cache_hits": 3,
        "metadata_cache_misses": 1,
    }.items():
        telemetry.count(name, amount)
    with telemetry.track_pending("archive x"):
        sample = rates(before, snapshot(telemetry))
    assert sample == {
        "operations_per_s": 2.0,
        "errors_per_s": 0.25,
        "operation_ms": pytest.approx(4.0),
        "api_requests_per_s": 0.5,
        "api_requests_in_flight": 2.0,
        "store_mb_per_s": 2.0,
        "cache_mb_per_s": 0.5,
        "kernel_mb_per_s": 1.0,
        "metadata_hits_percent": 75.0,
        "block_hits_percent": None,
        "pending": 1.0,
    }


def test_rates_of_another_daemon_are_unknown(telemetry, time):
    before = snapshot(telemetry)
    time.advance(1)
    assert rates({**before, "started": "earlier"}, snapshot(telemetry)) is None
    assert rates(before, before) is None


def test_sparkline_scales_to_the_largest_value(monkeypatch):
    monkeypatch.setattr("sys.stdout", type("Output", (), {"encoding": "utf-8"}))
    assert screen.sparkline([9, 0, None, 2, 4, 8], 5) == "▁ ▃▅█"
    assert screen.sparkline([0, 0], 4) == "  ▁▁"
    assert screen.sparkline([1], 0) == ""
    monkeypatch.setattr("sys.stdout", type("Output", (), {"encoding": "ascii"}))
    assert screen.sparkline([0, 8], 2) == ".#"


def test_profile_totals_add_up_each_name():
    totals = Totals()
    line = "2026-11-29T19:42:56.003300Z\t{}\t{}\t{}\t{}\t{}\t0\t{}\t{}\n"
    for fields in (
        ("read", "/a", "1000@0", "OK", "0.300000", "7", "cat"),
        ("read", "/a", "24@1000", "OK", "0.100000", "7", "cat"),
        ("getattr", "/b", "-", "ENOENT", "0.600000", "8", "ls"),
        ("release", "/a", "-", "OK", "0.000000", "0", "?"),
    ):
        totals.add(line.format(*fields))
    totals.add("# 12 lines dropped\n")
    totals.add("not a line")
    text = "\n".join(totals.report())
    assert text.startswith("4 operations, 1 failed, 1.000 s, 1.0 KiB, 12 more were dropped\n")
    rows = [" ".join(row.split()) for row in text.splitlines()]
    assert "0.400 40.0 2 200.000 1.0 KiB read" in rows
    assert "0.600 60.0 1 600.000 0 B /b" in rows
    assert "0.400 40.0 2 200.000 1.0 KiB cat[7]" in rows
    assert "0.000 0.0 1 0.000 0 B (unknown)" in rows
    assert rows.index("0.600 60.0 1 600.000 0 B getattr") < rows.index(
        "0.400 40.0 2 200.000 1.0 KiB read"
    )
