"""Daemon threads for blocking work, and executions that concurrent callers share.

A thread that serves a file operation only waits for them, because it must stay interruptible. Each
piece of work has its own thread. A pool would let slow work (a hanging server, an archive
build that takes minutes) delay quick work, and its threads would be joined at exit. Starting a
thread is much faster than an HTTP request.

A thread inherits the context variables of the thread that started it.
"""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
F = TypeVar("F", bound="Future[Any]")


def run_in_thread(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` in a daemon thread, and return a future of its result or error."""
    future: Future[T] = Future()
    _start_thread(work, name, future)
    return future


def _start_thread(work: Callable[[], T], name: str, future: "Future[T]") -> None:
    """Run `work` in a daemon thread, and resolve `future` with its result or error."""
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  (raised to the waiter)
            future.set_exception(error)
        else:
            future.set_result(result)

    _start_daemon(run, name)


def _start_daemon(run: Callable[[], None], name: str) -> None:
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name=name, daemon=True).start()


class SingleFlight(Generic[K, F]):
    """One execution in flight per key, shared by all callers. Thread-safe.

    An execution ends in a fixed order: the work returns, the key becomes free, the waiters wake.
    So a waiter that tries again after a failure starts a new execution. A caller that looks into
    its cache and calls `run` under one lock, which the work takes to fill that cache, finds either
    the cached result or the execution. No lock is held while work runs or waiters wake.

    `F` is `Future`, or a subclass with what callers need to know about an execution.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: dict[K, F] = {}  # guarded by _lock

    def get(self, key: K) -> F | None:
        """Return the execution in flight, None if there is none."""
        with self._lock:
            return self._in_flight.get(key)

    def run(self, key: K, work: Callable[[], Any], name: str, future: F) -> F:
        """Return the execution in flight, or start `work` in a thread, which resolves `future`.

        Raises:
            RuntimeError: no thread can be started.
        """
        with self._lock:
            current = self._in_flight.get(key)
            if current is not None:
                return current

            def run() -> Any:
                try:
                    return work()
                finally:
                    self._end(key, future)

            _start_thread(run, name, future)  # its thread waits for the lock before it ends
            self._in_flight[key] = future
            return future

    def forget(self, key: K) -> None:
        """Let the next `run` start a new execution; the one in flight continues."""
        with self._lock:
            self._in_flight.pop(key, None)

    def forget_all(self) -> None:
        """Forget every execution in flight."""
        with self._lock:
            self._in_flight.clear()

    def in_flight(self) -> list[F]:
        """Return all executions in flight that are not forgotten."""
        with self._lock:
            return list(self._in_flight.values())

    def _end(self, key: K, future: F) -> None:
        with self._lock:
            if self._in_flight.get(key) is future:
                del self._in_flight[key]


def run_concurrently(works: Iterable[Callable[[], T]], limit: int, name: str) -> "list[Future[T]]":
    """Run `works` in order, at most `limit` at a time, and wait for all.

    Returns:
        a future for each, in order, all of them done with a result or an error.
    """
    futures = list(_start_in_order(works, limit, name))
    wait(futures)
    return futures


def results_in_order(
    works: Iterable[Callable[[], T]], limit: int, name: str, max_ahead: int
) -> Iterator[T]:
    """Run `works` in order, at most `limit` at a time, and yield each result.

    At most `max_ahead` works are started before the result of the first of them is yielded. So a
    slow caller does not let results pile up.

    Raises:
        Exception: the error of a work, in its place.
    """
    futures: deque[Future[T]] = deque()
    for future in _start_in_order(works, limit, name):
        futures.append(future)
        if len(futures) == max_ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _start_in_order(
    works: Iterable[Callable[[], T]], limit: int, name: str
) -> "Iterator[Future[T]]":
    """Start one more of `works` at each step, at most `limit` at a time; yield its future."""
    queue: SimpleQueue[tuple[Callable[[], T], Future[T]] | None] = SimpleQueue()

    def run() -> None:
        while (task := queue.get()) is not None:
            work, future = task
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  (raised to the waiter)
                future.set_exception(error)
            del task, work, future  # a result would be kept while the thread waits

    threads = 0
    try:
        for work in works:
            future: Future[T] = Future()
            queue.put((work, future))
            if threads < limit:
                threads += 1
                _start_daemon(run, name)
            yield future
    finally:
        for _ in range(threads):
            queue.put(None)
