"""The journal: every request that reached a demo server, and how it ended.

Tests assert caching by counting here, not by looking inside the client. Thread-safe throughout.
"""

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

_SECRET_HEADERS = frozenset({"x-api-key", "authorization", "cookie"})


@dataclass(slots=True, eq=False)
class Entry:
    """One request. What is known only at its end is None until then.

    Attributes:
        origin: `api` or `store`.
        method: In capitals.
        path: Decoded, with the prefix of the base URL.
        query: The last value of each key.
        endpoint: The template it matched, such as `GET training_runs/{run}`; `?` for none.
        headers: By lower-case name, without secrets.
        api_key: What came as `X-API-Key`, or as a bearer token.
        body: Of the request.
        start_s: When it arrived, on the monotonic clock.
        end_s: When its answer was sent, or given up.
        status: Of the answer; None when it got none.
        sent_bytes: How much of the answer's body was handed to the socket.
        is_range_hidden: Whether a fault made its range go unheeded.
    """

    origin: str
    method: str
    path: str
    query: dict[str, str]
    endpoint: str
    headers: dict[str, str]
    api_key: str | None = field(repr=False)
    body: bytes = b""
    start_s: float = 0.0
    end_s: float | None = None
    status: int | None = None
    sent_bytes: int = 0
    is_range_hidden: bool = False

    @property
    def had_key(self) -> bool:
        """Whether it carried a credential."""
        return self.api_key is not None

    @property
    def range(self) -> str | None:
        """Its `Range` header."""
        return self.headers.get("range")

    @property
    def user_agent(self) -> str | None:
        """Its `User-Agent` header."""
        return self.headers.get("user-agent")

    def matches(self, endpoint: str | re.Pattern[str]) -> bool:
        """Tell whether it is of an endpoint.

        Args:
            endpoint: The name of an endpoint; `api` or `store` for any of an origin; `*` for any;
                a compiled pattern is searched for in `<method> <path>`.
        """
        if isinstance(endpoint, re.Pattern):
            return endpoint.search(f"{self.method} {self.path}") is not None
        return endpoint in ("*", self.origin, self.endpoint)


class Journal:
    """The requests of both origins, in order of arrival.

    Args:
        capacity: How many are kept; the oldest go first.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self._changed = threading.Condition()
        # All below guarded by _changed.
        self._entries: deque[Entry] = deque(maxlen=capacity)
        self._in_flight: Counter[str] = Counter()
        self._max_in_flight: Counter[str] = Counter()

    def entries(self, endpoint: str | re.Pattern[str] = "*") -> list[Entry]:
        """Return the requests of an endpoint (see `Entry.matches`), oldest first."""
        with self._changed:
            return [entry for entry in self._entries if entry.matches(endpoint)]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, endpoint: str | re.Pattern[str] | None = None) -> int:
        """Return how many requests there were: of one endpoint, or in all."""
        return len(self.entries("*" if endpoint is None else endpoint))

    def endpoints(self) -> Counter[str]:
        """Return how many requests there were of each endpoint."""
        return Counter(entry.endpoint for entry in self.entries())

    def clear(self) -> None:
        """Forget what was, also the maxima; requests in flight stay counted as such."""
        with self._changed:
            self._entries.clear()
            self._max_in_flight = Counter(self._in_flight)

    def wait_for(
        self, count: int, endpoint: str | re.Pattern[str] = "*", timeout_s: float = 10.0
    ) -> list[Entry]:
        """Wait until this many requests of an endpoint have arrived, and return them.

        Raises:
            TimeoutError: They did not come in time.
        """
        with self._changed:
            found: list[Entry] = []

            def have_come() -> bool:
                found[:] = [entry for entry in self._entries if entry.matches(endpoint)]
                return len(found) >= count

            if not self._changed.wait_for(have_come, timeout_s):
                msg = f"{len(found)} of {count} requests of {endpoint} came in {timeout_s} s"
                raise TimeoutError(msg)
            return found

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until no request is in flight.

        Raises:
            TimeoutError: Some still are.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_flight["*"], timeout_s):
                msg = f"{self._in_flight['*']} requests in flight after {timeout_s} s"
                raise TimeoutError(msg)

    def in_flight(self, endpoint: str = "*") -> int:
        """Return how many requests of an endpoint (`*`: of any) have no answer yet."""
        with self._changed:
            return self._in_flight[endpoint]

    def max_in_flight(self, endpoint: str = "*") -> int:
        """Return the largest number of requests that were in flight at one time."""
        with self._changed:
            return self._max_in_flight[endpoint]

    def begin(self, entry: Entry) -> None:
        """Record that a request arrived."""
        entry.start_s = time.monotonic()
        for name in _SECRET_HEADERS & entry.headers.keys():
            del entry.headers[name]
        with self._changed:
            self._entries.append(entry)
            for key in ("*", entry.endpoint):
                self._in_flight[key] += 1
                self._max_in_flight[key] = max(self._max_in_flight[key], self._in_flight[key])
            self._changed.notify_all()

    def end(self, entry: Entry) -> None:
        """Record that a request is over, answered or not."""
        with self._changed:
            entry.end_s = time.monotonic()
            for key in ("*", entry.endpoint):
                self._in_flight[key] -= 1
            self._changed.notify_all()
