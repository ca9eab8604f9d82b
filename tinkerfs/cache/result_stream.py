"""Stream of the partial results of a load."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from tinkerfs.context import PartialResults, RequestContext

#: A load with that many partial results takes long. Readers need not wait for its end.
LONG_RESULTS = 10_000


class _NoResults:
    """The results before the first page."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)

    def get(self, _key: Any) -> Any:
        return None


class ResultStream:
    """Values with unique keys in the order of arrival. Thread-safe; one adder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: PartialResults = _NoResults()
        #: Resolved when the load has ended, or has `LONG_RESULTS`.
        self.is_long_or_ended: Future[None] = Future()
        # Guarded by _lock; `_more` is resolved and replaced at each addition and at the end.
        self._more: Future[None] = Future()
        self._is_closed = False
        self._error: BaseException | None = None

    def show(self, results: PartialResults) -> None:
        """Yield the values of a collection, the same at each call, which has grown."""
        self._results = results
        self._notify()
        if len(results) >= LONG_RESULTS:
            self._resolve()

    def close(self, outcome: "Future[Any]") -> None:
        """End the stream with the outcome of the load."""
        # Not the future itself: it refers to this stream, and the cycle would delay deallocation.
        self._notify(is_closed=True, error=outcome.exception())
        self._resolve()

    def _resolve(self) -> None:
        if not self.is_long_or_ended.done():
            self.is_long_or_ended.set_result(None)

    def _notify(self, *, is_closed: bool = False, error: BaseException | None = None) -> None:
        with self._lock:
            more, self._more = self._more, Future()
            self._is_closed, self._error = is_closed, error
        more.set_result(None)

    def find(self, key: Any) -> Any:
        """Return the value of a key, None if it has not arrived."""
        return self._results.get(key)

    def iterate(self, ctx: RequestContext) -> Iterator[Any]:
        """Yield every value as soon as it arrives.

        Raises:
            ApiError: the load failed; raised after all values that arrived before.
            OSError: EINTR if the caller was interrupted, ETIMEDOUT if no value arrived in time;
                `page_timeout_s` is the bound after the first value.
        """
        page_ctx = ctx if ctx.page_timeout_s is None else ctx.with_timeout(ctx.page_timeout_s)
        for index in itertools.count():
            while index >= len(self._results):
                with self._lock:
                    more, is_closed, error = self._more, self._is_closed, self._error
                if index < len(self._results):  # it arrived just before `more` was replaced
                    break
                if error is not None:
                    raise error
                if is_closed:
                    return
                (page_ctx if index else ctx).wait_for(more)
            yield self._results[index]
