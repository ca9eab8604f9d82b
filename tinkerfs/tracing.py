"""Traces for OpenTelemetry: a span per FUSE operation, with its requests as children.

The standard variables of OpenTelemetry turn traces on and configure them, so that a mount needs no
options of its own for them. Spans are exported by a thread of the SDK, which drops them if the
collector is slow, so that no operation waits for it. No span has a key or the query of a URL.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from tinkerfs import __version__, errors
from tinkerfs.operation_log import ActiveOperation, OperationRecord, RequestRecord
from tinkerfs.printable import valid_unicode, without_secrets_up_to
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

#: Each turns traces on (OpenTelemetry's "OTLP Exporter Configuration").
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

#: Maximum length of a path in a span.
_MAX_PATH_CHARS: Final = 4096


def is_requested(environ: Mapping[str, str]) -> bool:
    """Return whether the environment asks for traces."""
    return (
        any(environ.get(name) for name in _ENDPOINTS)
        and environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        and environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "none"
    )


@contextmanager
def export_traces(telemetry: Telemetry) -> Iterator[None]:
    """Export traces while the body runs, if the environment asks for them.

    The variables may be meant for other programs of the host. So traces that cannot be exported
    are only logged, and the mount is made without them.
    """
    provider = _make_provider(os.environ) if is_requested(os.environ) else None
    if provider is None:
        yield
        return
    stop = telemetry.operations.observe(OperationTracer(provider))
    try:
        yield
    finally:
        stop()
        provider.shutdown()


def _make_provider(environ: Mapping[str, str]) -> "TracerProvider | None":
    protocol = next((environ[name] for name in _PROTOCOLS if environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("no traces: OTLP over %s is not supported, http/protobuf is", protocol)
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: they need the SDK (hint: pip install 'tinkerfs[otel]')")
        return None
    attributes: dict[str, str | int] = {"service.version": __version__, "process.pid": os.getpid()}
    if not environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = "tinkerfs"
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class OperationTracer:
    """Makes spans of the operations and requests of an operation log. Thread-safe."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context

        self._trace = trace
        self._root = Context()
        self._tracer = provider.get_tracer("tinkerfs", __version__)

    def on_begin(self, active: ActiveOperation) -> None:
        """Start the span of an operation, which is the root of a trace."""
        active.span = self._tracer.start_span(
            active.operation,
            context=self._root,
            start_time=_as_ns(active.started_at),
            attributes={
                "file.path": without_secrets_up_to(valid_unicode(active.path), _MAX_PATH_CHARS),
                "tinkerfs.operation": active.operation,
                "process.pid": active.caller.process or active.caller.pid,
                "user.id": str(active.caller.uid),
            },
        )

    def on_request(self, active: ActiveOperation, request: RequestRecord) -> None:
        """Make the span of a request, a child of the operation that started it."""
        span: Any = active.span
        if span is None:  # the operation began before the traces
            return
        url = urlsplit(request.url)
        attributes: dict[str, Any] = {
            "http.request.method": request.endpoint.partition(" ")[0],
            "url.full": f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}",
            "server.address": url.hostname or "",
        }
        if url.port is not None:
            attributes["server.port"] = url.port
        if request.outcome.isdigit():
            attributes["http.response.status_code"] = int(request.outcome)
        if request.request_id:
            attributes["http.response.header.x-request-id"] = [request.request_id]
        is_error = not request.outcome.isdigit() or int(request.outcome) >= 400
        if is_error:
            attributes["error.type"] = request.outcome
        child = self._tracer.start_span(
            request.endpoint,
            context=self._trace.set_span_in_context(span, self._root),
            kind=self._trace.SpanKind.CLIENT,
            start_time=_as_ns(request.started_at),
            attributes=attributes,
        )
        if is_error:
            child.set_status(self._trace.StatusCode.ERROR)
        child.end(_as_ns(request.started_at + request.duration_s))

    def on_end(self, active: ActiveOperation, record: OperationRecord) -> None:
        """End the span of an operation; its caller's routine lookups are not errors."""
        span: Any = active.span
        if span is None:
            return
        if record.errno:
            span.set_attribute("error.type", record.errno_name)
            if not errors.is_routine(record.errno):
                span.set_status(self._trace.StatusCode.ERROR)
        if record.read_bytes:
            span.set_attribute("tinkerfs.read_bytes", record.read_bytes)
        if record.written_bytes:
            span.set_attribute("tinkerfs.written_bytes", record.written_bytes)
        span.end(_as_ns(record.started_at + record.duration_s))


def _as_ns(seconds: float) -> int:
    return int(seconds * 1e9)
