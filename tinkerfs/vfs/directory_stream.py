"""Scans: what an open folder holds, made as it is asked for."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tinkerfs import errors
from tinkerfs.vfs.node import Entry

if TYPE_CHECKING:
    from tinkerfs.vfs.directory_cache import CachedDirectory

#: So many entries are made at a time: as many as come with a page of the API, so that no wait for
#: the next one holds up those.
_AT_ONCE = 100


class DirectoryStream:
    """The entries of a folder, in an order that stays. Thread-safe.

    Args:
        entries: those that are known already.
        more: begins to yield the others, in the thread of whoever asks for them; may wait and fail.
            Begun again where a wait ended early: then what is there already is passed over.
        whole: called once with all entries.
        listing: what keeps the entries, if anything does.

    Attributes:
        listing: the same.
    """

    __slots__ = (
        "_begin",
        "_entries",
        "_error",
        "_is_told",
        "_lock",
        "_more",
        "_whole",
        "listing",
    )

    def __init__(
        self,
        entries: Sequence[Entry] = (),
        source: Callable[[], Iterator[Entry]] | None = None,
        on_complete: Callable[[tuple[Entry, ...]], None] = lambda _entries: None,
        listing: "CachedDirectory | None" = None,
    ) -> None:
        self.listing = listing
        self._lock = threading.Lock()
        self._whole = on_complete
        # Changed under _lock; entries are only ever added while there may be more.
        self._entries = entries if source is None else list(entries)
        self._begin = source
        self._more = None if source is None else source()
        self._error: BaseException | None = None
        self._is_told = False

    def read(self, index: int, most: int) -> Sequence[Entry]:
        """Return up to `most` entries from `index` on: what is there, after a wait if nothing is.

        Nothing is returned only where `index` is the end, or after the error.

        Raises:
            OSError: why there is no more, to the caller that has all that came before; once, as
                some programs read on after an error until the end (Rust's std::fs before 1.64).
        """
        if self._more is not None and index >= len(self._entries):
            with self._lock:
                while self._more is not None and index >= len(self._entries):
                    self._fetch_more(_AT_ONCE)
        if self._error is not None and index >= len(self._entries) and not self._is_told:
            self._is_told = True
            raise self._error
        return self._entries[index : index + most]

    def read_all(self) -> tuple[Entry, ...]:
        """Return every entry, after a wait.

        Raises:
            OSError: some cannot be had.
        """
        with self._lock:
            if self._more is not None:
                self._fetch_more(None)
        if self._error is not None:
            raise self._error
        return tuple(self._entries)

    def _fetch_more(self, count: int | None) -> None:
        """Make so many more entries, or all; the caller holds the lock."""
        assert self._more is not None
        assert isinstance(self._entries, list)
        before = len(self._entries)
        try:
            for entry in itertools.islice(self._more, count):
                self._entries.append(entry)
        except OSError as error:
            if not (errors.is_interruption(error) or errors.is_timeout(error)):
                self._error, self._more = error, None  # in this order: `since` looks without a lock
                return
            self._more = self._rest()
            if count is None or len(self._entries) == before:
                raise
            return
        except BaseException as error:  # noqa: BLE001  (raised to whoever comes to it)
            self._error, self._more = error, None
            return
        if count is None or len(self._entries) < before + count:
            self._entries = tuple(self._entries)
            self._more = None
            self._whole(self._entries)

    def _rest(self) -> Iterator[Entry]:
        assert self._begin is not None
        had = {entry.name for entry in self._entries}
        return (entry for entry in self._begin() if entry.name not in had)
