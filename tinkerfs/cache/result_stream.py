"""Stream of the partial results of a load."""

import itertools
import threading
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from tinkerfs.context import RequestContext


class ResultStream:
    """Values with unique keys in the order of arrival. Thread-safe; one adder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[Hashable, Any] = {}  # single operations on it are atomic
        self._values: list[Any] = []  # append-only
        # Guarded by _lock; `_more` is resolved and replaced at each addition and at the end.
        self._more: Future[None] = Future()
        self._is_closed = False
        self._error: BaseException | None = None

    def add(self, items: Iterable[tuple[Hashable, Any]]) -> None:
        """Add (key, value) pairs; the first value of a key is the one that counts."""
        for key, value in items:
            if key not in self._by_key:
                self._by_key[key] = value
                self._values.append(value)
        self._notify()

    def close(self, outcome: "Future[Any]") -> None:
        """End the stream with the outcome of the load."""
        # Not the future itself: it refers to this stream, and the cycle would delay deallocation.
        self._notify(is_closed=True, error=outcome.exception())

    def _notify(self, *, is_closed: bool = False, error: BaseException | None = None) -> None:
        with self._lock:
            more, self._more = self._more, Future()
            self._is_closed, self._error = is_closed, error
        more.set_result(None)

    def find(self, key: Hashable) -> Any:
        """Return the value of a key, None if it has not arrived."""
        return self._by_key.get(key)

    def iterate(self, ctx: RequestContext) -> Iterator[Any]:
        """Yield every value as soon as it arrives.

        Raises:
            ApiError: the load failed; raised after all values that arrived before.
            OSError: EINTR if the caller was interrupted, ETIMEDOUT if no value arrived in time;
                `page_timeout_s` is the bound after the first value.
        """
        page_ctx = ctx if ctx.page_timeout_s is None else ctx.with_timeout(ctx.page_timeout_s)
        for index in itertools.count():
            while index >= len(self._values):
                with self._lock:
                    more, is_closed, error = self._more, self._is_closed, self._error
                if index < len(self._values):  # it arrived just before `more` was replaced
                    break
                if error is not None:
                    raise error
                if is_closed:
                    return
                (page_ctx if index else ctx).wait_for(more)
            yield self._values[index]
