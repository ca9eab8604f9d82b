"""Work on threads of its own, so that the thread that serves a file operation only ever waits.

Each piece of work has a daemon thread: a pool would let slow work (a hanging server, an archive
that takes minutes) hold back quick work, and its threads would be joined at exit. Starting a thread
costs well under 0.1 ms, an HTTP call some milliseconds at the least.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(work: Callable[[], T], name: str) -> "Future[T]":
    """Run `work` on a daemon thread; the future has its result, or its error."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  (it belongs to whoever waits)
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def run_concurrently(works: Iterable[Callable[[], T]], limit: int, name: str) -> "list[Future[T]]":
    """Run each of `works`, at most `limit` at a time, in their order.

    Returns:
        a future for each, in order, all of them done: a result, or what that piece of work raised.
    """
    flights = [(work, Future[T]()) for work in works]
    pending = iter(flights)
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                work, future = next(pending, (None, None))
            if work is None or future is None:
                return
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  (it belongs to whoever looks)
                future.set_exception(error)

    threads = [
        threading.Thread(target=run, name=name, daemon=True)
        for _ in range(min(limit, len(flights)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [future for _work, future in flights]
