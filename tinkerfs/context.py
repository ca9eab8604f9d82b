"""What a file operation hands down with itself: how long it may wait, and who asked.

The thread that serves a FUSE request never does HTTP itself: the kernel lets nobody interrupt or
kill a process whose request is being served, so the work runs elsewhere and this thread waits here,
polling whether its caller was interrupted (libfuse's `fuse_interrupted`, which answers only in the
thread that serves the request).
"""

import os
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, TimeoutError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec.structs import replace

from tinkerfs import errors

__all__ = ["AWAITED", "IN_PROCESS", "Call", "Caller", "Interest", "Lease", "Term"]

T = TypeVar("T")

#: How often a waiting thread looks whether its caller was interrupted, seconds. Measured: Ctrl-C of
#: a waiting `cat` returns in 0.01 s at the median with this step, at no measurable load.
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Caller:
    """The process behind an operation.

    Attributes:
        pid: thread id as the kernel gives it; 0 where it is in another pid namespace.
        uid: its user.
        group: its process group; -1 - uid where the kernel does not give it, so that callers from
            another pid namespace are one group for each user.
        process: its process; 0 where the kernel does not give it: a group then counts as one.
    """

    pid: int
    uid: int
    group: int
    process: int = 0

    def command(self) -> str:
        """Return the caller's command name, "?" where it is gone."""
        try:
            with open(f"/proc/{self.pid}/comm", encoding="utf-8", errors="replace") as comm:
                return comm.read().strip() or "?"
        except OSError:
            return "?"

    @classmethod
    def from_ids(cls, pid: int, uid: int) -> Self:
        """Make the caller from what the kernel tells of it."""
        try:
            group = os.getpgid(pid) if pid > 0 else 0
        except OSError:
            group = 0
        if group <= 0:
            return cls(pid, uid, -1 - uid)
        return cls(pid, uid, group, pid if group == pid else _process_of(pid))


def _process_of(thread: int) -> int:
    """Return the process of a thread; the thread itself where proc(5) does not show it."""
    try:
        with open(f"/proc/{thread}/status", "rb") as status:
            return int(status.read().partition(b"\nTgid:")[2].split(None, 1)[0])
    except (OSError, IndexError, ValueError):
        return thread


@dataclass(slots=True, eq=False)
class Term:
    """How long a kept value holds: apart from it, so that what rests on one keeps not the other.

    Attributes:
        fresh_until: until when it holds, on the monotonic clock; -inf once there is another.
        used_at: when somebody got it last.
    """

    fresh_until: float
    used_at: float = float("-inf")


class Lease:
    """How long what an operation found out holds: as long as each value that it rests on.

    Whatever gives out a kept value while that is fresh adds it; whatever tells something that may
    be another thing a moment later (a stale value, one that has just been fetched, a name within an
    archive) makes the lease void. Used by one thread at a time until the operation is over, then
    only read.
    """

    __slots__ = ("_is_void", "_terms")

    def __init__(self) -> None:
        self._terms: tuple[Term, ...] = ()
        self._is_void = False

    def rest_on(self, term: Term) -> None:
        """Let it end when a kept value does."""
        if term not in self._terms:
            self._terms += (term,)

    def rest_on_all_of(self, other: "Lease") -> None:
        """Let it end when another one does."""
        for term in other._terms:
            self.rest_on(term)
        self._is_void = self._is_void or other._is_void

    def void(self) -> None:
        """Let it hold no longer than now."""
        self._is_void = True

    @property
    def is_void(self) -> bool:
        """Whether it never holds."""
        return self._is_void

    def extended(self) -> "Lease":
        """Return a lease that rests on the same so far, for what is found out from here on."""
        lease = Lease()
        lease._terms, lease._is_void = self._terms, self._is_void
        return lease

    def holds(self, now: float) -> bool:
        """Tell whether it holds at `now`, on the monotonic clock; if so its values are in use."""
        if self._is_void:
            return False
        for term in self._terms:
            if now >= term.fresh_until:
                return False
        for term in self._terms:
            term.used_at = now
        return True


def _this_process() -> Caller:
    return Caller.from_ids(os.getpid(), os.getuid())


def _never() -> bool:
    return False


