"""Deletion guard: decides whether a process may remove or change what it asks to.

It joins what was hidden and refused (`removal`) with what each group copied (`copy_tracker`). An
adapter that opens a file or reads a link from its own cache calls `on_open` and `on_readlink`.
Thread-safe.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinkerfs import errors
from tinkerfs.call import Caller
from tinkerfs.clock import Clock
from tinkerfs.settings import Settings
from tinkerfs.tree.copy_tracker import COPIED_FILES, COPIED_LINKS, CopyTracker
from tinkerfs.tree.nodes import Node, is_checkpoint
from tinkerfs.tree.removal import HOW_TO_MOVE, Removals
from tinkerfs.tree.rows import Control, Removal

__all__ = ["DeletionGuard"]

_FILES, _LINKS = frozenset(COPIED_FILES), frozenset(COPIED_LINKS)
#: All checkpoint directories stand below one of this name; see `layout.py`.
_ABOVE = "/checkpoints/"

_WRITTEN_OVER = (
    "this process group also writes other names of this checkpoint, as a copy of a whole directory"
    " does; nothing was changed (hint: write this file by itself, from a command of its own)"
)


class DeletionGuard:
    """Decisions on removals and writes; every refusal is EPERM, or EROFS on a read-only mount."""

    def __init__(self, clock: Clock, settings: Settings) -> None:
        self.removals = Removals(clock)
        self._copies = CopyTracker(clock)
        self._settings = settings

    # Reads, of which only those of a checkpoint directory's own names cost more than a look.

    def on_open(self, path: str, flags: int, caller: Callable[[], Caller]) -> None:
        """Record that a file is opened to be read."""
        directory, _, name = path.rpartition("/")
        if name in _FILES and _ABOVE in directory:
            if flags & (os.O_NOATIME | os.O_NOFOLLOW) == os.O_NOATIME:
                return  # GIO opens files so to choose their icons
            reader = caller()
            self._copies.on_read(directory, name, reader)
            if self.removals.is_anything_hidden and self.removals.hidden(directory, reader.group):
                self._copies.mark_copied(directory, reader.group)

    def on_readlink(self, path: str, caller: Callable[[], Caller]) -> None:
        """Record that a symbolic link is read."""
        directory, _, name = path.rpartition("/")
        if name in _LINKS and _ABOVE in directory:
            self._copies.on_read(directory, name, caller())

    def on_list(self, path: str, caller: Callable[[], Caller]) -> None:
        """Record that a directory is listed."""
        if _ABOVE in path and not self._copies.is_idle:
            self._copies.on_list(path, caller())

    # Removals.

    def check_removal(self, path: str, caller: Callable[[], Caller]) -> Caller:
        """Return the caller that removes something, unless its group was refused that lately."""
        if self._settings.read_only:
            raise errors.read_only(path)
        remover = caller()
        self.removals.check(remover.group, path)
        return remover

    def unlink(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Hide a file of a checkpoint's directory from its caller's group."""
        directory = node.parent
        assert directory is not None
        try:
            remover = self.check_removal(node.path, caller)
            if not is_checkpoint(directory):
                raise self.removals.refuse(remover.group, node.path)
            self._check_copied(directory, node.path, remover)
        except PermissionError:
            # cp unlinks a link before it replaces it, and then goes on to the controls.
            self._on_write_refused(node, caller)
            raise
        self.removals.hide(directory.path, node.row.name, remover.group)

    def check_rmdir(self, directory: Node, caller: Caller) -> None:
        """Refuse to remove a directory that is never removed, or that was copied."""
        if directory.row.removal is Removal.NEVER:
            raise self.removals.refuse(caller.group, directory.path)
        if is_checkpoint(directory) and self.removals.hidden(directory.path, caller.group):
            self._check_copied(directory, directory.path, caller)

    @contextmanager
    def deleting(self, directory: Node, caller: Caller) -> Iterator[None]:
        """Show everything again once a checkpoint is deleted, or is not."""
        try:
            yield
        except BaseException:
            self.removals.restore(directory.path, caller.group)
            raise
        self.removals.restore(directory.path)
        self._copies.forget(directory.path)

    def _check_copied(self, directory: Node, path: str, caller: Caller) -> None:
        if self._copies.has_copied(directory.path, caller):
            raise self.removals.refuse(caller.group, path, HOW_TO_MOVE)

    # Writes.

    def check_writable(self, node: Node) -> None:
        """Refuse to change anything but a control."""
        if self._settings.read_only:
            raise errors.read_only(node.path)
        if not isinstance(node.row, Control):
            raise errors.not_permitted(
                node.path, "only published, expires_at and refresh are written to"
            )

    def check_open_to_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Refuse to open anything but a control to be written."""
        try:
            self.check_writable(node)
        except OSError:
            self._on_write_refused(node, caller)
            raise

    def _on_write_refused(self, node: Node, caller: Callable[[], Caller]) -> None:
        key = _checkpoint_key(node)
        if key is not None:
            name = node.path.rpartition("/")[2]
            self._copies.on_write_refused(key, name, caller().group)

    def check_control_write(self, node: Node, caller: Callable[[], Caller]) -> None:
        """Refuse a value that comes with the copy of a whole directory."""
        key = _checkpoint_key(node)
        if key is not None and self._copies.is_written_over(key, caller().group):
            raise errors.not_permitted(node.path, _WRITTEN_OVER)

    def refuse_new(self, directory: Node, path: str, caller: Callable[[], Caller]) -> OSError:
        """Return the refusal of a new name."""
        if is_checkpoint(directory):
            group = caller().group
            # mv and install unlink what they mean to replace: no removal began with that.
            self.removals.restore(directory.path, group)
            name = path.rpartition("/")[2]
            self._copies.on_write_refused(directory.subject.key, name, group)
        return errors.not_permitted(path, "nothing can be created, renamed or linked here")


def _checkpoint_key(node: Node) -> object:
    """Return what names the checkpoint that a file is of, also below `.content`; None for others.

    A copy that follows links writes to what they lead to.
    """
    subject = node.subject
    return getattr(getattr(subject, "checkpoint", subject), "key", None)
