"""Deletion guard: decides whether a process may remove or write a file.

`rm -r` of a checkpoint unlinks its files before it removes the directory. Here unlink() only hides
a file, for one minute and from the process group of the caller. Other groups still see the file.
rmdir() deletes the checkpoint.

A process group that tries to remove anything else gets EPERM for every removal until it has not
tried for one minute, and its hidden files are visible again. Otherwise `rm -rf`, `find -delete` and
similar tools would continue past the first error and delete every checkpoint. The same happens to a
group that has copied the checkpoint (`copy_tracker`).

An adapter that serves a readlink from its own cache calls `on_readlink`. Thread-safe.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from cachetools import TTLCache

from tinkerfs import errors
from tinkerfs.clock import Clock
from tinkerfs.config import Settings
from tinkerfs.context import Caller
from tinkerfs.operating_system import is_preview
from tinkerfs.vfs.copy_tracker import COPIED_FILES, COPIED_LINKS, CopyTracker
from tinkerfs.vfs.schema import ControlFile, Node, RemovalPolicy

#: A file is hidden for this time after the last unlink of its group in the directory. A group is
#: refused every removal for this time after its last attempt. Seconds.
_WINDOW_S: Final = 60.0

_FILES, _LINKS = frozenset(COPIED_FILES), frozenset(COPIED_LINKS)
#: The path of every checkpoint directory contains this; see `layout.py`.
_CHECKPOINTS = "/checkpoints/"

_DELETE_HINT = (
    "only checkpoints can be removed, each by its own directory"
    " (hint: rm -r runs/<run_id>/checkpoints/<kind>/<name>)"
)
_MOVE_HINT = (
    "a copy of a checkpoint directory has its links and small files, but not its weights, so the"
    " process group that copied it cannot remove it"
    " (hint: tinkerfs get PATH DEST, then rm -r PATH as a command of its own)"
)
_WRITTEN_OVER = (
    "this process group also writes other files of this checkpoint, as a copy of a whole directory"
    " does; nothing was changed (hint: write this file alone, with a command of its own)"
)


class DeletionGuard:
    """Checks removals and writes; it refuses with EPERM, or EROFS on a read-only mount."""

    def __init__(self, clock: Clock, settings: Settings) -> None:
        self._clock = clock
        self._settings = settings
        self._copies = CopyTracker(clock)
        self._lock = threading.Lock()
        # Guarded by _lock. Each value is dropped after _WINDOW_S.
        #: Hidden names by directory and process group.
        self._hidden: TTLCache[tuple[str, int], frozenset[str]] = TTLCache(
            math.inf, _WINDOW_S, clock.monotonic
        )
        #: Hints for the process groups that are refused every removal.
        self._refused: TTLCache[int, str] = TTLCache(math.inf, _WINDOW_S, clock.monotonic)
        #: Time after which no file is hidden, on the monotonic clock.
        self._hidden_until = 0.0
        #: Number of files that were hidden, which only increases.
        self.hide_count = 0

    # Hidden files.

    @property
    def has_hidden_files(self) -> bool:
        """Whether any file may be hidden; takes no lock, because every lookup checks it."""
        return bool(self._hidden_until) and self._clock.monotonic() < self._hidden_until

    def hidden(self, directory: str, group: int) -> frozenset[str]:
        """Return the names in a directory that are hidden from a process group."""
        with self._lock:
            names: frozenset[str] = self._hidden.get((directory, group), frozenset())
            return names

    def _hide(self, directory: str, name: str, group: int) -> None:
        with self._lock:
            names = self._hidden.get((directory, group), frozenset())
            self._hidden[directory, group] = names | {name}
            self._hidden_until = self._clock.monotonic() + _WINDOW_S
            self.hide_count += 1

    def _show(self, *, directory: str | None = None, group: int | None = None) -> None:
        """Make hidden files visible again; None stands for any directory or group."""
        with self._lock:
            for key in list(self._hidden):
                if directory in (None, key[0]) and group in (None, key[1]):
                    self._hidden.pop(key, None)
            if not self._hidden:
                self._hidden_until = 0.0

    # Reads. Only those of names in a checkpoint directory take more than a string comparison.

    def on_open(self, path: str, flags: int, caller: Callable[[], Caller]) -> None:
        """Record that a file is opened for reading."""
        directory, _, name = path.rpartition("/")
        if name in _FILES and _CHECKPOINTS in directory:
            if is_preview(flags) and not flags & os.O_NOFOLLOW:
                return  # GIO opens files like this to choose their icons
            reader = caller()
            self._copies.on_read(directory, name, reader)
            if self.has_hidden_files and self.hidden(directory, reader.pgid):
                self._copies.mark_copied(directory, reader.pgid)

    def on_readlink(self, path: str, caller: Callable[[], Caller]) -> None:
        """Record that a symbolic link is read."""
        directory, _, name = path.rpartition("/")
        if name in _LINKS and _CHECKPOINTS in directory:
            self._copies.on_read(directory, name, caller())

    def on_list(self, path: str, caller: Callable[[], Caller]) -> None:
        """Record that a directory is listed."""
        if _CHECKPOINTS in path and not self._copies.is_idle:
            self._copies.on_list(path, caller())

    # Removals.

    def check_removal(self, path: str, caller: Callable[[], Caller]) -> Caller:
        """Return the caller, unless its group was refused a removal within the last minute."""
        if self._settings.read_only:
            raise errors.read_only(path)
        remover = caller()
        with self._lock:
            hint = self._refused.get(remover.pgid)
            if hint is None:
                return remover
            self._refused[remover.pgid] = hint  # the minute starts again
        raise errors.not_permitted(
            path,
            "this process group was refused a removal less than a minute ago,"
            f" and is refused every removal until it stops trying; {hint}",
        )

    def _refuse(self, group: int, path: str, hint: str) -> OSError:
        """Refuse a group every removal, show its hidden files, and return the error."""
        with self._lock:
            self._refused[group] = hint
        self._show(group=group)
        return errors.not_permitted(path, hint)

    def unlink(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Hide a file of a checkpoint's directory from the group of the caller."""
        directory = node.parent
        assert directory is not None
        try:
            remover = self.check_removal(node.path, caller)
            if not directory.is_checkpoint:
                raise self._refuse(remover.pgid, node.path, _DELETE_HINT)
            self._check_copied(directory, node.path, remover)
        except PermissionError:
            # cp unlinks a link before it replaces it, and then writes the control files.
            self._record_refused_write(node, caller)
            raise
        self._hide(directory.path, node.spec.name, remover.pgid)

    def check_rmdir(self, directory: Node, caller: Caller) -> None:
        """Refuse the removal of a permanent directory, or of one that the group copied."""
        if directory.spec.removal is RemovalPolicy.NEVER:
            raise self._refuse(caller.pgid, directory.path, _DELETE_HINT)
        if directory.is_checkpoint and self.hidden(directory.path, caller.pgid):
            self._check_copied(directory, directory.path, caller)

    @contextmanager
    def deleting(self, directory: Node, caller: Caller) -> Iterator[None]:
        """Make hidden files visible again after a deletion, or after its failure."""
        try:
            yield
        except BaseException:
            self._show(directory=directory.path, group=caller.pgid)
            raise
        self._show(directory=directory.path)
        self._copies.forget(directory.path)

    def _check_copied(self, directory: Node, path: str, caller: Caller) -> None:
        if self._copies.has_copied(directory.path, caller):
            raise self._refuse(caller.pgid, path, _MOVE_HINT)

    # Writes.

    def check_writable(self, node: Node) -> None:
        """Refuse changes of files other than control files."""
        if self._settings.read_only:
            raise errors.read_only(node.path)
        if not isinstance(node.spec, ControlFile):
            raise errors.not_permitted(
                node.path, "only published, expires_at, export and refresh are writable"
            )

    def check_open_to_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Refuse opening files other than control files for writing."""
        try:
            self.check_writable(node)
        except OSError:
            self._record_refused_write(node, caller)
            raise

    def _record_refused_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        key = _checkpoint_key(node)
        if key is not None:
            name = node.path.rpartition("/")[2]
            self._copies.on_write_refused(key, name, caller().pgid)

    def check_control_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Refuse a write that is part of the copy of a whole directory."""
        key = _checkpoint_key(node)
        if key is not None and self._copies.is_written_over(key, caller().pgid):
            raise errors.not_permitted(node.path, _WRITTEN_OVER)

    def refuse_new(self, directory: Node, path: str, caller: Callable[[], Caller]) -> OSError:
        """Return the error for creating a name."""
        if directory.is_checkpoint:
            group = caller().pgid
            # mv and install unlink the file that they replace, so this is not a removal.
            self._show(directory=directory.path, group=group)
            name = path.rpartition("/")[2]
            self._copies.on_write_refused(directory.entity.key, name, group)
        return errors.not_permitted(path, "nothing can be created, renamed or linked here")


def _checkpoint_key(node: Node) -> object:
    """Return the key of the checkpoint that a file belongs to, or None.

    Files below `.content` count too, because a copy that follows links writes to their targets.
    """
    entity = node.entity
    return getattr(getattr(entity, "checkpoint", entity), "key", None)
