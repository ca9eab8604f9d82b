"""Copy tracker: detects process groups that copy or overwrite a checkpoint.

A program that moves a directory off the mount copies it and then removes it. The copy of a
checkpoint directory has four links and four small files, but no weights. Three rules, derived from
the FUSE requests of common tools, distinguish such a copy from other reads:

1. One process opened every file and read every link: mv, cp -a, tar, rsync, shutil, busybox, mc.
   `ls -l` reads only links, and `cat`, `jq` or `grep -r` open only files.
2. A group opens a file after it has unlinked another one in that directory. Thunar, rclone and mv
   of `CHECKPOINT/*` move file by file. A deletion does not read between two removals.
3. A process opened every file and unlinks one without a listing of the directory in between:
   rclone with four concurrent transfers. A deletion lists the directory first.

GIO opens files with O_NOATIME and without O_NOFOLLOW to choose their icons. This is not a copy.
Thread-safe.
"""

import math
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from cachetools import TTLCache

from tinkerfs.clock import Clock
from tinkerfs.context import Caller

#: The names of every checkpoint directory, all of which a copy reads.
COPIED_FILES: Final = ("info.json", "published", "expires_at", "tinker_path")
COPIED_LINKS: Final = ("archive_url", "files", "archive.tar", "tensors.json")
#: The names that only a copy writes to; control files are writable and excluded.
_READ_ONLY: Final = ("info.json", "tinker_path", *COPIED_LINKS)

#: A copy is remembered until its group has not read a checkpoint directory for this time, seconds.
#: A script may verify its copy before it removes the source.
COPY_WINDOW_S: Final = 600.0
#: A refused write is remembered for this time, seconds.
WRITE_WINDOW_S: Final = 60.0

#: Maximum number of (process, directory) pairs that are tracked, some 350 bytes each.
_MAX_READS: Final = 16_384
#: Maximum number of copied directories of a group; beyond it, all directories count as copied.
_MAX_COPIES: Final = 65_536

_BITS: Final = {name: 1 << bit for bit, name in enumerate((*COPIED_FILES, *COPIED_LINKS))}
_ALL: Final = (1 << len(_BITS)) - 1
_ALL_OPENED: Final = (1 << len(COPIED_FILES)) - 1
#: This bit is set if the directory was listed after the last open of one of its files.
_LISTED: Final = 1 << len(_BITS)


@dataclass(slots=True)
class _Read:
    """The names that a process read in a directory, as bits, and the last time."""

    bits: int
    at: float


_NO_READ: Final = _Read(0, 0.0)


@dataclass(slots=True)
class _Copies:
    """Hashes of the directories that a group copied, and the time of its last read."""

    at: float
    directories: set[int] = field(default_factory=set)
    is_everything: bool = False


class CopyTracker:
    """Tracks copies of checkpoint directories and refused writes, by process group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # All are guarded by _lock. The order of _reads is that of the first read.
        self._reads: dict[tuple[int, int, int], _Read] = {}
        self._copies: dict[int, _Copies] = {}
        #: The directories, by group and key, that a group was refused a write in.
        self._writes: TTLCache[tuple[int, Hashable], bool] = TTLCache(
            math.inf, WRITE_WINDOW_S, clock.monotonic
        )

    @property
    def is_idle(self) -> bool:
        """Whether there are no tracked reads; takes no lock."""
        return not self._reads

    def on_read(self, directory: str, name: str, caller: Caller) -> None:
        """Record that one of COPIED_FILES is opened, or one of COPIED_LINKS is read.

        The kernel's readlink request is the same when it follows the link.
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
                    # The oldest eighth, because finding the first key of a dict takes the longer
                    # the more keys were deleted before it.
                    for old in list(islice(self._reads, -(-_MAX_READS // 8))):
                        del self._reads[old]
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
        """Record that a directory is listed by a process that has read one of its names."""
        with self._lock:
            read = self._reads.get((caller.pgid, caller.process, hash(directory)))
            if read is not None:
                read.bits |= _LISTED

    def mark_copied(self, directory: str, group: int) -> None:
        """Record that a group copied a directory, as concluded from other requests."""
        with self._lock:
            self._add_copy(hash(directory), group, self._clock.monotonic())

    def has_copied(self, directory: str, caller: Caller) -> bool:
        """Return whether a caller that removes a name in a directory has copied it."""
        key = hash(directory)
        with self._lock:
            now = self._clock.monotonic()
            read = self._reads.get((caller.pgid, caller.process, key), _NO_READ)
            if now - read.at < COPY_WINDOW_S and read.bits & (_ALL_OPENED | _LISTED) == _ALL_OPENED:
                return True
            copies = self._copies.get(caller.pgid)
            if copies is None or now - copies.at >= COPY_WINDOW_S:
                return False
            return copies.is_everything or key in copies.directories

    def forget(self, directory: str) -> None:
        """Forget all copies of a directory, because its checkpoint was deleted."""
        with self._lock:
            for copies in self._copies.values():
                copies.directories.discard(hash(directory))

    def on_write_refused(self, key: Hashable, name: str, group: int) -> None:
        """Record a refused write, or a refused new name, in a checkpoint directory.

        rsync creates `.info.json.XXXXXX` before it replaces `info.json`. Names that contain only
        the name of a control file are ignored: editors create them.
        """
        if any(own in name for own in _READ_ONLY):
            with self._lock:
                self._writes[group, key] = True

    def is_written_over(self, key: Hashable, group: int) -> bool:
        """Return whether a group is copying a directory onto a checkpoint directory."""
        with self._lock:
            return (group, key) in self._writes

    def _add_copy(self, directory: int, group: int, now: float) -> None:
        copies = self._copies.get(group)
        if copies is None or now - copies.at >= COPY_WINDOW_S:
            expired = [g for g, c in self._copies.items() if now - c.at >= COPY_WINDOW_S]
            for other in expired:
                del self._copies[other]
            copies = self._copies[group] = _Copies(now)
        copies.at = now
        copies.directories.add(directory)
        if len(copies.directories) > _MAX_COPIES:
            copies.directories.clear()
            copies.is_everything = True
