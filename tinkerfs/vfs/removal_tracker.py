"""Removal: what is hidden until its checkpoint is deleted, and who may remove nothing for now.

`rm -r` of a checkpoint unlinks its files and then removes its directory. Unlinking only hides, only
from the process group that unlinks, and only for a minute: the rmdir is what deletes, and no other
group comes to find an empty directory. A walk that goes on after a refusal would delete every
checkpoint that it comes to (measured with rm -rf, find -delete, rmtree(ignore_errors=True), perl,
busybox: 12 of 12), so a process group that met a refusal may remove nothing until it has left off
for a minute (0 of 12), and what it had hidden is shown again. Thread-safe.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from tinkerfs import errors
from tinkerfs.clock import Clock

#: How long what was unlinked stays hidden, and a refused process group is refused, seconds.
WINDOW_S = 60.0

DELETE_HINT = (
    "only checkpoints can be removed, each by its own folder: "
    "rm -r runs/<run_id>/checkpoints/<kind>/<name>"
)
HOW_TO_MOVE = (
    "a copy of a checkpoint directory has its links and small files, not its weights, so what"
    " copied it does not remove it (hint: tinkerfs get PATH DEST, then rm -r PATH as a command of"
    " its own)"
)


@dataclass(slots=True)
class _Tombstone:
    names: set[str] = field(default_factory=set)
    last: float = 0.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    hint: str
    at: float


class RemovalTracker:
    """Tombstones by directory and process group, refusals by process group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._tombstones: dict[Hashable, dict[int, _Tombstone]] = {}
        self._refused: dict[int, _Refusal] = {}
        self._hidden_until = 0.0
        #: How many times something was hidden.
        self.hide_count = 0

    @property
    def has_tombstones(self) -> bool:
        """Whether `hidden` is worth asking; takes no lock, which every lookup would wait for."""
        return bool(self._tombstones) and self._clock.monotonic() < self._hidden_until

    def is_hidden_in(self, key: Hashable) -> bool:
        """Return whether some group has hidden something in a directory; takes no lock."""
        return key in self._tombstones

    def hidden(self, key: Hashable, group: int) -> frozenset[str]:
        """Return the names that a process group has unlinked in a directory."""
        with self._lock:
            tombstones = self._tombstones.get(key)
            tombstone = None if tombstones is None else tombstones.get(group)
            if tombstone is None:
                return frozenset()
            if self._clock.monotonic() - tombstone.last >= WINDOW_S:
                self._show(key, group)
                return frozenset()
            return frozenset(tombstone.names)

    def hide(self, key: Hashable, name: str, group: int) -> None:
        """Unlink a generated file of a checkpoint's folder."""
        with self._lock:
            tombstone = self._tombstones.setdefault(key, {}).setdefault(group, _Tombstone())
            tombstone.names.add(name)
            tombstone.last = self._clock.monotonic()
            self._hidden_until = tombstone.last + WINDOW_S
            self.hide_count += 1

    def restore(self, key: Hashable, group: int | None = None) -> None:
        """Show everything again in a directory.

        Args:
            key: the directory.
            group: to which process group; None for all, once it is deleted.
        """
        with self._lock:
            if group is None:
                self._tombstones.pop(key, None)
            else:
                self._show(key, group)

    def check(self, group: int, path: str) -> None:
        """Let a process group remove something, unless it met a refusal within the last minute.

        Raises:
            OSError: EPERM.
        """
        with self._lock:
            now = self._clock.monotonic()
            refusal = self._refused.get(group)
            if refusal is None:
                return
            if now - refusal.at >= WINDOW_S:
                del self._refused[group]
                return
            self._refused[group] = _Refusal(refusal.hint, now)
        raise errors.not_permitted(
            path,
            "this process group was refused a removal less than a minute ago, "
            f"so nothing is removed for it until it leaves off; {refusal.hint}",
        )

    def deny(self, group: int, path: str, hint: str = DELETE_HINT) -> OSError:
        """Return the refusal of a removal; record its group, and show what that had hidden."""
        with self._lock:
            now = self._clock.monotonic()
            for other in [g for g, r in self._refused.items() if now - r.at >= WINDOW_S]:
                del self._refused[other]
            self._refused[group] = _Refusal(hint, now)
            for key in [key for key, groups in self._tombstones.items() if group in groups]:
                self._show(key, group)
        return errors.not_permitted(path, hint)

    def _show(self, key: Hashable, group: int) -> None:
        tombstones = self._tombstones.get(key, {})
        tombstones.pop(group, None)
        if not tombstones:
            self._tombstones.pop(key, None)
