"""Accesses to a file system that may hang, such as NFS without its server.

A system call on such a file system may wait for ever, and no signal but SIGKILL ends it. So each
access has a thread of its own, and its caller waits for a limited time. If no access has ended
within that time, the file system is set aside, and callers continue without it. One thread probes
it meanwhile, and ends the outage when its system call returns. Thread-safe.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tinkerfs import errors, operating_system
from tinkerfs.concurrency import run_in_thread
from tinkerfs.telemetry import Telemetry

T = TypeVar("T")

#: How long an access may take before the file system counts as hanging, seconds; less with a
#: shorter `--timeout`.
BOUND_S = 10.0

#: A file system is also set aside if an access takes this multiple of the bound.
_MAX_BOUNDS = 6

#: Minimum time for which a hanging file system is set aside, seconds.
_SET_ASIDE_S = 10.0


class BoundedAccess:
    """Runs the accesses to one directory.

    Args:
        directory: of the file system.
        telemetry: receives one error for each outage.
        bound_s: how long an access may take, seconds.
        set_aside_s: minimum length of an outage, seconds.
        monotonic: clock of the bound.
    """

    def __init__(
        self,
        directory: Path,
        telemetry: Telemetry,
        *,
        bound_s: float,
        set_aside_s: float = _SET_ASIDE_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._telemetry = telemetry
        self._bound_s = bound_s
        self._set_aside_s = set_aside_s
        self._monotonic = monotonic
        #: When the last access ended.
        self._ended_at = float("-inf")
        self._lock = threading.Lock()
        #: Done while the file system is set aside; replaced under _lock when the outage ends.
        self._outage: Future[None] = Future()

    @property
    def is_set_aside(self) -> bool:
        """Whether the file system hangs, as far as is known."""
        return self._outage.done()

    def run(
        self,
        work: Callable[[], T],
        *,
        extra_s: float = 0.0,
        on_late: Callable[[T], object] | None = None,
    ) -> T:
        """Return the result of `work`, or raise its error.

        Args:
            extra_s: how long the work may wait for other reasons than the file system, seconds.
            on_late: called with the result of work that its caller has not waited for.

        Raises:
            OSError: ETIMEDOUT if the file system hangs; or as `work`.
        """
        if self.is_set_aside:
            raise self._hanging()
        outage, began = self._outage, self._monotonic()
        future = self._start(work)
        _wait_for_any((future, outage), self._bound_s + extra_s)
        give_up_at = began + extra_s + _MAX_BOUNDS * self._bound_s
        while not (future.done() or outage.done()):
            quiet_until = max(began + extra_s, self._ended_at) + self._bound_s
            if self._monotonic() >= min(quiet_until, give_up_at):
                break
            _wait_for_any((future, outage), self._bound_s)
        if future.done():
            return future.result()
        if on_late is not None:
            future.add_done_callback(
                lambda late: None if late.exception() else on_late(late.result())
            )
        self._set_aside(outage)
        raise self._hanging()

    def finish(self, work: Callable[[], object]) -> None:
        """Run `work` even if the file system is set aside; then do not wait for it.

        Errors are ignored.
        """
        outage = self._outage
        future = self._start(work)
        if not outage.done():
            _wait_for_any((future, outage), self._bound_s)

    def _start(self, work: Callable[[], T]) -> "Future[T]":
        def run() -> T:
            try:
                return work()
            finally:
                self._ended_at = self._monotonic()

        return run_in_thread(run, f"shared cache {self._directory}")

    def _set_aside(self, outage: "Future[None]") -> None:
        with self._lock:
            if outage.done():
                return
            outage.set_result(None)
        self._telemetry.count("shared_cache_outages")
        self._telemetry.record_error(str(self._directory), "cache", self._hanging())
        run_in_thread(self._end_outage, f"probe of {self._directory}")

    def _end_outage(self) -> None:
        threading.Event().wait(self._set_aside_s)
        with suppress(OSError):  # it responds; what it lacks is found by the next access
            operating_system.revalidate_directory(self._directory)
        with self._lock:
            self._outage = Future()

    def _hanging(self) -> OSError:
        reason = f"no response within {self._bound_s:g} s; weights are read from the store"
        return errors.timed_out(str(self._directory), reason)


def _wait_for_any(futures: tuple[Future[Any], ...], timeout_s: float) -> None:
    wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
