"""The fault plan: rules that inject faults into responses.

    server.faults.add("GET training_runs", status=503, times=2, headers={"Retry-After": "0"})
    rule = server.faults.add("GET archive", hang=True, times=None)
    rule.wait_for(64); ...; rule.release()

The first matching rule with remaining turns applies to a request. All classes are thread-safe.
"""

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.request_log import RequestRecord

_POLL_S = 0.1


class FaultRule:
    """A fault for some requests; `FaultPlan.add` documents the arguments."""

    def __init__(
        self,
        endpoint: str | re.Pattern[str],
        *,
        times: int | None = 1,
        after: int = 0,
        when: Callable[[RequestRecord], bool] | None = None,
        call: Callable[[], object] | None = None,
        latency_s: float = 0.0,
        hang: bool = False,
        hold_until: int | None = None,
        refuse: bool = False,
        reset: bool = False,
        status: int | None = None,
        body: bytes | str | Mapping[str, Any] | list[Any] | None = None,
        headers: Mapping[str, str | None] | None = None,
        redirect_to: str | None = None,
        html: bool = False,
        half_json: bool = False,
        edit: Callable[[Any], Any] | None = None,
        total_count: int | Callable[[int], int] | None = None,
        cursor: str | None = None,
        page_max: int | None = None,
        cut_after_bytes: int | None = None,
        stall_after_bytes: int | None = None,
        bytes_per_s: float | None = None,
        ignore_range: bool = False,
        flip_byte: int | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.times, self.after, self.when, self.call = times, after, when, call
        self.latency_s, self.hang, self.hold_until = latency_s, hang, hold_until
        self.refuse, self.reset = refuse, reset
        self.status, self.body, self.headers = status, body, dict(headers or {})
        self.redirect_to, self.html, self.half_json = redirect_to, html, half_json
        self.edit, self.total_count, self.cursor, self.page_max = (
            edit,
            total_count,
            cursor,
            page_max,
        )
        self.cut_after_bytes, self.stall_after_bytes = cut_after_bytes, stall_after_bytes
        self.bytes_per_s, self.ignore_range, self.flip_byte = bytes_per_s, ignore_range, flip_byte
        # Held requests wait for this event and not for _changed, which every new request notifies.
        self._released = threading.Event()
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._seen = 0
        self._applied = 0
        self._waiting = 0
        self._is_removed = False

    @property
    def replaces_response(self) -> bool:
        """Whether the rule supplies the response, so that the request has no effect."""
        sources = (self.status, self.body, self.redirect_to)
        return self.html or any(value is not None for value in sources)

    @property
    def applied(self) -> int:
        """The number of requests that it was applied to."""
        return self._applied

    @property
    def waiting(self) -> int:
        """The number of requests that it is holding."""
        return self._waiting

    def wait_for(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until the rule holds `count` requests at the same time.

        Raises:
            TimeoutError: Fewer requests were held within the timeout.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting >= count, timeout_s):
                msg = f"{self._waiting} of {count} requests were held after {timeout_s} s"
                raise TimeoutError(msg)

    def release(self) -> None:
        """Release all held requests; later ones are not held."""
        self._released.set()

    def remove(self) -> None:
        """Release all held requests, and stop to apply."""
        self._is_removed = True
        self.release()

    def take(self, record: RequestRecord) -> bool:
        """Use one turn for a request; return False if it does not match or none is left."""
        if not record.matches(self.endpoint) or (self.when is not None and not self.when(record)):
            return False
        with self._changed:
            if self._is_removed:
                return False
            self._seen += 1
            turn = self._seen - self.after
            if turn <= 0 or (self.times is not None and turn > self.times):
                return False
            self._applied += 1
            return True

    def hold(self, is_over: Callable[[], bool]) -> bool:
        """Hold the calling thread until released; return False if aborted.

        Args:
            is_over: Polled; returns True to abort, because the client has disconnected or the
                server is closing.
        """
        with self._changed:
            self._waiting += 1
            if self.hold_until is not None and self._waiting >= self.hold_until:
                self._released.set()
            self._changed.notify_all()
        try:
            while not self._released.wait(_POLL_S):
                if is_over():
                    return False
            return True
        finally:
            with self._changed:
                self._waiting -= 1


class FaultPlan:
    """The fault rules of one server, in the order in which they were added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: tuple[FaultRule, ...] = ()  # replaced, never changed; guarded by _lock

    def add(self, endpoint: str | re.Pattern[str], **effects: Any) -> FaultRule:
        """Add a rule.

        Args:
            endpoint: The requests: an endpoint as in the request log (`GET training_runs`), `api`,
                `store`, `*`, or a pattern for `<method> <path>`.
            **effects: Conditions:

                - `times`: maximum number of requests (1); None for all.
                - `after`: number of matching requests to skip first (0).
                - `when`: a predicate of the `RequestRecord`.

                Before the response, in this order:

                - `latency_s`: a delay.
                - `call`: a function to call, for instance to change the account between two pages.
                - `hang`: hold the request until `release()`, then respond normally.
                - `hold_until`: hold requests until this number of them is held (a barrier).
                - `refuse`: close the connection without a response. `reset`: close it with RST.

                Replacement of the response:

                - `status`, `body` (JSON unless bytes or text), `headers`.
                - `redirect_to`: a URL (default status 302).
                - `html`: an HTML error page like those of proxies (default status 502).

                Changes of the app's response:

                - `headers` alone: headers to set; None removes one.
                - `half_json`: send the first half of the body, with a matching length.
                - `edit`: a function that maps the JSON body to another.
                - `total_count`: a number, or a function of the original one.
                - `cursor`: `null` or `missing`.
                - `page_max`: maximum number of records, which the cursor does not reflect.
                - `cut_after_bytes`: close the connection after this part of the body.
                - `stall_after_bytes`: hold the request there until `release()`.
                - `bytes_per_s`: limit of the transfer rate.
                - `ignore_range`: ignore a Range header.
                - `flip_byte`: offset of a byte of the sent body to invert.
        """
        rule = FaultRule(endpoint, **effects)
        with self._lock:
            self._rules = (*self._rules, rule)
        return rule

    def clear(self) -> None:
        """Remove all rules and release the requests that they hold."""
        with self._lock:
            rules, self._rules = self._rules, ()
        for rule in rules:
            rule.remove()

    def take(self, record: RequestRecord) -> FaultRule | None:
        """Return the rule that applies to a request, and use one turn of it."""
        return next((rule for rule in self._rules if rule.take(record)), None)
