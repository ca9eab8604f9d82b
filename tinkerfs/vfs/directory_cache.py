"""Directory cache: complete listings with the attributes of each entry.

Building the entries is the largest part of the cost of a tree walk. Thread-safe.
"""

import threading
from collections.abc import Callable, Iterator

import msgspec

from tinkerfs.context import RequestContext
from tinkerfs.validity import Validity
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.node import Entry
from tinkerfs.vfs.resolver import Node
from tinkerfs.vfs.schema import Backend

#: Maximum number of cached entries, enough for 1,000 runs with 10 checkpoints each. The cache is
#: cleared when it is exceeded. An entry takes 290 bytes, and 500 with its prepared FUSE reply.
_MAX_ENTRIES = 98_304

#: Maximum number of entries that are searched linearly; larger directories are indexed by name.
_LINEAR_SEARCH_MAX = 16


class CachedDirectory(msgspec.Struct):
    """The complete listing of a directory.

    Attributes:
        entries: every entry, with its attributes.
        validity: how long the entries may be used.
        generation: the generation of the metadata before the entries were built.
    """

    entries: tuple[Entry, ...]
    validity: Validity
    generation: int
    _by_name: dict[str, Entry] | None = None

    def entry(self, name: str) -> Entry | None:
        """Return the first entry of that name, or None."""
        if len(self.entries) <= _LINEAR_SEARCH_MAX:
            for entry in self.entries:
                if entry.name == name:
                    return entry
            return None
        if self._by_name is None:
            self._by_name = {entry.name: entry for entry in reversed(self.entries)}
        return self._by_name.get(name)


class DirectoryCache:
    """Complete listings by path, all of one generation of the metadata."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        # Writes hold _lock; reads do not.
        self._directories: dict[str, CachedDirectory] = {}
        self._entry_count = 0
        self._generation = 0

    def get(self, path: str) -> CachedDirectory | None:
        """Return the cached listing of a directory, or None if it is absent or expired."""
        cached = self._directories.get(path)
        if (
            cached is not None
            and cached.generation == self._backend.catalog.generation
            and cached.validity.check_and_touch(self._backend.clock.monotonic())
        ):
            return cached
        return None

    def entry(self, path: str, ctx: RequestContext) -> Entry | None:
        """Return the entry of a path from the cached listing of its directory, or None.

        The validity of the entry is added to `ctx`.
        """
        parent, _, name = path.rpartition("/")
        cached = self.get(parent or "/")
        entry = None if cached is None else cached.entry(name)
        if cached is not None and entry is not None:
            ctx.depends_on_all(cached.validity)
        return entry

    def stream(
        self,
        directory: Node,
        ctx: RequestContext,
        entries_of: Callable[[Node, RequestContext], Iterator[Entry]],
        generation: int,
    ) -> DirectoryStream:
        """Return a stream of the current entries, and cache them once all are read.

        Args:
            directory: the directory to list.
            ctx: deadline and cancellation of the request.
            entries_of: builds the entries; may block and may raise OSError.
            generation: the generation of the metadata before the directory was resolved.
        """
        validity = Validity() if directory.validity is None else directory.validity.copy()

        def on_complete(entries: tuple[Entry, ...]) -> None:
            # A listing in which an entry has no attributes yet is built again at the next request.
            if not validity.is_uncacheable and all(entry.attr is not None for entry in entries):
                self._store(directory.path, CachedDirectory(entries, validity, generation))

        return DirectoryStream(
            source=lambda: entries_of(directory, ctx.tracking(validity)), on_complete=on_complete
        )

    def _store(self, path: str, listing: CachedDirectory) -> None:
        if len(listing.entries) > _MAX_ENTRIES // 4:
            return
        with self._lock:
            if listing.generation != self._backend.catalog.generation:
                return
            previous = self._directories.pop(path, None)
            if previous is not None:
                self._entry_count -= len(previous.entries)
            is_full = self._entry_count + len(listing.entries) > _MAX_ENTRIES
            if is_full or self._generation != listing.generation:
                self._directories.clear()
                self._entry_count, self._generation = 0, listing.generation
            self._directories[path] = listing
            self._entry_count += len(listing.entries)
