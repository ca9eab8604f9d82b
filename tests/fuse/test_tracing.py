"""Traces of a mount, as a collector receives them over OTLP."""

import gzip
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.mount import tinkerfs, wait_until


@pytest.fixture
def binding():
    return "auto"


class Collector(ThreadingHTTPServer):
    """A receiver of OTLP over HTTP."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.bodies, self.paths = [], set()

    def requests(self):
        return [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]

    def spans(self):
        return [
            span
            for request in self.requests()
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resource(self):
        [resource, *_] = self.requests()[0].resource_spans
        return values(resource.resource.attributes)


class CollectorHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.add(self.path)
        self.server.bodies.append(body)
        reply = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_arguments):
        pass


def values(attributes):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture
def collector():
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_collector_receives_spans_of_a_mount(mountpoint, env, server, collector):
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    done = tinkerfs("mount", mountpoint, env=env | variables)
    assert done.returncode == 0, done.stderr
    os.listdir(mountpoint / "runs")
    weights = next((mountpoint / "runs").glob("*/checkpoints/weights/*/files"))
    next(weights.iterdir()).read_bytes()
    names = {"opendir", "GET training_runs", "GET store", "read"}
    wait_until(lambda: names <= {span.name for span in collector.spans()}, timeout_s=30)
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    assert collector.paths == {"/v1/traces"}
    wanted = {"service.name": "tinkerfs", "deployment.environment.name": "test"}
    assert wanted.items() <= collector.resource().items()
    spans = {span.span_id: span for span in collector.spans()}
    children = [span for span in spans.values() if span.parent_span_id in spans]
    [listing] = [span for span in children if span.name == "GET training_runs"]
    parent = spans[listing.parent_span_id]
    assert (parent.name, values(parent.attributes)["file.path"]) == ("opendir", "/runs")
    assert listing.trace_id == parent.trace_id
    assert parent.start_time_unix_nano <= listing.start_time_unix_nano + 10**7
    transfers = [span for span in children if span.name == "GET store"]
    assert {spans[span.parent_span_id].name for span in transfers} <= {"opendir", "open", "read"}
    assert all("?" not in values(span.attributes)["url.full"] for span in transfers)
    content = b"".join(collector.bodies)
    for secret in (server.api_key.encode(), b"X-Amz-Signature", b"sig=", b"signature="):
        assert secret not in content


def test_sampler_of_the_environment_is_used(mountpoint, env, collector):
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_TRACES_SAMPLER": "always_off",
    }
    assert tinkerfs("mount", mountpoint, env=env | variables).returncode == 0
    os.listdir(mountpoint / "runs")
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
    assert collector.bodies == []


def test_mount_works_without_its_collector(mountpoint, env):
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert tinkerfs("mount", mountpoint, env=env | variables).returncode == 0
    assert len(os.listdir(mountpoint / "runs")) == 10
    assert tinkerfs("umount", mountpoint, env=env).returncode == 0
