"""The fault plan: what shall go wrong, where, and how often.

    server.faults.add("GET training_runs", status=503, times=2, headers={"Retry-After": "0"})
    rule = server.faults.add("GET archive", hang=True, times=None)
    rule.wait_for(64); ...; rule.release()

A request is subject to the first rule that matches and has turns left. Thread-safe throughout.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tinkerfs.demo.request_log import Entry

_POLL_S = 0.1


class Rule:
    """One fault. Made by `FaultPlan.add`, which tells what the arguments mean."""

    def __init__(
        self,
        endpoint: str | re.Pattern[str],
        *,
        times: int | None = 1,
        after: int = 0,
        when: Callable[[Entry], bool] | None = None,
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
        # What is held waits for the event, so that an arrival does not wake all that came before.
        self._released = threading.Event()
        self._changed = threading.Condition()
        # All below guarded by _changed.
        self._seen = 0
        self._applied = 0
        self._waiting = 0
        self._is_removed = False

    @property
    def replaces_answer(self) -> bool:
        """Whether the answer is the rule's own: the request has no effect on the account."""
        own = (self.status, self.body, self.redirect_to)
        return self.html or any(value is not None for value in own)

    @property
    def applied(self) -> int:
        """How many requests it was applied to."""
        return self._applied

    @property
    def waiting(self) -> int:
        """How many requests are held by it now."""
        return self._waiting

    def wait_for(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until this many requests are held by it at one time.

        Raises:
            TimeoutError: They did not come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting >= count, timeout_s):
                msg = f"{self._waiting} of {count} requests were held after {timeout_s} s"
                raise TimeoutError(msg)

    def release(self) -> None:
        """Let go of what it holds, now and from now on."""
        self._released.set()

    def remove(self) -> None:
        """Let go of what it holds, and apply to no further request."""
        self._is_removed = True
        self.release()

    def take(self, entry: Entry) -> bool:
        """Use up a turn for a request, if it matches and one is left."""
        if not entry.matches(self.endpoint) or (self.when is not None and not self.when(entry)):
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
        """Hold the calling thread until released.

        Args:
            is_over: Asked now and then; True ends the wait, as the client is gone or the server
                closes.

        Returns:
            Whether it was released.
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
    """The rules of one server, in the order they were added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: tuple[Rule, ...] = ()  # replaced, never changed; guarded by _lock

    def add(self, endpoint: str | re.Pattern[str], **effects: Any) -> Rule:
        """Add a rule.

        Args:
            endpoint: Which requests: a name as in the journal (`GET training_runs`), `api`,
                `store`, `*`, or a pattern for `<method> <path>`.
            **effects: When it applies:

                - `times`: to how many requests (1); None for all.
                - `after`: how many matching ones go free before (0).
                - `when`: a function of the journal's `Entry`, for anything else.

                Before there is an answer, in this order:

                - `call`: a function called first, to change the account between two pages, say.
                - `latency_s`: a delay.
                - `hang`: held until `release()`, and then answered as if nothing had been.
                - `hold_until`: held until so many are held at once (a barrier).
                - `refuse`: the connection is closed without an answer. `reset`: by RST.

                Another answer:

                - `status`, `body` (JSON unless bytes or text), `headers`; `redirect_to`: a URL
                  (302 without a `status`); `html`: a page as proxies send (502 without one).

                The true answer, spoilt:

                - `headers` alone: set on it; None removes one.
                - `half_json`: its first half, with a length that agrees.
                - `edit`: a function from its JSON to other JSON.
                - `total_count`: a number, or a function of the true one. `cursor`: `null` or
                  `missing`. `page_max`: at most so many records, whatever the cursor says.
                - `cut_after_bytes`: of the body, then the connection closes.
                - `stall_after_bytes`: then held until `release()`. `bytes_per_s`: sent slowly.
                - `ignore_range`: as if no Range had been asked. `flip_byte`: the byte at this
                  offset of the body as sent is another one.
        """
        rule = Rule(endpoint, **effects)
        with self._lock:
            self._rules = (*self._rules, rule)
        return rule

    def clear(self) -> None:
        """Remove all rules; what they held goes on."""
        with self._lock:
            rules, self._rules = self._rules, ()
        for rule in rules:
            rule.remove()

    def take(self, entry: Entry) -> Rule | None:
        """Return the rule that applies to a request, using up one turn of it."""
        return next((rule for rule in self._rules if rule.take(entry)), None)


def pause(seconds: float, is_over: Callable[[], bool]) -> bool:
    """Wait, and return whether the time passed before `is_over`."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if is_over():
            return False
        time.sleep(min(left, _POLL_S))
    return True
