"""Listings: what folders hold, with the attributes of each entry, made once.

Making them is most of what a walk costs: 45 us for the eight entries of a checkpoint's folder, of
80 us for all of what is asked about it. Thread-safe.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from tinkerfs.context import RequestContext, Validity
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.node import Entry
from tinkerfs.vfs.resolver import Node
from tinkerfs.vfs.schema import Backend

#: So many entries are kept before all are forgotten, 290 bytes each, and 500 once they are ready:
#: those of 1,000 runs x 10.
_MAX_ENTRIES = 98_304


#: Up to so many names are looked through for one; of more, a dictionary is made.
_LINEAR_SEARCH_MAX = 16


class CachedDirectory(msgspec.Struct):
    """What a folder holds, as it was listed.

    Attributes:
        entries: all of them, each with its attributes.
        lease: how long they hold.
        epoch: the catalogue's, from before they were made.
        ready: what who hands the entries on made of them; None until then.
    """

    entries: tuple[Entry, ...]
    lease: Validity
    epoch: int
    ready: Any = None
    _by_name: dict[str, Entry] | None = None

    def entry(self, name: str) -> Entry | None:
        """Return the entry of that name, the first of several; None where there is none."""
        if len(self.entries) <= _LINEAR_SEARCH_MAX:
            for entry in self.entries:
                if entry.name == name:
                    return entry
            return None
        if self._by_name is None:
            self._by_name = {entry.name: entry for entry in reversed(self.entries)}
        return self._by_name.get(name)


class DirectoryCache:
    """The entries of folders, by path."""

    def __init__(self, model: Backend) -> None:
        self._model = model
        self._lock = threading.Lock()
        # Changed under _lock; looked into without.
        self._kept: dict[str, CachedDirectory] = {}
        self._kept_entries = 0
        self._epoch = 0  # theirs: none of another holds any more

    def get(self, path: str) -> CachedDirectory | None:
        """Return what a folder holds, as it was made before; None where something has changed."""
        kept = self._kept.get(path)
        if (
            kept is not None
            and kept.epoch == self._model.catalogue.epoch
            and kept.lease.check_and_touch(self._model.clock.monotonic())
        ):
            return kept
        return None

    def entry(self, path: str, ctx: RequestContext) -> Entry | None:
        """Return what its folder's listing tells of a path, None where none does.

        The call is told how long it holds.
        """
        folder, _, name = path.rpartition("/")
        kept = self.get(folder or "/")
        entry = None if kept is None else kept.entry(name)
        if kept is not None and entry is not None:
            ctx.depends_on_all(kept.lease)
        return entry

    def scan(
        self,
        folder: Node,
        ctx: RequestContext,
        entries_of: Callable[[Node, RequestContext], Iterator[Entry]],
        epoch: int,
    ) -> DirectoryStream:
        """Begin to list what a folder holds now; once whole it is kept until something changes.

        Args:
            folder: which.
            ctx: as in `FileSystem.scandir`.
            entries_of: makes its entries.
            epoch: the catalogue's, from before the folder was looked for.
        """
        lease = Validity() if folder.lease is None else folder.lease.copy()

        def whole(entries: tuple[Entry, ...]) -> None:
            # An entry that lacks its attributes gets them as soon as they are known.
            if not lease.is_uncacheable and all(entry.attr is not None for entry in entries):
                self._keep(folder.path, CachedDirectory(entries, lease, epoch))

        return DirectoryStream(
            source=lambda: entries_of(folder, ctx.tracking(lease)), on_complete=whole
        )

    def _keep(self, path: str, listing: CachedDirectory) -> None:
        if len(listing.entries) > _MAX_ENTRIES // 4:
            return
        with self._lock:
            if listing.epoch != self._model.catalogue.epoch:
                return
            before = self._kept.pop(path, None)
            if before is not None:
                self._kept_entries -= len(before.entries)
            is_full = self._kept_entries + len(listing.entries) > _MAX_ENTRIES
            if is_full or self._epoch != listing.epoch:
                self._kept.clear()
                self._kept_entries, self._epoch = 0, listing.epoch
            self._kept[path] = listing
            self._kept_entries += len(listing.entries)
