"""Parts: what a load has brought so far, for who need not wait for all of it."""

import itertools
import threading
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from tinkerfs.context import RequestContext


class ResultStream:
    """Values by key, in the order they came, each key once. Thread-safe; one thread adds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[Hashable, Any] = {}  # single operations on it are atomic
        self._values: list[Any] = []  # only ever longer
        # Guarded by _lock; `_more` is done, and replaced, at each addition and at the end.
        self._more: Future[None] = Future()
        self._is_over = False
        self._error: BaseException | None = None

    def add(self, items: Iterable[tuple[Hashable, Any]]) -> None:
        """Add what has just come; of two values with the same key the first counts."""
        for key, value in items:
            if key not in self._by_key:
                self._by_key[key] = value
                self._values.append(value)
        self._tell()

    def close(self, outcome: "Future[Any]") -> None:
        """Take note that nothing more will come: the load is done."""
        # Not the future itself, which knows of this one: what it holds would stay for a while.
        self._tell(is_over=True, error=outcome.exception())

    def _tell(self, *, is_over: bool = False, error: BaseException | None = None) -> None:
        with self._lock:
            more, self._more = self._more, Future()
            self._is_over, self._error = is_over, error
        more.set_result(None)

    def find(self, key: Hashable) -> Any:
        """Return the value of a key, None where none has come."""
        return self._by_key.get(key)

    def iterate(self, ctx: RequestContext) -> Iterator[Any]:
        """Yield every value, each as soon as it has come.

        Raises:
            ApiError: what the load raised, after all that came before it.
            OSError: EINTR when the caller was interrupted, ETIMEDOUT when nothing more came within
                the call's bound: `part_timeout_s` once the first has come.
        """
        later = ctx if ctx.page_timeout_s is None else ctx.with_timeout(ctx.page_timeout_s)
        for index in itertools.count():
            while index >= len(self._values):
                with self._lock:
                    more, is_over, error = self._more, self._is_over, self._error
                if index < len(self._values):  # it came just before `more` was another
                    break
                if error is not None:
                    raise error
                if is_over:
                    return
                (later if index else ctx).wait_for(more)
            yield self._values[index]
