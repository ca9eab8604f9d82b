"""Traces: spans of operations and their requests, as the SDK exports them."""

import errno
import sys
from concurrent.futures import Future

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tinkerfs.concurrency import SingleFlight, run_in_thread
from tinkerfs.context import Caller
from tinkerfs.operation_log import RequestRecord
from tinkerfs.telemetry import Telemetry
from tinkerfs.tracing import OperationTracer, export_traces, is_requested

CALLER = Caller(42, 1000, 42, 42)
RUNS = "GET training_runs/{run}"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def operations(exporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    operations = Telemetry().operations
    operations.observe(OperationTracer(provider))
    return operations


def request(endpoint=RUNS, outcome="200", url="https://u:pw@api.example:8443/v1/r?sig=s"):
    return RequestRecord(
        endpoint=endpoint,
        url=url,
        outcome=outcome,
        started_at=100.0,
        duration_s=0.5,
        request_id="req-1",
    )


def test_requests_are_children_of_their_operation(operations, exporter):
    active = operations.begin("opendir", "/runs", CALLER)
    run_in_thread(lambda: operations.record_request(request()), "load").result()
    operations.end(active, 0)
    child, parent = exporter.get_finished_spans()
    assert (parent.name, parent.parent, parent.kind) == ("opendir", None, SpanKind.INTERNAL)
    assert dict(parent.attributes) == {
        "file.path": "/runs",
        "tinkerfs.operation": "opendir",
        "process.pid": 42,
        "user.id": "1000",
    }
    assert child.parent.span_id == parent.context.span_id
    assert (child.name, child.kind) == (RUNS, SpanKind.CLIENT)
    assert (child.start_time, child.end_time) == (100 * 10**9, 100_500_000_000)
    assert dict(child.attributes) == {
        "http.request.method": "GET",
        "url.full": "https://api.example:8443/v1/r",
        "server.address": "api.example",
        "server.port": 8443,
        "http.response.status_code": 200,
        "http.response.header.x-request-id": ("req-1",),
    }


def test_store_request_has_no_signature(operations, exporter):
    active = operations.begin("read", "/x", CALLER)
    operations.record_request(request("GET store", "206", "http://store/a.tar?X-Signature=abc"))
    operations.end(active, 0, read_bytes=9)
    child, parent = exporter.get_finished_spans()
    assert child.name == "GET store"
    assert child.attributes["url.full"] == "http://store/a.tar"
    assert parent.attributes["tinkerfs.read_bytes"] == 9
    assert "abc" not in child.to_json()


def test_request_of_two_operations_is_a_child_of_the_first(operations, exporter):
    flights, gate = SingleFlight(), Future()

    def load():
        gate.result()
        operations.record_request(request())

    first = operations.begin("getattr", "/first", CALLER)
    future = flights.run("key", load, "load", Future())
    second = operations.begin("getattr", "/second", CALLER)
    assert flights.run("key", load, "load", Future()) is future
    operations.end(second, 0)
    operations.end(first, 0)
    gate.set_result(None)  # the request ends after its operation
    future.result()
    _second, parent, child = exporter.get_finished_spans()
    assert parent.attributes["file.path"] == "/first"
    assert child.parent.span_id == parent.context.span_id


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [(errno.EIO, "EIO", StatusCode.ERROR), (errno.ENOENT, "ENOENT", StatusCode.UNSET)],
)
def test_failures_are_errors_unless_routine(operations, exporter, number, name, status):
    active = operations.begin("open", "/a\udcff tml-secret-key", CALLER)
    operations.record_request(request(outcome="timed out"))
    operations.end(active, number)
    child, parent = exporter.get_finished_spans()
    assert parent.attributes["error.type"] == name
    assert parent.status.status_code is status
    assert parent.attributes["file.path"] == "/a\\xff [redacted key]"
    assert (child.attributes["error.type"], child.status.status_code) == (
        "timed out",
        StatusCode.ERROR,
    )
    assert "http.response.status_code" not in child.attributes


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x"}, False),
    ],
)
def test_traces_are_requested_by_standard_variables(environ, expected):
    assert is_requested(environ) is expected


def test_missing_sdk_is_a_warning(monkeypatch, expect_warnings):
    expect_warnings(r"no traces: .*pip install 'tinkerfs\[otel\]'")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    telemetry = Telemetry()
    with export_traces(telemetry):
        assert not telemetry.operations.is_observed


def test_unsupported_protocol_is_a_warning(monkeypatch, expect_warnings):
    expect_warnings("no traces: OTLP over grpc is not supported")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with export_traces(Telemetry()):
        pass