class Call(msgspec.Struct, frozen=True):
    """How one operation may wait, and on whose behalf.

    Attributes:
        timeout_s: bound on each wait of this operation, seconds; None waits for ever.
        interrupted: tells, in the thread that serves the operation, whether to give up now.
        caller: tells who asked, in that thread; evaluated only where somebody wants to know.
        lease: what is told of how long the outcome holds; None where nobody keeps it.
        part_timeout_s: bound on each wait for more of what has begun to come, seconds; None for
            that of any other.
        waiting: entered around each wait that is more than a look, in the thread that waits.
    """

    timeout_s: float | None = None
    interrupted: Callable[[], bool] = _never
    caller: Callable[[], Caller] = _this_process
    lease: Lease | None = None
    part_timeout_s: float | None = None
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def leasing(self, lease: Lease) -> "Call":
        """Return the same call with a lease to be told."""
        return Call(
            self.timeout_s,
            self.interrupted,
            self.caller,
            lease,
            self.part_timeout_s,
            self.waiting,
        )

    def rests_on(self, term: Term) -> None:
        """Say that the outcome holds no longer than a kept value."""
        if self.lease is not None:
            self.lease.rest_on(term)

    def rests_on_all_of(self, lease: Lease) -> None:
        """Say that the outcome holds no longer than what was found out before."""
        if self.lease is not None:
            self.lease.rest_on_all_of(lease)

    def is_momentary(self) -> None:
        """Say that the outcome may be another a moment later."""
        if self.lease is not None:
            self.lease.void()

    def within(self, timeout_s: float) -> "Call":
        """Return the same call with a bound of `timeout_s` seconds, or the shorter that it had."""
        if self.timeout_s is not None and self.timeout_s <= timeout_s:
            return self
        return replace(self, timeout_s=timeout_s)

    def wait(self, future: "Future[T]") -> T:
        """Return the future's result, or raise its error.

        The work behind the future goes on when this wait ends early.

        Raises:
            OSError: EINTR when the caller was interrupted, ETIMEDOUT after `timeout_s`.
        """
        if future.done():
            return future.result()
        with self.waiting():
            return self._wait(future)

    def _wait(self, future: "Future[T]") -> T:
        waited_s = 0.0
        while True:
            step_s = POLL_S
            if self.timeout_s is not None:
                step_s = min(step_s, max(self.timeout_s - waited_s, 0.0))
            try:
                return future.result(timeout=step_s)
            except TimeoutError:
                if future.done():  # the work's own time-out, not ours
                    return future.result()
            if self.interrupted():
                raise errors.interrupted()
            waited_s += step_s
            if self.timeout_s is not None and waited_s >= self.timeout_s:
                raise errors.timed_out(
                    "", f"no answer within {self.timeout_s:g} s; it is still being waited for"
                )

    def pause(self, seconds: float) -> None:
        """Wait for some time.

        Raises:
            OSError: EINTR when the caller was interrupted.
        """
        nothing: Future[None] = Future()
        deadline = time.monotonic() + seconds
        with self.waiting():
            while (left_s := deadline - time.monotonic()) > 0:
                try:
                    nothing.result(timeout=min(POLL_S, left_s))
                except TimeoutError:
                    if self.interrupted():
                        raise errors.interrupted() from None


#: A call made from inside this process: nobody interrupts it.
IN_PROCESS = Call()


def _unheard(_items: Iterable[tuple[Hashable, Any]]) -> None:
    pass


@dataclass(slots=True, eq=False)
class Interest:
    """Whether somebody waits for a piece of work; handed down with it, as who waits goes first.

    Attributes:
        is_awaited: whether somebody waits, or did: what was begun as a guess is one no more.
        noticed: called once that becomes so, by whoever begins to wait, who holds no lock.
        came: told what comes of the work, by key and in order, before all of it has.
    """

    is_awaited: bool
    noticed: Callable[[], None] | None = None
    came: Callable[[Iterable[tuple[Hashable, Any]]], None] = _unheard

    def rise(self) -> None:
        """Take note that somebody waits from now on."""
        if not self.is_awaited:
            self.is_awaited = True
            if self.noticed is not None:
                self.noticed()


#: Of all work that is begun because somebody waits for it.
AWAITED: Final = Interest(is_awaited=True)
