"""Metrics for Prometheus: names, agreement with stats.json, and their address."""

import errno
import json
import re
import socket
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tinkerfs import prometheus
from tinkerfs.api.credentials import _State
from tinkerfs.config import parse_address
from tinkerfs.errors import StartupError
from tinkerfs.histogram import BUCKETS_S, DurationHistogram
from tinkerfs.prometheus import TelemetryCollector, serve_metrics
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.export_records import ExportState

ROOT = Path(__file__).parents[2]
UNITS = ("_seconds", "_bytes", "_total", "_info", "_seconds_total", "_bytes_total")


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    telemetry.add_gauge("api_permits", lambda: 8)
    telemetry.add_gauge("export_records_done", lambda: 2)
    telemetry.add_gauge("key", lambda: "backing_off")
    telemetry.count("metadata_cache_hits", 3)
    telemetry.count("bytes_received", 1 << 40)
    telemetry.record_request("GET training_runs/{run}", "200", 0.2)
    telemetry.record_request("GET training_runs/{run}", "timed out", 30.0)
    counts = telemetry.operations.counts
    counts.record("read", 0.0002, read_bytes=4096)
    counts.record("getattr", 1.5, errno.ENOENT)
    counts.cached_getattrs += 7
    with telemetry.track_pending("archive"):
        pass
    return telemetry


def exported(telemetry):
    registry = CollectorRegistry()
    registry.register(TelemetryCollector(telemetry))
    return generate_latest(registry).decode()


def samples(telemetry):
    families = text_string_to_metric_families(exported(telemetry))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_agree_with_stats(telemetry):
    found, stats = samples(telemetry), telemetry.snapshot()
    for key, (name, _text) in prometheus.COUNTERS.items():
        assert found[f"{name}_total",] == stats["counters"].get(key, 0)
    for endpoint, outcomes in stats["api_requests"].items():
        for outcome, count in outcomes.items():
            labels = (("endpoint", endpoint), ("outcome", outcome))
            assert found[("tinkerfs_api_requests_total", *labels)] == count
        name, label = "tinkerfs_api_request_duration_seconds", ("endpoint", endpoint)
        assert found[f"{name}_count", label] == 2
        assert found[f"{name}_sum", label] == pytest.approx(30.2)
    for operation, values in stats["operations"].items():
        name, label = "tinkerfs_fuse_operation_duration_seconds", ("operation", operation)
        assert found[f"{name}_count", label] == values["count"] == 1
        assert found[f"{name}_sum", label] == values["duration_s"]
        for number, count in values["errors"].items():
            labels = (("errno", number), label)
            assert found[("tinkerfs_fuse_operation_errors_total", *labels)] == count == 1
    for operation, count in stats["cached_replies"].items():
        assert found["tinkerfs_fuse_cached_replies_total", ("operation", operation)] == count
    assert found["tinkerfs_fuse_read_bytes_total",] == stats["read_bytes"] == 4096
    assert found["tinkerfs_fuse_written_bytes_total",] == stats["written_bytes"] == 0
    assert found["tinkerfs_wait_duration_seconds_count",] == stats["waits"]["count"] == 1
    assert found["tinkerfs_api_permits",] == stats["gauges"]["api_permits"] == 8
    assert found["tinkerfs_export_records", ("state", "done")] == 2
    states = {
        state: found["tinkerfs_key_state", ("state", state)] for state in prometheus.KEY_STATES
    }
    assert states == {"usable": 0, "backing_off": 1, "retrying": 0}


def test_states_of_metrics_are_those_of_the_code():
    assert set(prometheus.KEY_STATES) == {state.value for state in _State}
    assert set(prometheus.EXPORT_STATES) == {state.value for state in ExportState}


def test_metric_names_follow_the_rules_of_prometheus(telemetry):
    for family in TelemetryCollector(telemetry).collect():
        assert re.fullmatch(r"tinkerfs_[a-z][a-z_]*[a-z]", family.name)
        assert family.documentation.endswith(".")
        assert not family.name.endswith("_total"), "the suffix is added"
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert ("bytes" in family.name) == family.name.endswith("_bytes")


