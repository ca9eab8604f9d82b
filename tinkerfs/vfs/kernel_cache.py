"""Sizes that are upper bounds, and when a process was last given one.

Whoever caches such a size must forget it before it is read by (`Handle.told_at`). Thread-safe.
"""

import time
from collections.abc import Callable

#: Maximum number of paths; those whose bound no kernel can cache any more are removed beyond it.
_MAX_TOLD = 4096
_TOLD_S = 10.0

#: The kernel caches a size for 1 s, from up to 1 s after the reply was made. An exact size that it
#: gets later replaces the bound for good; an earlier one may be overtaken by a reply with a bound.
SETTLED_S = 2.05


class SizeHintTracker:
    """When an upper bound was last given out, by path.

    Args:
        monotonic: the clock, seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # Single operations on a dict are atomic.
        self._told_at: dict[str, float] = {}

    def reported_at(self, path: str) -> float | None:
        """Return when one was told; None once a handle had the time to make up for it."""
        told_at = self._told_at.get(path)
        if told_at is not None and self._monotonic() - told_at > _TOLD_S:
            self._told_at.pop(path, None)
        return told_at

    def record(self, path: str) -> None:
        """Take note that one is told now."""
        now = self._monotonic()
        if len(self._told_at) >= _MAX_TOLD:
            for each, at in list(self._told_at.items()):
                if now - at > _TOLD_S:
                    self._told_at.pop(each, None)
        self._told_at[path] = now

    def on_exact(self, path: str) -> None:
        """Record that the exact size is given out now, so that the next handle may be mapped."""
        told_at = self._told_at.get(path)
        if told_at is not None and self._monotonic() - told_at >= SETTLED_S:
            self._told_at.pop(path, None)
