"""What the mount tells of itself: counters, last failures, last changes, what is waited for.

Everybody calls down into one `Telemetry`; `.tinkerfs/` and `tinkerfs status` show it. Thread-safe.
No key and no signed URL comes in: all words from outside passed `errors.redact` before.
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from tinkerfs import errors
from tinkerfs.clock import SYSTEM_CLOCK, Clock
from tinkerfs.context import Caller
from tinkerfs.journal import Journal
from tinkerfs.printable import printable

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Line:
    time: float
    text: str
    times: int = 1


@dataclass(slots=True)
class MutationRecord:
    """One change that was asked for through this mount.

    Attributes:
        time: when it was asked for, seconds since 1970.
        path: the file that was written or removed.
        what: what the API is asked to do.
        who: the process and user.
        outcome: how it ended, or that it has not.
        caller_left: why its caller no longer waited; empty while it did.
    """

    time: float
    path: str
    action: str
    actor: str
    outcome: str = "under way"
    abandoned_with: str = ""


class Telemetry:
    """Counters and journals of one mount."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock.now()
        self._started_monotonic = clock.monotonic()
        #: The last failures and changes. Entries are changed by this class alone.
        self.errors: Journal[_Line] = Journal(_error_text)
        self.changes: Journal[MutationRecord] = Journal(_change_text)
        # All guarded by _lock.
        self._counters: Counter[str] = Counter()
        self._calls: dict[str, Counter[str]] = {}
        self._last_error: _Line | None = None
        self._waits: dict[int, tuple[str, float]] = {}
        self._next_wait = 0

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a named counter, e.g. "cache_hits"."""
        with self._lock:
            self._counters[name] += amount

    def counter_value(self, name: str) -> int:
        """Return a named counter."""
        with self._lock:
            return self._counters[name]

    def pending(self) -> list[tuple[str, float]]:
        """Return what is being waited for, and for how many seconds so far."""
        with self._lock:
            now = self._clock.monotonic()
            return [(what, now - since) for what, since in self._waits.values()]

    def record_request(self, endpoint: str, outcome: str) -> None:
        """Count one HTTP request: `outcome` is its status, or what went wrong instead of one."""
        with self._lock:
            self._calls.setdefault(endpoint, Counter())[outcome] += 1

    def record_error(self, path: str, operation: str, error: OSError) -> None:
        """Remember and log a failed operation; the same failure again only counts up."""
        number = errors.errno_name(error)
        words = errors.redact(error.strerror or "")
        text = f"{printable(path) or '-'}\t{operation}\t{number}\t{words}"
        level = logging.WARNING if errors.is_upstream_failure(error) else logging.INFO
        log.log(level, "%s", text.replace("\t", " "))
        with self._lock:
            self._counters["errors"] += 1
            last = self._last_error
            if last is not None and last.text == text:
                last.times += 1
                last.time = self._clock.now()
                self.errors.amend(last)
            else:
                self._last_error = _Line(self._clock.now(), text)
                self.errors.add(self._last_error)

    def begin_mutation(self, path: str, what: str, caller: Caller) -> MutationRecord:
        """Record a change before anything is done about it; `change_ended` says how it went."""
        who = f"{caller.command()}[{caller.pid}] uid {caller.uid}"
        change = MutationRecord(self._clock.now(), path, what, who)
        self.changes.add(change)
        log.info("%s: %s asked for by %s", path, what, who)
        return change

    def end_mutation(self, change: MutationRecord, outcome: str) -> None:
        """Record how a change ended."""
        change.outcome = errors.redact(outcome)
        self.changes.amend(change)
        log.info("%s: %s: %s", change.path, change.action, change.outcome)

    @contextmanager
    def track_pending(self, what: str) -> Iterator[None]:
        """Show `what` as being waited for while the body runs."""
        with self._lock:
            number = self._next_wait = self._next_wait + 1
            self._waits[number] = (what, self._clock.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._waits[number]

    def snapshot(self) -> dict[str, object]:
        """Return everything as plain JSON values; times are RFC 3339, spans seconds."""
        with self._lock:
            now = self._clock.monotonic()
            calls = {endpoint: dict(outcomes) for endpoint, outcomes in sorted(self._calls.items())}
            hits, misses = self._counters["cache_hits"], self._counters["cache_misses"]
            return {
                "pid": os.getpid(),
                "started": rfc3339(self._started),
                "uptime_s": round(now - self._started_monotonic, 3),
                "calls": calls,
                "calls_total": sum(sum(outcomes.values()) for outcomes in calls.values()),
                "cache_hit_rate": round(hits / (hits + misses), 4) if hits + misses else None,
                "counters": dict(sorted(self._counters.items())),
                "waiting": [
                    {"what": printable(what), "for_s": round(now - since, 3)}
                    for what, since in self._waits.values()
                ],
                "last_errors": [_error_text(line) for line in self.errors.entries()[-5:]],
            }

    def errors_text(self) -> str:
        """Return the last failures, a line each, newest last."""
        return self.errors.text().decode()

    def changes_text(self) -> str:
        """Return the last changes, a line each, newest last."""
        return self.changes.text().decode()


def rfc3339(seconds: float) -> str:
    """Return a time (seconds since 1970) as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _format_outcome(change: MutationRecord) -> str:
    return change.outcome + (
        f" (its caller: {change.abandoned_with})" if change.abandoned_with else ""
    )


def _change_text(change: MutationRecord) -> str:
    fields = (change.path, change.action, change.actor, _format_outcome(change))
    return "\t".join((rfc3339(change.time), *map(printable, fields)))


def _error_text(line: _Line) -> str:
    times = f"\t({line.times} times)" if line.times > 1 else ""
    return f"{rfc3339(line.time)}\t{line.text}{times}"
