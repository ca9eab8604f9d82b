"""Daemon threads for blocking work.

A thread that serves a file operation only waits for them, because it must stay interruptible. Each
piece of work has its own thread. A pool would let slow work (a hanging server, an archive
build that takes minutes) delay quick work, and its threads would be joined at exit. Starting a
thread is much faster than an HTTP request.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` in a daemon thread, and return a future of its result or error."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  (raised to the waiter)
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def run_concurrently(works: Iterable[Callable[[], T]], limit: int, name: str) -> "list[Future[T]]":
    """Run `works` in order, at most `limit` at a time, and wait for all.

    Returns:
        a future for each, in order, all of them done with a result or an error.
    """
    tasks = [(work, Future[T]()) for work in works]
    pending = iter(tasks)
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                work, future = next(pending, (None, None))
            if work is None or future is None:
                return
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  (raised to the caller)
                future.set_exception(error)

    threads = [
        threading.Thread(target=run, name=name, daemon=True) for _ in range(min(limit, len(tasks)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [future for _work, future in tasks]
