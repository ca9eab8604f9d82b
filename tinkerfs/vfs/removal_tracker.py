"""Tombstones of unlinked files, and denials of removals by process group.

`rm -r` of a checkpoint unlinks its files before it removes the directory. Here unlink() only hides
a file, for one minute and from the process group of the caller. Other groups still see the file.
rmdir() deletes the checkpoint.

A process group that tries to remove anything else gets EPERM for every removal until it has not
tried for one minute, and its tombstones are removed. Otherwise `rm -rf`, `find -delete` and similar
tools would continue past the first error and delete every checkpoint. Thread-safe.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from tinkerfs import errors
from tinkerfs.clock import Clock

#: Lifetime of a tombstone, and of the denial of a process group after its last attempt, seconds.
WINDOW_S = 60.0

DELETE_HINT = (
    "only checkpoints can be removed, each by its own directory"
    " (hint: rm -r runs/<run_id>/checkpoints/<kind>/<name>)"
)
MOVE_HINT = (
    "a copy of a checkpoint directory has its links and small files, but not its weights, so the"
    " process group that copied it cannot remove it"
    " (hint: tinkerfs get PATH DEST, then rm -r PATH as a command of its own)"
)


@dataclass(slots=True)
class _Tombstone:
    names: set[str] = field(default_factory=set)
    last: float = 0.0


@dataclass(frozen=True, slots=True)
class _Denial:
    hint: str
    at: float


class RemovalTracker:
    """Tombstones by directory and process group, denials by process group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by _lock.
        self._tombstones: dict[Hashable, dict[int, _Tombstone]] = {}
        self._denials: dict[int, _Denial] = {}
        self._hidden_until = 0.0
        #: Number of `hide` calls, which only increases.
        self.hide_count = 0

    @property
    def has_tombstones(self) -> bool:
        """Whether any file may be hidden; takes no lock, because every lookup checks it."""
        return bool(self._tombstones) and self._clock.monotonic() < self._hidden_until

    def is_hidden_in(self, key: Hashable) -> bool:
        """Return whether any group has hidden a file in a directory; takes no lock."""
        return key in self._tombstones

    def hidden(self, key: Hashable, group: int) -> frozenset[str]:
        """Return the names that a process group has unlinked in a directory."""
        with self._lock:
            tombstones = self._tombstones.get(key)
            tombstone = None if tombstones is None else tombstones.get(group)
            if tombstone is None:
                return frozenset()
            if self._clock.monotonic() - tombstone.last >= WINDOW_S:
                self._remove_tombstone(key, group)
                return frozenset()
            return frozenset(tombstone.names)

    def hide(self, key: Hashable, name: str, group: int) -> None:
        """Hide a file of a directory from a process group."""
        with self._lock:
            tombstone = self._tombstones.setdefault(key, {}).setdefault(group, _Tombstone())
            tombstone.names.add(name)
            tombstone.last = self._clock.monotonic()
            self._hidden_until = tombstone.last + WINDOW_S
            self.hide_count += 1

    def restore(self, key: Hashable, group: int | None = None) -> None:
        """Make all files of a directory visible again.

        Args:
            key: the directory.
            group: the process group for which they are visible; None for all groups.
        """
        with self._lock:
            if group is None:
                self._tombstones.pop(key, None)
            else:
                self._remove_tombstone(key, group)

    def check(self, group: int, path: str) -> None:
        """Raise EPERM if a removal of this group was denied within the last minute."""
        with self._lock:
            now = self._clock.monotonic()
            denial = self._denials.get(group)
            if denial is None:
                return
            if now - denial.at >= WINDOW_S:
                del self._denials[group]
                return
            self._denials[group] = _Denial(denial.hint, now)
        raise errors.not_permitted(
            path,
            "this process group was refused a removal less than a minute ago,"
            f" and is refused every removal until it stops trying; {denial.hint}",
        )

    def deny(self, group: int, path: str, hint: str = DELETE_HINT) -> OSError:
        """Record a denied removal, restore the group's files, and return the error."""
        with self._lock:
            now = self._clock.monotonic()
            for other in [g for g, r in self._denials.items() if now - r.at >= WINDOW_S]:
                del self._denials[other]
            self._denials[group] = _Denial(hint, now)
            for key in [key for key, groups in self._tombstones.items() if group in groups]:
                self._remove_tombstone(key, group)
        return errors.not_permitted(path, hint)

    def _remove_tombstone(self, key: Hashable, group: int) -> None:
        tombstones = self._tombstones.get(key, {})
        tombstones.pop(group, None)
        if not tombstones:
            self._tombstones.pop(key, None)
