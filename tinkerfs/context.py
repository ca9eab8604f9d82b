"""Context of a file operation: deadline, cancellation and caller.

A thread that serves a FUSE request never sends HTTP requests itself: while a request is being
served, the kernel cannot interrupt or kill the calling process. The work runs in other threads.
The serving thread waits here and polls whether its caller was interrupted (libfuse's
`fuse_interrupted`, which works only in the thread that serves the request).
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec
from msgspec.structs import replace

from tinkerfs import errors, operating_system
from tinkerfs.validity import Expiry, SharedReads, Validity

T = TypeVar("T")

#: Interval at which a waiting thread polls for cancellation, seconds. Short enough that Ctrl-C
#: seems immediate, and long enough to cost no measurable CPU time.
CANCEL_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that started an operation.

    Attributes:
        pid: thread id as the kernel reports it; 0 if it is in another pid namespace.
        uid: user id of the process.
        pgid: process group; -1 - uid if the kernel does not report it, so that all callers of a
            user in another pid namespace form one group.
        process: process id; 0 if the kernel does not report it, and then the group counts as one
            process.
    """

    pid: int
    uid: int
    pgid: int
    process: int = 0

    def command(self) -> str:
        """Return the command name of the process, "?" if the process has exited."""
        return operating_system.command_of(self.pid)

    @classmethod
    def from_ids(cls, pid: int, uid: int) -> Self:
        """Return the caller for the ids that the kernel reports."""
        try:
            group = os.getpgid(pid) if pid > 0 else 0
        except OSError:
            group = 0
        if group <= 0:
            return cls(pid, uid, -1 - uid)
        return cls(pid, uid, group, pid if group == pid else operating_system.process_of(pid))


def _this_process() -> Caller:
    return Caller.from_ids(os.getpid(), os.getuid())


def _never() -> bool:
    return False


class RequestContext(msgspec.Struct, frozen=True):
    """Deadline, cancellation and caller of one file operation.

    It is passed explicitly to every function that may block. A blocked thread polls
    `is_cancelled`, because the kernel cannot interrupt a FUSE request that is being served.

    Attributes:
        timeout_s: bound on each wait of the operation, seconds; None waits without a bound.
        is_cancelled: whether to stop waiting; called in the thread that serves the operation.
        caller: returns the calling process; called in that thread, and only when needed.
        validity: records the dependencies of the result; None if the result is not cached.
        page_timeout_s: bound on each wait for the next page after the first one, seconds; None
            applies `timeout_s`.
        blocking: entered around each wait that is not immediate, in the thread that waits.
    """

    timeout_s: float | None = None
    is_cancelled: Callable[[], bool] = _never
    caller: Callable[[], Caller] = _this_process
    validity: Validity | None = None
    page_timeout_s: float | None = None
    blocking: Callable[[], AbstractContextManager[None]] = nullcontext

    def tracking(self, validity: Validity) -> "RequestContext":
        """Return a context that records dependencies in `validity`."""
        return RequestContext(
            self.timeout_s,
            self.is_cancelled,
            self.caller,
            validity,
            self.page_timeout_s,
            self.blocking,
        )

    def depends_on(self, expiry: Expiry) -> None:
        """Record that the result depends on a cached value."""
        if self.validity is not None:
            self.validity.add(expiry)

    def depends_on_all(self, validity: Validity) -> None:
        """Record that the result depends on another derived value."""
        if self.validity is not None:
            self.validity.add_all(validity)

    def mark_uncacheable(self) -> None:
        """Record that the result may change at any time."""
        if self.validity is not None:
            self.validity.mark_uncacheable()

    def with_timeout(self, timeout_s: float) -> "RequestContext":
        """Return a context with the shorter of `timeout_s` and the current timeout."""
        if self.timeout_s is not None and self.timeout_s <= timeout_s:
            return self
        return replace(self, timeout_s=timeout_s)

    def wait_for(self, future: "Future[T]") -> T:
        """Return the result of a future, or raise its error.

        The work behind the future continues if this wait ends early.

        Raises:
            OSError: EINTR if the caller was interrupted, ETIMEDOUT after `timeout_s`.
        """
        if future.done():
            return future.result()
        with self.blocking():
            return self._wait(future)

    def wait_until_done(self, future: "Future[Any]") -> None:
        """Wait for the end of the work behind a future, without its result or error.

        Raises:
            OSError: as `wait_for`.
        """
        done: Future[None] = Future()
        future.add_done_callback(lambda _future: done.set_result(None))
        self.wait_for(done)

    def _wait(self, future: "Future[T]") -> T:
        waited_s = 0.0
        while True:
            step_s = CANCEL_POLL_S
            if self.timeout_s is not None:
                step_s = min(step_s, max(self.timeout_s - waited_s, 0.0))
            try:
                return future.result(timeout=step_s)
            except TimeoutError:
                if future.done():  # a timeout of the work itself, not of this wait
                    return future.result()
            if self.is_cancelled():
                raise errors.interrupted()
            waited_s += step_s
            if self.timeout_s is not None and waited_s >= self.timeout_s:
                raise errors.timed_out(
                    "", f"no response within {self.timeout_s:g} s; the request is still in flight"
                )

    def sleep(self, seconds: float) -> None:
        """Sleep until the time has passed or the caller is interrupted.

        Raises:
            OSError: EINTR if the caller was interrupted.
        """
        never_done: Future[None] = Future()
        deadline = time.monotonic() + seconds
        with self.blocking():
            while (left_s := deadline - time.monotonic()) > 0:
                try:
                    never_done.result(timeout=min(CANCEL_POLL_S, left_s))
                except TimeoutError:
                    if self.is_cancelled():
                        raise errors.interrupted() from None


#: Context of operations that tinkerfs starts itself: no deadline, never cancelled.
BACKGROUND_CONTEXT = RequestContext()


class PartialResults(Protocol):
    """Values with unique keys, which only grow while work adds to them. Others may read."""

    def __len__(self) -> int:
        """Return the number of values that have arrived."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return a value by its position in the order of arrival."""
        ...

    def get(self, key: Any) -> Any:
        """Return the value of a key, None if it has not arrived."""
        ...


def _ignore(_results: PartialResults) -> None:
    pass


@dataclass(slots=True, eq=False)
class Priority:
    """Priority of a piece of work: demand work has a waiter, a prefetch has none yet.

    It is passed to the work, because demand requests take precedence over prefetches.

    Attributes:
        is_demand: whether a caller waits, or waited, for the work. It never becomes False again.
        on_promoted: called once when a prefetch becomes demand work, by the new waiter, which
            holds no lock.
        on_partial: called with the results so far, always the same collection, whenever it has
            grown.
        shared_reads: which responses of other hosts the work may use; none by default.
    """

    is_demand: bool
    on_promoted: Callable[[], None] | None = None
    on_partial: Callable[[PartialResults], None] = _ignore
    shared_reads: SharedReads = field(default_factory=SharedReads)

    def promote(self) -> None:
        """Turn a prefetch into demand work; without effect on demand work."""
        if not self.is_demand:
            self.is_demand = True
            if self.on_promoted is not None:
                self.on_promoted()


#: Priority of work that is started because a caller waits for it.
DEMAND: Final = Priority(is_demand=True)
