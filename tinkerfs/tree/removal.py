"""Removal: what is hidden until its checkpoint is deleted, and who may remove nothing for now.

`rm -r` of a checkpoint unlinks its files and then removes its folder. Unlinking only hides, and
only for a minute: the rmdir is what deletes. A walk that goes on after a refusal would delete every
checkpoint that it comes to (measured with rm -rf, find -delete, rmtree(ignore_errors=True), perl,
busybox: 12 of 12), so a process group that met a refusal may remove nothing until it has left off
for a minute (0 of 12). Thread-safe.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from tinkerfs import errors
from tinkerfs.clock import Clock

__all__ = ["HOW_TO_DELETE", "Removals"]

#: How long what was unlinked stays hidden, and a refused process group is refused, seconds.
WINDOW_S = 60.0

HOW_TO_DELETE = (
    "only checkpoints can be removed, each by its own folder: "
    "rm -r runs/<run_id>/checkpoints/<kind>/<name>"
)


@dataclass(slots=True)
class _Tombstone:
    names: set[str] = field(default_factory=set)
    last: float = 0.0


class Removals:
    """Tombstones by checkpoint, refusals by process group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._tombstones: dict[Hashable, _Tombstone] = {}
        self._refused: dict[int, float] = {}
        self._hidden_until = 0.0
        #: How many times something was hidden.
        self.hides = 0

    @property
    def is_anything_hidden(self) -> bool:
        """Whether `hidden` is worth asking; takes no lock, which every lookup would wait for."""
        return bool(self._tombstones) and self._clock.monotonic() < self._hidden_until

    def hidden(self, key: Hashable) -> frozenset[str]:
        """Return the names that are unlinked in a checkpoint's folder."""
        with self._lock:
            tombstone = self._tombstones.get(key)
            if tombstone is None:
                return frozenset()
            if self._clock.monotonic() - tombstone.last >= WINDOW_S:
                del self._tombstones[key]
                return frozenset()
            return frozenset(tombstone.names)

    def hide(self, key: Hashable, name: str) -> None:
        """Unlink a generated file of a checkpoint's folder."""
        with self._lock:
            tombstone = self._tombstones.setdefault(key, _Tombstone())
            tombstone.names.add(name)
            tombstone.last = self._clock.monotonic()
            self._hidden_until = tombstone.last + WINDOW_S
            self.hides += 1

    def restore(self, key: Hashable) -> None:
        """Show everything again: the delete failed, or is done."""
        with self._lock:
            self._tombstones.pop(key, None)

    def check(self, group: int, path: str) -> None:
        """Let a process group remove something, unless it met a refusal within the last minute.

        Raises:
            OSError: EPERM.
        """
        with self._lock:
            now = self._clock.monotonic()
            refused = self._refused.get(group)
            if refused is None:
                return
            if now - refused >= WINDOW_S:
                del self._refused[group]
                return
            self._refused[group] = now
        raise errors.not_permitted(
            path,
            "this process group was refused a removal less than a minute ago, "
            f"so nothing is removed for it until it leaves off; {HOW_TO_DELETE}",
        )

    def refuse(self, group: int, path: str) -> OSError:
        """Return the refusal of something that cannot be removed, and remember who met it."""
        with self._lock:
            now = self._clock.monotonic()
            for other in [g for g, at in self._refused.items() if now - at >= WINDOW_S]:
                del self._refused[other]
            self._refused[group] = now
        return errors.not_permitted(path, HOW_TO_DELETE)
