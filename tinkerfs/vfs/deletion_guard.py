"""Deletion guard: decides whether a process may remove or write a file.

It combines the tombstones and denials of `removal_tracker` with the copies of `copy_tracker`. An
adapter that serves a readlink from its own cache calls `on_readlink`. Thread-safe.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinkerfs import errors
from tinkerfs.clock import Clock
from tinkerfs.config import Settings
from tinkerfs.context import Caller
from tinkerfs.vfs.copy_tracker import COPIED_FILES, COPIED_LINKS, CopyTracker
from tinkerfs.vfs.removal_tracker import MOVE_HINT, RemovalTracker
from tinkerfs.vfs.resolver import is_checkpoint
from tinkerfs.vfs.schema import ControlFile, Node, RemovalPolicy

_FILES, _LINKS = frozenset(COPIED_FILES), frozenset(COPIED_LINKS)
#: The path of every checkpoint directory contains this; see `layout.py`.
_CHECKPOINTS = "/checkpoints/"

_WRITTEN_OVER = (
    "this process group also writes other files of this checkpoint, as a copy of a whole directory"
    " does; nothing was changed (hint: write this file alone, with a command of its own)"
)


class DeletionGuard:
    """Checks removals and writes; a denial is EPERM, or EROFS on a read-only mount."""

    def __init__(self, clock: Clock, settings: Settings) -> None:
        self.removals = RemovalTracker(clock)
        self._copies = CopyTracker(clock)
        self._settings = settings

    # Reads. Only those of names in a checkpoint directory take more than a string comparison.

    def on_open(self, path: str, flags: int, caller: Callable[[], Caller]) -> None:
        """Record that a file is opened for reading."""
        directory, _, name = path.rpartition("/")
        if name in _FILES and _CHECKPOINTS in directory:
            if flags & (os.O_NOATIME | os.O_NOFOLLOW) == os.O_NOATIME:
                return  # GIO opens files like this to choose their icons
            reader = caller()
            self._copies.on_read(directory, name, reader)
            if self.removals.has_tombstones and self.removals.hidden(directory, reader.pgid):
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
        """Return the caller, unless its group was recently denied a removal."""
        if self._settings.read_only:
            raise errors.read_only(path)
        remover = caller()
        self.removals.check(remover.pgid, path)
        return remover

    def unlink(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Hide a file of a checkpoint's directory from the group of the caller."""
        directory = node.parent
        assert directory is not None
        try:
            remover = self.check_removal(node.path, caller)
            if not is_checkpoint(directory):
                raise self.removals.deny(remover.pgid, node.path)
            self._check_copied(directory, node.path, remover)
        except PermissionError:
            # cp unlinks a link before it replaces it, and then writes the control files.
            self._record_denied_write(node, caller)
            raise
        self.removals.hide(directory.path, node.spec.name, remover.pgid)

    def check_rmdir(self, directory: Node, caller: Caller) -> None:
        """Deny the removal of a permanent directory, or of one that the group copied."""
        if directory.spec.removal is RemovalPolicy.NEVER:
            raise self.removals.deny(caller.pgid, directory.path)
        if is_checkpoint(directory) and self.removals.hidden(directory.path, caller.pgid):
            self._check_copied(directory, directory.path, caller)

    @contextmanager
    def deleting(self, directory: Node, caller: Caller) -> Iterator[None]:
        """Make hidden files visible again after a deletion, or after its failure."""
        try:
            yield
        except BaseException:
            self.removals.restore(directory.path, caller.pgid)
            raise
        self.removals.restore(directory.path)
        self._copies.forget(directory.path)

    def _check_copied(self, directory: Node, path: str, caller: Caller) -> None:
        if self._copies.has_copied(directory.path, caller):
            raise self.removals.deny(caller.pgid, path, MOVE_HINT)

    # Writes.

    def check_writable(self, node: Node) -> None:
        """Deny changes of files other than control files."""
        if self._settings.read_only:
            raise errors.read_only(node.path)
        if not isinstance(node.spec, ControlFile):
            raise errors.not_permitted(
                node.path, "only published, expires_at, export and refresh are writable"
            )

    def check_open_to_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Deny opening files other than control files for writing."""
        try:
            self.check_writable(node)
        except OSError:
            self._record_denied_write(node, caller)
            raise

    def _record_denied_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        key = _checkpoint_key(node)
        if key is not None:
            name = node.path.rpartition("/")[2]
            self._copies.on_write_refused(key, name, caller().pgid)

    def check_control_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Deny a write that is part of the copy of a whole directory."""
        key = _checkpoint_key(node)
        if key is not None and self._copies.is_written_over(key, caller().pgid):
            raise errors.not_permitted(node.path, _WRITTEN_OVER)

    def refuse_new(self, directory: Node, path: str, caller: Callable[[], Caller]) -> OSError:
        """Return the error for creating a name."""
        if is_checkpoint(directory):
            group = caller().pgid
            # mv and install unlink the file that they replace, so this is not a removal.
            self.removals.restore(directory.path, group)
            name = path.rpartition("/")[2]
            self._copies.on_write_refused(directory.entity.key, name, group)
        return errors.not_permitted(path, "nothing can be created, renamed or linked here")


def _checkpoint_key(node: Node) -> object:
    """Return the key of the checkpoint that a file belongs to, or None.

    Files below `.content` count too, because a copy that follows links writes to their targets.
    """
    entity = node.entity
    return getattr(getattr(entity, "checkpoint", entity), "key", None)