def test_every_counter_and_gauge_is_exported():
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = {
        title: set(
            re.findall(r"^\| `(\w+)` \|", text.split(f"\n## {title}\n")[1].split("\n## ")[0], re.M)
        )
        for title in ("Counters", "Gauges")
    }
    assert rows["Counters"] == set(prometheus.COUNTERS)
    gauges = set(prometheus.GAUGES) | set(prometheus.EXPORT_STATES.values()) | {"key"}
    assert rows["Gauges"] == gauges


def test_every_metric_has_a_row_in_the_docs(telemetry):
    text = (ROOT / "docs" / "metrics.md").read_text()
    section = text.split("\n## Prometheus\n")[1]
    rows = dict(re.findall(r"^\| `(tinkerfs_\w+)` \| (\w+) \|", section, re.M))
    families = TelemetryCollector(telemetry).collect()
    assert rows == {
        family.name + "_total" * (family.type == "counter"): family.type for family in families
    }


def test_histogram_counts_durations_up_to_and_including_a_bound():
    histogram = DurationHistogram()
    for duration_s in (0.0, BUCKETS_S[0], BUCKETS_S[0] * 1.01, BUCKETS_S[-1], 1e9):
        histogram.observe(duration_s)
    buckets = histogram.values().buckets
    assert (buckets[0], buckets[1], buckets[-2], buckets[-1]) == (2, 1, 1, 1)
    assert histogram.values().count == 5
    assert list(BUCKETS_S) == sorted(BUCKETS_S)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        (" 0.0.0.0:1 ", ("0.0.0.0", 1)),
        ("[::1]:9464", ("::1", 9464)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_address_has_a_default_host(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "0", "65536", "1.2.3.4:", "::1:9464", "[::1]", "[x]:1", "a:-1", "a:\u0661"],
)
def test_invalid_address_is_refused(text):
    with pytest.raises(ValueError, match="not an address"):
        parse_address(text)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_metrics_are_served_until_the_end(telemetry):
    port = free_port()
    with serve_metrics(str(port), telemetry):
        response = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert "tinkerfs_build_info{" in response.text
        with (
            pytest.raises(StartupError, match=r"cannot be served at .*: Address already in use"),
            serve_metrics(f":{port}", telemetry),
        ):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)


def test_missing_extra_is_named(telemetry, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        pytest.raises(StartupError, match=r"pip install 'tinkerfs\[metrics\]'"),
        serve_metrics("9464", telemetry),
    ):
        pass


DASHBOARD = json.loads((ROOT / "tinkerfs" / "data" / "grafana" / "tinkerfs.json").read_text())
#: Those with queries; the others are headings of rows.
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def test_dashboard_queries_exported_metrics(telemetry):
    families = list(TelemetryCollector(telemetry).collect())
    exported_names = {f.name + suffix for f in families for suffix in SUFFIXES[f.type]}
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    queries += [variable["definition"] for variable in DASHBOARD["templating"]["list"][1:]]
    used = {name for query in queries for name in re.findall(r"\btinkerfs_\w+", query)}
    assert used - exported_names == set()
    unused = {f.name for f in families if not any(f.name + s in used for s in SUFFIXES[f.type])}
    assert unused == set(), "the dashboard shows every metric"
    labels = {label for f in families for sample in f.samples for label in sample.labels}
    grouped = {
        name
        for query in queries
        for group in re.findall(r"by \(([^)]*)\)", query)
        for name in group.split(", ")
    }
    assert grouped - labels <= {"instance", "state"}


def test_dashboard_has_the_form_that_grafana_imports():
    assert set(DASHBOARD) >= {"title", "uid", "schemaVersion", "panels", "templating", "time"}
    assert "id" not in DASHBOARD, "an import assigns it"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & cells, "panels do not overlap"
        cells |= own
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == list("ABCDEFGH")[: len(refs)]
