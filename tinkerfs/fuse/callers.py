"""Cache of calling processes, because looking up a caller in /proc takes long."""

import time
from collections.abc import Callable
from typing import Final

from tinkerfs.context import Caller

#: Short, because a shell moves a new process to its process group before the program starts.
_LIFETIME_S: Final = 1.0
#: Maximum number of callers; all are evicted when it is exceeded.
_MAX_CALLERS: Final = 1024


class Callers:
    """Calling processes by thread id, cached for one second. Thread-safe.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # Single operations on a dict are atomic; callers are frozen.
        self._callers: dict[int, tuple[Caller, float]] = {}

    def get(self, pid: int, uid: int) -> Caller:
        """Return the caller with a thread id and a user id as the kernel reports them."""
        now = self._monotonic()
        cached = self._callers.get(pid)
        if cached is not None and now - cached[1] < _LIFETIME_S and cached[0].uid == uid:
            return cached[0]
        caller = Caller.from_ids(pid, uid)
        if len(self._callers) >= _MAX_CALLERS:
            self._callers.clear()
        self._callers[pid] = (caller, now)
        return caller
