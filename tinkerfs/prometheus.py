"""Metrics of a mount for Prometheus, over HTTP.

The metrics are made from `Telemetry` when they are scraped, so that they agree with `stats.json`.
A scrape sends no request and takes only locks that are held briefly, so it works while a mount
hangs. No label has a value from outside: endpoints, operations and errnos are limited sets.
"""

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tinkerfs import __version__
from tinkerfs.config import parse_address
from tinkerfs.errors import StartupError
from tinkerfs.histogram import BUCKETS_S, HistogramValues
from tinkerfs.telemetry import Telemetry

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily, Metric

#: Counter of `Telemetry.counters` -> metric without the suffix `_total`, and its meaning.
COUNTERS: Final = {
    "background_revalidations": (
        "tinkerfs_metadata_cache_revalidations",
        "Stale values that were served during a refresh.",
    ),
    "blob_proxy_bytes_received": (
        "tinkerfs_blob_proxy_received_bytes",
        "Bodies of responses of the caching proxy.",
    ),
    "blob_proxy_fallbacks": (
        "tinkerfs_blob_proxy_fallbacks",
        "Ranges that were requested from the store instead of the caching proxy.",
    ),
    "blob_proxy_hits": (
        "tinkerfs_blob_proxy_hits",
        "Responses that the caching proxy had in its cache.",
    ),
    "blob_proxy_missed_bytes": (
        "tinkerfs_blob_proxy_missed_bytes",
        "Length of the slices that the caching proxy requested from the store.",
    ),
    "blob_proxy_misses": (
        "tinkerfs_blob_proxy_misses",
        "Responses that the caching proxy requested from the store.",
    ),
    "blob_proxy_outages": ("tinkerfs_blob_proxy_outages", "Outages of the caching proxy."),
    "block_cache_bytes_read": (
        "tinkerfs_block_cache_read_bytes",
        "Data of weights that was read from memory or disk.",
    ),
    "block_cache_corruptions": (
        "tinkerfs_block_cache_corruptions",
        "Cached blocks with a wrong checksum.",
    ),
    "block_cache_hits": (
        "tinkerfs_block_cache_hits",
        "Reads of a block from memory or disk.",
    ),
    "block_cache_misses": (
        "tinkerfs_block_cache_misses",
        "Reads of a block that waited for a download.",
    ),
    "block_cache_write_rejections": (
        "tinkerfs_block_cache_write_rejections",
        "Blocks that were not written to the disk.",
    ),
    "blocks_downloaded": ("tinkerfs_blocks_downloaded", "Blocks of weights that were downloaded."),
    "bytes_received": (
        "tinkerfs_received_bytes",
        "Bodies of responses, of the API, the object store and the caching proxy.",
    ),
    "errors": ("tinkerfs_errors", "Failed operations in .tinkerfs/errors."),
    "exports_failed": ("tinkerfs_exports_failed", "Exports that failed."),
    "exports_renewed": ("tinkerfs_exports_renewed", "Expiries of exports that were set again."),
    "exports_started": ("tinkerfs_exports_started", "Exports that were started."),
    "metadata_cache_hits": (
        "tinkerfs_metadata_cache_hits",
        "Lookups with a fresh value, or with a cached failure.",
    ),
    "metadata_cache_misses": ("tinkerfs_metadata_cache_misses", "Other lookups of metadata."),
    "passthrough_opens": (
        "tinkerfs_passthrough_opens",
        "Opens of files that the kernel reads from the cache itself.",
    ),
    "shared_cache_blocks_read": (
        "tinkerfs_shared_cache_blocks_read",
        "Files of blocks that were read from a cache directory that hosts share.",
    ),
    "shared_cache_blocks_stored": (
        "tinkerfs_shared_cache_blocks_stored",
        "Files of blocks that this mount stored in such a directory.",
    ),
    "shared_cache_outages": (
        "tinkerfs_shared_cache_outages",
        "Times at which such a directory did not respond and was set aside.",
    ),
    "shared_metadata_changes": (
        "tinkerfs_shared_metadata_changes",
        "Changes that other mounts announced.",
    ),
    "shared_metadata_failures": (
        "tinkerfs_shared_metadata_failures",
        "Failed commands of the Redis server.",
    ),
    "shared_metadata_hits": (
        "tinkerfs_shared_metadata_hits",
        "Responses that another mount had requested.",
    ),
    "shared_metadata_misses": (
        "tinkerfs_shared_metadata_misses",
        "Responses that this mount requested.",
    ),
    "shared_metadata_rejections": (
        "tinkerfs_shared_metadata_rejections",
        "Values and messages of the Redis server that are not authentic or not understood.",
    ),
    "shared_metadata_waits": (
        "tinkerfs_shared_metadata_waits",
        "Waits for another mount's request.",
    ),
    "stale_if_error_hits": (
        "tinkerfs_metadata_cache_stale_hits",
        "Stale values that were served because a request failed or was slow.",
    ),
    "store_bytes_received": (
        "tinkerfs_store_received_bytes",
        "Bodies of responses of the object store.",
    ),
}

#: Gauge of `Telemetry.gauges` with a number -> metric and its meaning.
GAUGES: Final = {
    "api_permits": ("tinkerfs_api_permits", "API requests that may be in flight."),
    "api_permits_awaited": ("tinkerfs_api_permits_awaited", "API requests that wait for a permit."),
    "api_permits_used": ("tinkerfs_api_permits_used", "API requests in flight."),
    "blocks_in_flight": (
        "tinkerfs_blocks_in_flight",
        "Blocks of weights that are being downloaded, or will be.",
    ),
    "exports_running": ("tinkerfs_exports_running", "Exports that this process is making."),
    "shared_cache_hangs": (
        "tinkerfs_shared_cache_hangs",
        "Whether the cache directory that hosts share does not respond.",
    ),
    "shared_metadata_up": (
        "tinkerfs_shared_metadata_up",
        "Whether responses are shared with other mounts.",
    ),
}

