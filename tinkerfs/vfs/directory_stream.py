"""Streams of directory entries, which are built as they are read."""

import itertools
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

from tinkerfs import errors
from tinkerfs.vfs.node import Entry

#: Number of entries that are built at a time. It is the number of records in one page of the API,
#: so that these entries do not have to wait for the next page.
_BATCH_ENTRIES = 100

#: Maximum number of entries that a stream keeps for readers that go back, about 450 bytes each.
#: The directory cache accepts no larger listing.
MAX_KEPT_ENTRIES = 28_672


class DirectoryStream:
    """The entries of a directory in a stable order, like readdir(3). Thread-safe.

    A long stream keeps only the latest entries. A reader that goes back further starts its source
    again, as rewinddir(3) reads the directory again.

    Args:
        entries: the entries of a cached listing.
        source: returns an iterator over the entries, which runs in the reading thread and may
            block or raise. After a timeout or an interruption it is called again, and entries
            that the stream already had are skipped. None for a cached listing.
        on_complete: called once with all entries, unless the stream is long.

    Attributes:
        cached_entries: every entry, if the stream reads a cached listing; otherwise None.
    """

    __slots__ = (
        "_dropped",
        "_error",
        "_has_raised",
        "_iterator",
        "_kept",
        "_lock",
        "_on_complete",
        "_source",
        "cached_entries",
    )

    def __init__(
        self,
        entries: tuple[Entry, ...] = (),
        source: Callable[[], Iterator[Entry]] | None = None,
        on_complete: Callable[[tuple[Entry, ...]], None] = lambda _entries: None,
    ) -> None:
        self.cached_entries = entries if source is None else None
        self._lock = threading.Lock()
        self._on_complete = on_complete
        # Writes hold _lock, reads do not. The entries are only appended while there is an iterator,
        # and replaced together with the offset of the first of them.
        self._kept: tuple[int, Sequence[Entry]] = (0, entries if source is None else [])
        self._dropped = array("q")  # the hash of each name before them
        self._source = source
        self._iterator = None if source is None else source()
        self._error: BaseException | None = None
        self._has_raised = False

    def read(self, offset: int, limit: int) -> Sequence[Entry]:
        """Return up to `limit` entries from `offset` on; block only if none is available.

        The result is empty at the end of the directory, and after an error has been raised.

        Raises:
            OSError: the listing failed. It is raised once, after the entries that precede the
                failure: some programs continue to read after an error (Rust's std::fs before
                1.64) and have to reach the end.
        """
        first, entries = self._kept
        if not first <= offset < first + len(entries):
            with self._lock:
                if offset < self._kept[0]:
                    self._restart()
                while self._iterator is not None and offset >= self._length():
                    self._fetch_more(_BATCH_ENTRIES)
                if self._error is not None and offset >= self._length() and not self._has_raised:
                    self._has_raised = True
                    raise self._error
                first, entries = self._kept
        return entries[offset - first : offset - first + limit]

    def wait_for_first(self) -> None:
        """Block until the first entry or the end of the directory is available.

        Raises:
            OSError: the listing failed.
        """
        self.read(0, 1)

    def read_all(self) -> tuple[Entry, ...]:
        """Return every entry; block until all are available.

        Raises:
            OSError: the listing failed.
        """
        with self._lock:
            if self._kept[0]:
                self._restart()
            if self._iterator is not None:
                self._fetch_more(None)
        if self._error is not None:
            raise self._error
        return tuple(self._kept[1])

    def _length(self) -> int:
        first, entries = self._kept
        return first + len(entries)

    def _restart(self) -> None:
        """Start with the first entry again; the caller holds the lock."""
        assert self._source is not None
        self._kept, self._dropped, self._iterator = (0, []), array("q"), self._source()
        self._error, self._has_raised = None, False

    def _fetch_more(self, count: int | None) -> None:
        """Build up to `count` more entries, or all; the caller holds the lock."""
        assert self._iterator is not None
        first, entries = self._kept
        if count is not None and len(entries) > MAX_KEPT_ENTRIES:
            half = len(entries) // 2
            self._dropped.extend(hash(entry.name) for entry in entries[:half])
            first, entries = self._kept = (first + half, list(entries[half:]))
        assert isinstance(entries, list)
        old_length = len(entries)
        try:
            for entry in itertools.islice(self._iterator, count):
                entries.append(entry)
        except OSError as error:
            if not (errors.is_interruption(error) or errors.is_timeout(error)):
                self._error, self._iterator = error, None
                return
            self._iterator = self._remaining()
            if count is None or len(entries) == old_length:
                raise
            return
        except BaseException as error:  # noqa: BLE001  (raised by the next read)
            self._error, self._iterator = error, None
            return
        if count is None or len(entries) < old_length + count:
            complete = tuple(entries)
            self._kept, self._iterator = (first, complete), None
            if not first:
                self._on_complete(complete)

    def _remaining(self) -> Iterator[Entry]:
        assert self._source is not None
        known = {*self._dropped, *(hash(entry.name) for entry in self._kept[1])}
        return (entry for entry in self._source() if hash(entry.name) not in known)
