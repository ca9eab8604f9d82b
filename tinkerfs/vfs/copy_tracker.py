"""Copy tracker: which process groups copied a checkpoint directory, or write over one.

A program that moves something off the mount copies it and then removes it. What it copies of a
checkpoint are four links and four small files, and no weights. Measured with strace and a log of
the FUSE requests of each tool, three rules separate that from a look:

1. One process opened every file and read every link: mv, cp -a, tar, rsync, shutil, busybox, mc.
   `ls -l` reads links alone, and `cat`, `jq` or `grep -r` open files alone.
2. A group opens a file after it has unlinked another one there: it moves file by file, as Thunar,
   rclone, and mv of `CHECKPOINT/*` do. Nothing that deletes reads between two removals.
3. A process opened every file and unlinks one without having listed the directory in between:
   rclone with four transfers at once. What deletes a directory lists it first.

GIO opens files with O_NOATIME, and without O_NOFOLLOW, to choose their icons: that is not a copy.
Thread-safe.
"""

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from tinkerfs.clock import Clock
from tinkerfs.context import Caller

#: What every checkpoint directory has, and every copy of one reads.
COPIED_FILES: Final = ("info.json", "published", "expires_at", "tinker_path")
COPIED_LINKS: Final = ("archive_url", "files", "archive.tar", "tensors.json")
#: Names that a copy alone writes to: the controls are not among them.
_READ_ONLY: Final = ("info.json", "tinker_path", *COPIED_LINKS)

#: A copy counts until its group has read nothing of a checkpoint for so long, seconds. A script may
#: check what it copied before it removes the source.
COPY_WINDOW_S: Final = 600.0
#: A refused write counts for so long, seconds.
WRITE_WINDOW_S: Final = 60.0

#: Maximum number of directories that are followed while they are read, some 350 bytes each.
_MAX_READS: Final = 16_384
#: Maximum number of copied directories of a group; beyond, all directories count as copied.
_MAX_COPIES: Final = 65_536

_BITS: Final = {name: 1 << at for at, name in enumerate((*COPIED_FILES, *COPIED_LINKS))}
_ALL: Final = (1 << len(_BITS)) - 1
_ALL_OPENED: Final = (1 << len(COPIED_FILES)) - 1
#: The directory was listed since a file was last opened there.
_LISTED: Final = 1 << len(_BITS)


@dataclass(slots=True)
class _Read:
    """What one process read of one directory, as bits, and when last."""

    bits: int
    at: float


_NOTHING: Final = _Read(0, 0.0)


@dataclass(slots=True)
class _Copies:
    """The hashes of the directories that a group copied, and when it last read anything."""

    at: float
    directories: set[int] = field(default_factory=set)
    is_everything: bool = False


class CopyTracker:
    """Copies of checkpoint directories by process group, and refused writes into them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # All guarded by _lock; of reads the first of a directory the longest ago comes first.
        self._reads: dict[tuple[int, int, int], _Read] = {}
        self._copies: dict[int, _Copies] = {}
        self._writes: dict[tuple[int, Hashable], float] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no process was seen to read anything; takes no lock."""
        return not self._reads

    def on_read(self, directory: str, name: str, caller: Caller) -> None:
        """Record that one of COPIED_FILES is opened to be read, or one of COPIED_LINKS is read.

        The kernel asks for a link alike where it follows it. A walk comes by each file and link:
        this takes 1 us.
        """
        bits, group = _BITS[name], caller.pgid
        key = (group, caller.process, hash(directory))
        with self._lock:
            now = self._clock.monotonic()
            copies = self._copies.get(group) if self._copies else None
            if copies is not None and now - copies.at < COPY_WINDOW_S:
                copies.at = now
            read = self._reads.get(key)
            if read is None:
                if len(self._reads) >= _MAX_READS:
                    del self._reads[next(iter(self._reads))]
                self._reads[key] = _Read(bits, now)
                return
            if now - read.at >= COPY_WINDOW_S:
                read.bits = 0
            read.at = now
            read.bits |= bits
            if bits & _ALL_OPENED:
                read.bits &= ~_LISTED
            if read.bits & _ALL == _ALL:
                self._add_copy(key[2], group, now)

    def on_list(self, directory: str, caller: Caller) -> None:
        """Record that a directory is listed, where the same process read something of it before."""
        with self._lock:
            read = self._reads.get((caller.pgid, caller.process, hash(directory)))
            if read is not None:
                read.bits |= _LISTED

    def mark_copied(self, directory: str, group: int) -> None:
        """Record that a group copied a directory, by what else it did there."""
        with self._lock:
            self._add_copy(hash(directory), group, self._clock.monotonic())

    def has_copied(self, directory: str, caller: Caller) -> bool:
        """Return whether a caller that now removes something in a directory is moving it."""
        at = hash(directory)
        with self._lock:
            now = self._clock.monotonic()
            read = self._reads.get((caller.pgid, caller.process, at), _NOTHING)
            if now - read.at < COPY_WINDOW_S and read.bits & (_ALL_OPENED | _LISTED) == _ALL_OPENED:
                return True
            copies = self._copies.get(caller.pgid)
            if copies is None or now - copies.at >= COPY_WINDOW_S:
                return False
            return copies.is_everything or at in copies.directories

    def forget(self, directory: str) -> None:
        """Forget the copies of a directory: what it showed is deleted."""
        with self._lock:
            for copies in self._copies.values():
                copies.directories.discard(hash(directory))

    def on_write_refused(self, key: Hashable, name: str, group: int) -> None:
        """Record that a group was refused a write to a name of a checkpoint, or a new name there.

        rsync makes `.info.json.XXXXXX` before it replaces `info.json`. An editor of a control makes
        names of that control, which do not count.
        """
        if any(own in name for own in _READ_ONLY):
            with self._lock:
                now = self._clock.monotonic()
                for old in [k for k, at in self._writes.items() if now - at >= WRITE_WINDOW_S]:
                    del self._writes[old]
                self._writes[group, key] = now

    def is_written_over(self, key: Hashable, group: int) -> bool:
        """Return whether a group copies a whole directory onto that of a checkpoint."""
        with self._lock:
            at = self._writes.get((group, key))
            return at is not None and self._clock.monotonic() - at < WRITE_WINDOW_S

    def _add_copy(self, directory: int, group: int, now: float) -> None:
        copies = self._copies.get(group)
        if copies is None or now - copies.at >= COPY_WINDOW_S:
            old = [g for g, c in self._copies.items() if now - c.at >= COPY_WINDOW_S]
            for other in old:
                del self._copies[other]
            copies = self._copies[group] = _Copies(now)
        copies.at = now
        copies.directories.add(directory)
        if len(copies.directories) > _MAX_COPIES:
            copies.directories.clear()
            copies.is_everything = True
