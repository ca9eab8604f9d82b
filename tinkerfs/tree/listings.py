"""Listings: what folders hold, with the attributes of each entry, made once.

Making them is most of what a walk costs: 45 us for the eight entries of a checkpoint's folder, of
80 us for all of what is asked about it. Thread-safe.
"""

from collections.abc import Callable, Iterator

import msgspec

from tinkerfs.call import Call, Lease
from tinkerfs.tree.node import Attr, Entry
from tinkerfs.tree.nodes import Node
from tinkerfs.tree.rows import Model
from tinkerfs.tree.scan import Scan

__all__ = ["Listings"]

#: So many entries are kept before all are forgotten, 160 bytes each: of 1,000 runs x 10.
_MAX_ENTRIES = 98_304


#: Up to so many names are looked through for one; of more, a dictionary is made.
_FEW = 16


class _Listing(msgspec.Struct):
    entries: tuple[Entry, ...]
    lease: Lease
    epoch: int
    by_name: dict[str, Entry] | None = None

    def attr(self, name: str) -> Attr | None:
        """Return the attributes of the entry of that name, None where there is none."""
        if len(self.entries) <= _FEW:
            for entry in self.entries:
                if entry.name == name:
                    return entry.attr
            return None
        if self.by_name is None:
            self.by_name = {entry.name: entry for entry in self.entries}
        entry_of_many = self.by_name.get(name)
        return None if entry_of_many is None else entry_of_many.attr


class Listings:
    """The entries of folders, by path."""

    def __init__(self, model: Model) -> None:
        self._model = model
        # Single operations on a dict are atomic; a sum that two threads got wrong evens out when
        # all is forgotten.
        self._kept: dict[str, _Listing] = {}
        self._kept_entries = 0

    def kept(self, path: str) -> tuple[Entry, ...] | None:
        """Return what a folder holds, as it was made before; None where something has changed."""
        kept = self._holding(path)
        return None if kept is None else kept.entries

    def attr(self, path: str, call: Call) -> Attr | None:
        """Return the attributes of a path that its folder's listing tells, None where none does.

        The call is told how long they hold.
        """
        folder, _, name = path.rpartition("/")
        kept = self._holding(folder or "/")
        attr = None if kept is None else kept.attr(name)
        if kept is not None and attr is not None:
            call.rests_on_all_of(kept.lease)
        return attr

    def _holding(self, path: str) -> _Listing | None:
        kept = self._kept.get(path)
        if (
            kept is not None
            and kept.epoch == self._model.catalogue.epoch
            and kept.lease.holds(self._model.clock.monotonic())
        ):
            return kept
        return None

    def scan(
        self, folder: Node, call: Call, entries_of: Callable[[Node, Call], Iterator[Entry]]
    ) -> Scan:
        """Begin to list what a folder holds now; once whole it is kept until something changes."""
        epoch = self._model.catalogue.epoch
        lease = Lease() if folder.lease is None else folder.lease.extended()

        def whole(entries: tuple[Entry, ...]) -> None:
            # An entry that lacks its attributes gets them as soon as they are known.
            if not lease.is_void and all(entry.attr is not None for entry in entries):
                self._keep(folder.path, _Listing(entries, lease, epoch))

        return Scan(more=lambda: entries_of(folder, call.leasing(lease)), whole=whole)

    def _keep(self, path: str, listing: _Listing) -> None:
        if len(listing.entries) > _MAX_ENTRIES // 4:
            return
        if self._kept_entries + len(listing.entries) > _MAX_ENTRIES:
            self._kept.clear()
            self._kept_entries = 0
        self._kept[path] = listing
        self._kept_entries += len(listing.entries)
