"""Streams of directory entries, which are built as they are read."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

from tinkerfs import errors
from tinkerfs.vfs.node import Entry

#: Number of entries that are built at a time. It is the number of records in one page of the API,
#: so that these entries do not have to wait for the next page.
_BATCH_ENTRIES = 100


class DirectoryStream:
    """The entries of a directory in a stable order, like readdir(3). Thread-safe.

    Args:
        entries: the entries of a cached listing.
        source: returns an iterator over the entries, which runs in the reading thread and may
            block or raise. After a timeout or an interruption it is called again, and entries
            that the stream already has are skipped. None for a cached listing.
        on_complete: called once with all entries.

    Attributes:
        cached_entries: every entry, if the stream reads a cached listing; otherwise None.
    """

    __slots__ = (
        "_entries",
        "_error",
        "_has_raised",
        "_iterator",
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
        # Writes hold _lock, reads do not. Entries are only appended while there is an iterator.
        self._entries: Sequence[Entry] = entries if source is None else list(entries)
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
        if self._iterator is not None and offset >= len(self._entries):
            with self._lock:
                while self._iterator is not None and offset >= len(self._entries):
                    self._fetch_more(_BATCH_ENTRIES)
        if self._error is not None and offset >= len(self._entries) and not self._has_raised:
            self._has_raised = True
            raise self._error
        return self._entries[offset : offset + limit]

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
            if self._iterator is not None:
                self._fetch_more(None)
        if self._error is not None:
            raise self._error
        return tuple(self._entries)

    def _fetch_more(self, count: int | None) -> None:
        """Build up to `count` more entries, or all; the caller holds the lock."""
        assert self._iterator is not None
        assert isinstance(self._entries, list)
        old_length = len(self._entries)
        try:
            for entry in itertools.islice(self._iterator, count):
                self._entries.append(entry)
        except OSError as error:
            if not (errors.is_interruption(error) or errors.is_timeout(error)):
                # In this order, because `read` checks both without the lock.
                self._error, self._iterator = error, None
                return
            self._iterator = self._remaining()
            if count is None or len(self._entries) == old_length:
                raise
            return
        except BaseException as error:  # noqa: BLE001  (raised by the next read)
            self._error, self._iterator = error, None
            return
        if count is None or len(self._entries) < old_length + count:
            self._entries = tuple(self._entries)
            self._iterator = None
            self._on_complete(self._entries)

    def _remaining(self) -> Iterator[Entry]:
        assert self._source is not None
        names = {entry.name for entry in self._entries}
        return (entry for entry in self._source() if entry.name not in names)
