"""Telemetry of a mount: counters, recent failures and changes, pending waits.

All layers report to one `Telemetry`; `.tinkerfs/` and `tinkerfs status` show it. Thread-safe. It
never receives an API key or a signed URL: external text passes through `errors.redact` first.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from tinkerfs import errors
from tinkerfs.access_log import AccessLog
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import Caller
from tinkerfs.histogram import DurationHistogram, HistogramValues
from tinkerfs.journal import Journal
from tinkerfs.operation_log import OperationLog
from tinkerfs.printable import escape_control_chars

log = logging.getLogger(__name__)

#: Returns a number, or the name of a state.
Gauge = Callable[[], int | str]


@dataclass(slots=True)
class _ErrorRecord:
    time: float
    text: str
    count: int = 1


@dataclass(slots=True, kw_only=True)
class MutationRecord:
    """One change that was requested through this mount.

    Attributes:
        time: time of the request, seconds since 1970.
        path: the file that was written or removed.
        action: the API operation.
        caller: the process and user.
        command: name of the process, "?" if it had exited.
        tinker_path: the checkpoint's tinker path.
        outcome: result of the change, or that it is in flight.
        abandoned_with: errno name with which the caller stopped waiting; empty if it did not.
    """

    time: float
    path: str
    action: str
    caller: Caller
    command: str
    tinker_path: str
    outcome: str = "in flight"
    abandoned_with: str = ""

    @property
    def actor(self) -> str:
        """The process and user, for messages."""
        return f"{self.command}[{self.caller.pid}] uid {self.caller.uid}"


class Telemetry:
    """Counters and journals of one mount.

    Attributes:
        passthrough: whether the kernel itself reads cached files: "on", or "off" and the reason.
        on_change: called with each change before it is sent, and after its outcome is known.
        operations: passes the record of each FUSE operation to its subscribers.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock.now()
        self._started_monotonic = clock.monotonic()
        self.passthrough = "off: not a mount"
        self.on_change: Callable[[MutationRecord], None] = lambda _change: None
        self.operations = OperationLog()
        #: The operations as lines, while they are read.
        self.access_log = AccessLog(self.operations)
        #: The last failures and changes. Only this class changes their entries.
        self.errors: Journal[_ErrorRecord] = Journal(_format_error)
        self.changes: Journal[MutationRecord] = Journal(_format_mutation)
        # All guarded by _lock.
        self._counters: Counter[str] = Counter()
        self._requests: dict[str, Counter[str]] = {}
        self._last_error: _ErrorRecord | None = None
        self._pending: dict[int, tuple[Callable[[], str], float]] = {}
        self._next_pending = 0
        self._request_durations: dict[str, DurationHistogram] = {}
        self._waits = DurationHistogram()
        self._gauges: dict[str, Gauge] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a named counter, e.g. "metadata_cache_hits"."""
        with self._lock:
            self._counters[name] += amount

    def counter_value(self, name: str) -> int:
        """Return the value of a named counter."""
        with self._lock:
            return self._counters[name]

    def pending(self) -> list[tuple[str, float]]:
        """Return every pending wait as its description and the seconds since its start."""
        with self._lock:
            now = self._clock.monotonic()
            return [(what(), now - since) for what, since in self._pending.values()]

    def record_request(self, endpoint: str, outcome: str, duration_s: float | None = None) -> None:
        """Count one HTTP request by its outcome: the status, or the kind of failure.

        Args:
            duration_s: time to the end of its response, seconds; None for a transfer of weights.
        """
        with self._lock:
            self._requests.setdefault(endpoint, Counter())[outcome] += 1
            if duration_s is not None:
                durations = self._request_durations.setdefault(endpoint, DurationHistogram())
                durations.observe(duration_s)

    def add_gauge(self, name: str, read: Gauge) -> None:
        """Show a value that is read when it is needed, by a function that never blocks."""
        with self._lock:
            self._gauges[name] = read

    def requests(self) -> dict[str, dict[str, int]]:
        """Return the number of HTTP requests by endpoint and outcome."""
        with self._lock:
            return {name: dict(counts) for name, counts in sorted(self._requests.items())}

    def request_durations(self) -> dict[str, HistogramValues]:
        """Return the durations of API requests by endpoint."""
        with self._lock:
            durations = sorted(self._request_durations.items())
        return {endpoint: histogram.values() for endpoint, histogram in durations}

    def waits(self) -> HistogramValues:
        """Return the durations of the pending waits that have ended."""
        return self._waits.values()

    def counters(self) -> dict[str, int]:
        """Return the values of all named counters."""
        with self._lock:
            return dict(sorted(self._counters.items()))

    def gauges(self) -> dict[str, int | str]:
        """Return the current value of each gauge."""
        with self._lock:
            gauges = sorted(self._gauges.items())
        return {name: read() for name, read in gauges}

    @property
    def started_at(self) -> float:
        """The time of the start, seconds since 1970."""
        return self._started

    def record_error(self, path: str, operation: str, error: OSError) -> None:
        """Record and log a failed operation; a repetition only increments its count."""
        name = errors.errno_name(error)
        reason = errors.redact(error.strerror or "")
        text = f"{escape_control_chars(path) or '-'}\t{operation}\t{name}\t{reason}"
        level = logging.WARNING if errors.is_upstream_failure(error) else logging.INFO
        cause = error.__cause__
        request_id = cause.request_id if isinstance(cause, errors.ApiError) else ""
        fields = {
            "operation": operation,
            "path": path,
            "errno": name,
            "request_ids": [request_id] if request_id else [],
        }
        log.log(level, "%s", text.replace("\t", " "), extra={"fields": fields})
        with self._lock:
            self._counters["errors"] += 1
            last = self._last_error
            if last is not None and last.text == text:
                last.count += 1
                last.time = self._clock.now()
                self.errors.amend(last)
            else:
                self._last_error = _ErrorRecord(self._clock.now(), text)
                self.errors.add(self._last_error)

    def begin_mutation(
        self, path: str, action: str, caller: Caller, tinker_path: str = ""
    ) -> MutationRecord:
        """Record a change before it is sent; `end_mutation` records its outcome."""
        mutation = MutationRecord(
            time=self._clock.now(),
            path=path,
            action=action,
            caller=caller,
            command=caller.command(),
            tinker_path=tinker_path,
        )
        self.changes.add(mutation)
        log.info("%s: %s requested by %s", path, action, mutation.actor)
        self.on_change(mutation)
        return mutation

    def end_mutation(self, mutation: MutationRecord, outcome: str) -> None:
        """Record the outcome of a change."""
        mutation.outcome = errors.redact(outcome)
        self.changes.amend(mutation)
        log.info("%s: %s: %s", mutation.path, mutation.action, mutation.outcome)
        self.on_change(mutation)

    @contextmanager
    def track_pending(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Show a wait as pending while the body runs; a function describes its current state."""
        with self._lock:
            number = self._next_pending = self._next_pending + 1
            describe = what if callable(what) else partial(str, what)
            self._pending[number] = (describe, self._clock.monotonic())
        try:
            yield
        finally:
            with self._lock:
                _describe, since = self._pending.pop(number)
            self._waits.observe(self._clock.monotonic() - since)

    def snapshot(self) -> dict[str, object]:
        """Return all values as plain JSON types; times as RFC 3339, durations in seconds."""
        requests, gauges = self.requests(), self.gauges()
        durations, waits = self.request_durations(), self.waits()
        with self._lock:
            now = self._clock.monotonic()
            hits = self._counters["metadata_cache_hits"]
            lookups = hits + self._counters["metadata_cache_misses"]
            return {
                "pid": os.getpid(),
                "started": rfc3339(self._started),
                "uptime_s": round(now - self._started_monotonic, 3),
                "api_requests": requests,
                "api_request_duration_s": {
                    endpoint: round(values.sum_s, 6) for endpoint, values in durations.items()
                },
                "api_requests_total": sum(sum(counts.values()) for counts in requests.values()),
                "metadata_cache_hit_ratio": round(hits / lookups, 4) if lookups else None,
                "passthrough": self.passthrough,
                **self.operations.counts.snapshot(),
                "waits": {"count": waits.count, "duration_s": round(waits.sum_s, 6)},
                "gauges": gauges,
                "counters": dict(sorted(self._counters.items())),
                "pending": [
                    {"what": escape_control_chars(what()), "elapsed_s": round(now - since, 3)}
                    for what, since in self._pending.values()
                ],
                "last_errors": [_format_error(error) for error in self.errors.entries()[-5:]],
            }


def rfc3339(seconds: float) -> str:
    """Return a time (seconds since 1970) as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _format_outcome(mutation: MutationRecord) -> str:
    return mutation.outcome + (
        f" (its caller: {mutation.abandoned_with})" if mutation.abandoned_with else ""
    )


def _format_mutation(mutation: MutationRecord) -> str:
    fields = (mutation.path, mutation.action, mutation.actor, _format_outcome(mutation))
    return "\t".join((rfc3339(mutation.time), *map(escape_control_chars, fields)))


def _format_error(error: _ErrorRecord) -> str:
    count = f"\t({error.count} times)" if error.count > 1 else ""
    return f"{rfc3339(error.time)}\t{error.text}{count}"
