"""What libfuse is told of a folder: names, attributes and targets, ready to be copied.

Of a listing that is asked for again it is kept with the listing. For the eight entries of a
checkpoint's folder it takes 20 us to make, and all else that a walk asks of that folder 20 us.
"""

import functools
import stat
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from tinkerfs.tree.node import Attr, Entry

__all__ = ["EVERYBODY", "MOST_SENT", "NOBODY", "WHO_LOOKS", "Row", "Told", "row_of"]

#: With whom the attributes of a name are shared as it is listed: with nobody, as they are not
#: known; with who wants attributes, a file's; with everybody, a folder's: they will mostly go into
#: it. Each includes those before it.
NOBODY, WHO_LOOKS, EVERYBODY = range(3)

#: One name as the kernel has it, its `struct stat`, and with whom that is shared. Where it is not
#: known it tells the kind and the inode number alone. A plain tuple: the garbage collector lets go
#: of those that hold nothing that it would have to look into.
Row: TypeAlias = tuple[bytes, bytes, int]

#: So many entries are handed out at a time at the most; one reply takes some 20 to 1,000.
MOST_SENT: Final = 256

#: Up to so many rows are looked through for one name; of more, a dictionary is made.
_FEW: Final = 16


@functools.lru_cache(4096)
def _encoded(name: str) -> bytes:
    """Return a name as the kernel has it: one object for those that are in many folders."""
    return name.encode("utf-8", "surrogateescape")


def row_of(entry: Entry, pack: Callable[[Attr], bytes]) -> Row:
    """Return the row of an entry.

    Args:
        entry: of a listing.
        pack: makes a `struct stat` of attributes.
    """
    name, attr = _encoded(entry.name), entry.attr
    if attr is None:
        return name, pack(Attr(entry.mode, 0, 0, entry.ino, 0, 0, 0, 0)), NOBODY
    return name, pack(attr), EVERYBODY if stat.S_ISDIR(attr.mode) else WHO_LOOKS


class Told:
    """What is told of a folder. Thread-safe.

    Args:
        entries: all of it, `.` and `..` included.
        pack: as in `row_of`.
    """

    __slots__ = ("_by_name", "_rows", "targets")

    def __init__(self, entries: Sequence[Entry], pack: Callable[[Attr], bytes]) -> None:
        self._rows = tuple([row_of(entry, pack) for entry in entries])
        #: Of symbolic links, by name; of several of one name the first counts.
        self.targets: dict[bytes, bytes] = {}
        for row, entry in zip(reversed(self._rows), reversed(entries), strict=True):
            if entry.target is not None:
                self.targets[row[0]] = entry.target.encode("utf-8", "surrogateescape")
            elif self.targets:
                self.targets.pop(row[0], None)
        self._by_name: dict[bytes, Row] | None = None

    def since(self, index: int) -> Sequence[Row]:
        """Return as many rows from `index` on as may be sent at a time; none only at the end."""
        return self._rows[index : index + MOST_SENT]

    def row(self, name: bytes) -> Row | None:
        """Return the row of a name, the first of several; None where there is none."""
        if len(self._rows) <= _FEW:
            for row in self._rows:
                if row[0] == name:
                    return row
            return None
        if self._by_name is None:
            self._by_name = {row[0]: row for row in reversed(self._rows)}
        return self._by_name.get(name)