#: Label of `tinkerfs_export_records` -> gauge of `Telemetry.gauges`.
EXPORT_STATES: Final = {
    "begun": "export_records_begun",
    "done": "export_records_done",
    "failed": "export_records_failed",
}

#: Label of `tinkerfs_key_state`: the values of the gauge `key`.
KEY_STATES: Final = ("usable", "backing_off", "retrying")

_MISSING: Final = "--metrics needs prometheus-client (hint: pip install 'tinkerfs[metrics]')"


class TelemetryCollector:
    """Makes the metrics from telemetry, for a registry of prometheus_client. Thread-safe."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def collect(self) -> "Iterator[Metric]":
        """Return every metric with its current values."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        telemetry = self._telemetry

        def counter(
            name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[list[str], float]]
        ) -> "Metric":
            family = CounterMetricFamily(name, text, labels=labels)
            for label_values, value in values:
                family.add_metric(label_values, value)
            return family

        def gauge(
            name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[list[str], float]]
        ) -> "Metric":
            family = GaugeMetricFamily(name, text, labels=labels)
            for label_values, value in values:
                family.add_metric(label_values, value)
            return family

        yield gauge(
            "tinkerfs_build_info",
            "Version of tinkerfs and of Python.",
            ("version", "python"),
            [([__version__, platform.python_version()], 1)],
        )
        yield gauge(
            "tinkerfs_start_time_seconds",
            "Start of the mount since 1970.",
            (),
            [([], telemetry.started_at)],
        )
        yield from self._operations(counter)
        yield counter(
            "tinkerfs_api_requests",
            "HTTP requests by endpoint, and by status or kind of failure.",
            ("endpoint", "outcome"),
            [
                ([endpoint, outcome], count)
                for endpoint, outcomes in telemetry.requests().items()
                for outcome, count in outcomes.items()
            ],
        )
        yield _histograms(
            "tinkerfs_api_request_duration_seconds",
            "Time to the end of the response of an API request.",
            "endpoint",
            telemetry.request_durations(),
        )
        yield _histograms(
            "tinkerfs_wait_duration_seconds",
            "Waits for archives and exports that have ended.",
            "",
            {"": telemetry.waits()},
        )
        yield gauge(
            "tinkerfs_pending_waits",
            "Waits for archives and exports.",
            (),
            [([], len(telemetry.pending()))],
        )
        counters, gauges = telemetry.counters(), telemetry.gauges()
        for key, (name, text) in COUNTERS.items():
            yield counter(name, text, (), [([], counters.get(key, 0))])
        for key, (name, text) in GAUGES.items():
            yield gauge(name, text, (), [([], float(gauges.get(key, 0)))])
        yield gauge(
            "tinkerfs_export_records",
            "Recorded exports by state.",
            ("state",),
            [([state], float(gauges.get(key, 0))) for state, key in EXPORT_STATES.items()],
        )
        yield gauge(
            "tinkerfs_key_state",
            "State of the API key: 1 for the current one.",
            ("state",),
            [([state], float(gauges.get("key") == state)) for state in KEY_STATES],
        )

    def _operations(self, counter: "Callable[..., Metric]") -> "Iterator[Metric]":
        counts = self._telemetry.operations.counts
        yield _histograms(
            "tinkerfs_fuse_operation_duration_seconds",
            "Time of a FUSE operation in this process, without cached replies.",
            "operation",
            counts.durations(),
        )
        yield counter(
            "tinkerfs_fuse_operation_errors",
            "Failed FUSE operations.",
            ("operation", "errno"),
            [
                ([operation, name], count)
                for operation, names in counts.errors().items()
                for name, count in names.items()
            ],
        )
        yield counter(
            "tinkerfs_fuse_cached_replies",
            "Replies from a cache of packed replies.",
            ("operation",),
            [([operation], count) for operation, count in counts.cached_replies().items()],
        )
        yield counter(
            "tinkerfs_fuse_read_bytes",
            "Data that reads returned to the kernel.",
            (),
            [([], counts.read_bytes)],
        )
        yield counter(
            "tinkerfs_fuse_written_bytes",
            "Data that was written to controls.",
            (),
            [([], counts.written_bytes)],
        )


def _histograms(
    name: str, text: str, label: str, values: dict[str, HistogramValues]
) -> "HistogramMetricFamily":
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=[label] if label else [])
    for key, histogram in values.items():
        total, buckets = 0, []
        bounds = (*(repr(bound) for bound in BUCKETS_S), "+Inf")
        for bound, count in zip(bounds, histogram.buckets, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric([key] if label else [], buckets, histogram.sum_s)
    return family


@contextmanager
def serve_metrics(address: str | None, telemetry: Telemetry) -> Iterator[None]:
    """Serve the metrics at an address while the body runs; without one, do nothing.

    Raises:
        StartupError: the address is not available, or prometheus-client is not installed.
    """
    if address is None:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise StartupError(_MISSING) from None
    host, port = parse_address(address)
    registry = CollectorRegistry()
    registry.register(TelemetryCollector(telemetry))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartupError(
            f"the metrics cannot be served at {address}: {error.strerror}"
            " (hint: choose another address with --metrics)"
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
