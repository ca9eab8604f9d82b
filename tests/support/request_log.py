"""Log of the requests that a faulty server has received.

Tests count requests here to verify caching without access to the client's state.
"""

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from tinkerfs.demo.request import Request

_SECRET_HEADERS = frozenset({"x-api-key", "authorization", "cookie"})


@dataclass(slots=True, eq=False)
class RequestRecord(Request):
    """One request and its response, without the secrets in its headers.

    Attributes:
        start_s: Monotonic time of arrival.
        end_s: Monotonic time when the response was sent or aborted; None before.
        status: Status of the response; None if it has none.
        sent_bytes: Number of bytes of the response body that were written to the socket.
        is_range_hidden: Whether a fault makes the app ignore the Range header.
    """

    start_s: float = 0.0
    end_s: float | None = None
    status: int | None = None
    sent_bytes: int = 0
    is_range_hidden: bool = False

    @property
    def range(self) -> str | None:
        """The `Range` header, or None if there is none or a fault hides it from the app."""
        return None if self.is_range_hidden else self.headers.get("range")

    @property
    def had_key(self) -> bool:
        """Whether the request had an API key."""
        return self.api_key is not None

    @property
    def user_agent(self) -> str | None:
        """The `User-Agent` header, or None."""
        return self.headers.get("user-agent")

    def matches(self, endpoint: str | re.Pattern[str]) -> bool:
        """Return whether the request matches an endpoint.

        Args:
            endpoint: An endpoint; `api` or `store` for all endpoints of an origin; `*` for all; or
                a compiled pattern to search for in `<method> <path>`.
        """
        if isinstance(endpoint, re.Pattern):
            return endpoint.search(f"{self.method} {self.path}") is not None
        return endpoint in ("*", self.origin, self.endpoint)


class RequestLog:
    """The requests to both origins, in order of arrival. Thread-safe.

    Args:
        capacity: Maximum number of requests; the oldest are discarded.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._entries: deque[RequestRecord] = deque(maxlen=capacity)
        self._in_flight: Counter[str] = Counter()
        self._max_in_flight: Counter[str] = Counter()

    def entries(self, endpoint: str | re.Pattern[str] = "*") -> list[RequestRecord]:
        """Return the requests that match an endpoint, oldest first."""
        with self._changed:
            return [record for record in self._entries if record.matches(endpoint)]

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, endpoint: str | re.Pattern[str] | None = None) -> int:
        """Return the number of requests, in total or to one endpoint."""
        return len(self.entries("*" if endpoint is None else endpoint))

    def endpoints(self) -> Counter[str]:
        """Return the number of requests by endpoint."""
        return Counter(record.endpoint for record in self.entries())

    def clear(self) -> None:
        """Discard all requests and maxima; requests in flight are still counted."""
        with self._changed:
            self._entries.clear()
            self._max_in_flight = Counter(self._in_flight)

    def wait_for(
        self, count: int, endpoint: str | re.Pattern[str] = "*", timeout_s: float = 10.0
    ) -> list[RequestRecord]:
        """Wait until `count` requests to an endpoint have arrived; return them.

        Raises:
            TimeoutError: Fewer requests arrived within the timeout.
        """
        with self._changed:
            found: list[RequestRecord] = []

            def have_arrived() -> bool:
                found[:] = [record for record in self._entries if record.matches(endpoint)]
                return len(found) >= count

            if not self._changed.wait_for(have_arrived, timeout_s):
                msg = f"{len(found)} of {count} requests to {endpoint} arrived in {timeout_s} s"
                raise TimeoutError(msg)
            return found

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until no request is in flight.

        Raises:
            TimeoutError: Some requests are still in flight.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_flight["*"], timeout_s):
                msg = f"{self._in_flight['*']} requests in flight after {timeout_s} s"
                raise TimeoutError(msg)

    def in_flight(self, endpoint: str = "*") -> int:
        """Return the number of requests in flight to an endpoint, `*` for all."""
        with self._changed:
            return self._in_flight[endpoint]

    def max_in_flight(self, endpoint: str = "*") -> int:
        """Return the largest number of concurrent requests so far."""
        with self._changed:
            return self._max_in_flight[endpoint]

    def begin(self, record: RequestRecord) -> None:
        """Record that a request arrived."""
        record.start_s = time.monotonic()
        for name in _SECRET_HEADERS & record.headers.keys():
            del record.headers[name]
        with self._changed:
            self._entries.append(record)
            for key in ("*", record.endpoint):
                self._in_flight[key] += 1
                self._max_in_flight[key] = max(self._max_in_flight[key], self._in_flight[key])
            self._changed.notify_all()

    def end(self, record: RequestRecord) -> None:
        """Record that a request was completed or aborted."""
        with self._changed:
            record.end_s = time.monotonic()
            for key in ("*", record.endpoint):
                self._in_flight[key] -= 1
            self._changed.notify_all()
