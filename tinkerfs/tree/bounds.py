"""Sizes that are mere bounds, and when somebody was told one.

Who remembers such a size must forget it before they read (`Handle.told_at`). Thread-safe.
"""

import time

__all__ = ["Bounds"]

#: So many paths are remembered before those are forgotten that nobody can still know a bound of.
_MAX_TOLD = 4096
_TOLD_S = 10.0


class Bounds:
    """When a bound was told last, by path, on the monotonic clock."""

    def __init__(self) -> None:
        # Single operations on a dict are atomic.
        self._told_at: dict[str, float] = {}

    def told_at(self, path: str) -> float | None:
        """Return when one was told; None once a handle had the time to make up for it."""
        told_at = self._told_at.get(path)
        if told_at is not None and time.monotonic() - told_at > _TOLD_S:
            self._told_at.pop(path, None)
        return told_at

    def told(self, path: str) -> None:
        """Take note that one is told now."""
        now = time.monotonic()
        if len(self._told_at) >= _MAX_TOLD:
            for each, at in list(self._told_at.items()):
                if now - at > _TOLD_S:
                    self._told_at.pop(each, None)
        self._told_at[path] = now
