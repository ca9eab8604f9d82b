"""Listings: what long folders hold, with the attributes of each entry, made once.

Making 10,000 entries takes 0.1 s of a walk that takes 0.2 s. Thread-safe.
"""

from collections.abc import Callable, Iterable

import msgspec

from tinkerfs.call import Call, Lease
from tinkerfs.tree.node import Entry
from tinkerfs.tree.nodes import Node
from tinkerfs.tree.rows import Model

__all__ = ["Listings"]

#: A shorter one is made again as quickly as it is found.
_WORTHWHILE = 64

#: So many entries are kept before all are forgotten, some 300 bytes each.
_MAX_ENTRIES = 32_768


class _Listing(msgspec.Struct, frozen=True):
    entries: tuple[Entry, ...]
    lease: Lease
    epoch: int


class Listings:
    """The entries of folders, by path."""

    def __init__(self, model: Model) -> None:
        self._model = model
        # Single operations on a dict are atomic; a sum that two threads got wrong evens out when
        # all is forgotten.
        self._kept: dict[str, _Listing] = {}
        self._kept_entries = 0

    def get(
        self, folder: Node, call: Call, entries_of: Callable[[Node, Call], Iterable[Entry]]
    ) -> tuple[Entry, ...]:
        """Return what a folder holds: what is kept, while nothing that it tells has changed."""
        if not folder.row.each:  # never long
            return tuple(entries_of(folder, call))
        kept = self._kept.get(folder.path)
        epoch = self._model.catalogue.epoch
        now = self._model.clock.monotonic()
        if kept is not None and kept.epoch == epoch and kept.lease.holds(now):
            return kept.entries
        lease = Lease()
        entries = tuple(entries_of(folder, call.leasing(lease)))
        if not lease.is_void and _WORTHWHILE <= len(entries) <= _MAX_ENTRIES:
            self._keep(folder.path, _Listing(entries, lease, epoch))
        return entries

    def _keep(self, path: str, listing: _Listing) -> None:
        if self._kept_entries + len(listing.entries) > _MAX_ENTRIES:
            self._kept.clear()
            self._kept_entries = 0
        self._kept[path] = listing
        self._kept_entries += len(listing.entries)
