"""Fetches all pages of a listing, in parallel after the first. No HTTP.

The server's metadata is only a hint: `limit` may be clamped silently, `total_count` may be stale,
zero or missing, and records may move between pages during the listing. Therefore the length of the
first page is the step between offsets, an empty page ends the listing, and records are deduplicated
by their ids.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from tinkerfs.api.models import Page, SessionSearchPage, SessionSummary
from tinkerfs.concurrency import results_in_order

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Number of records to request per page. Every known server sends that many if it has them.
PAGE_SIZE = 100

#: Maximum number of times that a listing is fetched again because it changed in between.
MAX_REFETCHES = 2

#: Maximum number of pages, for a server that never sends an empty page.
MAX_PAGES = 10_000


class SnapshotGone(Exception):
    """Another host listed the first page long ago, and did not list this one."""


class Records(Protocol[T]):
    """The records of a listing, each once, in the order of arrival. One thread adds."""

    def add(self, record: T) -> None:
        """Add a record, unless one with its identity is there."""
        ...

    def __len__(self) -> int:
        """Return the number of distinct records."""
        ...

    def __iter__(self) -> Iterator[T]:
        """Return an iterator over the records."""
        ...


R = TypeVar("R", bound=Records[Any])


class RecordList(Generic[T]):
    """Records by position and by key. Others may read while one thread adds.

    Args:
        key: returns the id of a record.
    """

    def __init__(self, key: Callable[[T], Hashable]) -> None:
        self._key = key
        self._by_key: dict[Hashable, T] = {}
        self._items: list[T] = []

    def add(self, record: T) -> None:
        """Add a record, unless one with its key is there."""
        key = self._key(record)
        if key not in self._by_key:
            self._by_key[key] = record
            self._items.append(record)

    def get(self, key: Hashable) -> T | None:
        """Return the record with a key, or None."""
        return self._by_key.get(key)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> T:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)


def fetch_all_pages(
    fetch: Callable[[int, int], Page[T]],
    new_records: Callable[[], R],
    arrived: R,
    *,
    on_page: Callable[[R], None] = lambda _arrived: None,
    workers: int = 8,
    page_size: int = PAGE_SIZE,
) -> R:
    """Return every record of a listing once, in the server's order.

    Sends one request per page if the server's metadata is correct and the listing does not change.
    Thread-safe; calls `fetch` from several threads.

    Args:
        fetch: returns the page for (limit, offset).
        new_records: returns an empty collection, which identifies records.
        arrived: a collection to which every record is added. It may also contain records that were
            deleted in between, or that an earlier attempt has added. The result may be this one.
        on_page: receives `arrived` whenever a page was added, before later pages have arrived.
        workers: maximum number of pages in flight.
        page_size: number of records to request per page.

    Raises:
        Exception: an error of `fetch`. A listing is complete or fails.
    """
    records = new_records() if len(arrived) else arrived
    listing = _Listing(fetch, records, arrived, on_page, workers, page_size)
    listing.fetch_pages()
    for _ in range(MAX_REFETCHES):
        if listing.is_complete():
            break
        if not listing.has_changed():
            if not listing.refetch_front():
                break
            continue
        fresh = _Listing(fetch, new_records(), arrived, on_page, workers, page_size)
        fresh.fetch_pages()
        if not fresh.is_complete():
            fresh.merge_missing(listing)
        listing = fresh
    return listing.records


def read_all_found(search: Callable[[object], SessionSearchPage]) -> tuple[SessionSummary, ...]:
    """Return every session of a search once, in the server's order.

    Args:
        search: returns the page at a cursor; None is the cursor of the first page.
    """
    found: dict[str, SessionSummary] = {}
    cursor: object = None
    while True:
        page = search(cursor)
        before = len(found)
        for session in page.items:
            found.setdefault(session.session_id, session)
        # A page without new sessions may be part of an endless cycle of cursors.
        if page.next_cursor is None or len(found) == before:
            return tuple(found.values())
        cursor = page.next_cursor


class _Listing(Generic[T, R]):
    """One pass through a listing. Not thread-safe.

    Args:
        records: receives the records of this pass.
        arrived: receives the records of all passes; may be the same collection.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], Page[T]],
        records: R,
        arrived: R,
        on_page: Callable[[R], None],
        workers: int,
        page_size: int,
    ) -> None:
        self._fetch = fetch
        self.records = records
        self._arrived = arrived
        self._on_page = on_page
        self._workers = workers
        self._page_size = page_size
        self._step = 0
        self._received = 0
        self._skipped = 0
        self._totals: set[int] = set()
        self._total = 0

    def merge_missing(self, other: "_Listing[T, R]") -> None:
        for record in other.records:
            self.records.add(record)

    def has_changed(self) -> bool:
        """Return whether the server's count differed between pages."""
        return len(self._totals) > 1

    def is_complete(self) -> bool:
        """Return whether no record seems to be missing.

        If fewer records than the server's count were received, and none twice, the count is wrong.
        If some were received twice, records moved between pages, and others may have been missed.
        """
        if self.has_changed():
            return False
        distinct = len(self.records) + self._skipped
        return distinct >= self._total or self._received < self._total

    def fetch_pages(self) -> None:
        """Fetch the first page, the pages within its count, and any pages beyond it."""
        first = self._fetch(self._page_size, 0)
        self._add(first)
        self._step = first.received
        if not self._step:
            return
        last, offset = first, self._step
        if self._total > offset:
            end = min(self._total, self._step * MAX_PAGES)
            for page in self._pages(range(offset, end, self._step)):
                self._add(page)
                last, offset = page, offset + self._step
        for _ in range(MAX_PAGES):
            if self._is_end(first, last, offset):
                break
            last = self._fetch(self._page_size, offset)
            offset += self._step
            if not self._add(last):  # the server ignores `offset`
                break

    def _pages(self, offsets: range) -> Iterator[Page[T]]:
        """Yield the pages at known offsets as they arrive, up to and including an empty one.

        After the first error or empty page no further page is requested.

        Raises:
            Exception: the first error of `fetch`.
        """
        is_finished = threading.Event()

        def fetch_page(offset: int) -> Page[T]:
            if is_finished.is_set():
                return Page(())
            page = None
            try:
                page = self._fetch(self._page_size, offset)
            finally:
                if page is None or not page.received:
                    is_finished.set()
            return page

        works = (partial(fetch_page, offset) for offset in offsets)
        try:
            for page in results_in_order(works, self._workers, "page", 2 * self._workers):
                yield page
                if not page.received:
                    return
        finally:
            is_finished.set()

    def _is_end(self, first: Page[T], last: Page[T], offset: int) -> bool:
        if not last.received:
            return True
        if self._total >= self._received:
            return offset >= self._total
        # The count is missing or too low: only a short page marks the end. If the server does not
        # report its page size, a short first page may be clamped.
        if last is first:
            is_short = first.limit is not None and first.received < min(first.limit, PAGE_SIZE)
            return is_short and not self._total  # with a wrong count, `limit` may be wrong, too
        return last.received < self._step

    def refetch_front(self) -> bool:
        """Refetch pages until one has no new record; return whether any record was new.

        A run that is used moves to the front of the listing, and the runs that it passes move back.
        """
        has_new_records = False
        for offset in range(0, self._total, self._step):
            before = self._received, self._skipped
            is_new = self._add(self._fetch(self._page_size, offset))
            self._received, self._skipped = before
            if not is_new:
                break
            has_new_records = True
            if self.is_complete():
                break
        return has_new_records

    def _add(self, page: Page[T]) -> bool:
        """Add the records of a page; return whether any of them is new."""
        before = len(self.records)
        for record in page.items:
            self.records.add(record)
            if self._arrived is not self.records:
                self._arrived.add(record)
        self._on_page(self._arrived)
        self._received += page.received
        self._skipped += page.received - len(page.items)
        if page.received and page.total_count:  # SkyRL's count is 0 past the end
            self._totals.add(page.total_count)
            self._total = page.total_count
        return len(self.records) > before


class SkippedRecordReporter:
    """Logs the number of invalid records of each listing, once and whenever it grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._max_skipped: dict[str, int] = {}  # guarded by _lock

    def report(self, listing: str, page: Page[T]) -> Page[T]:
        """Log the number of skipped records of a page and return the page."""
        count = page.received - len(page.items)
        with self._lock:
            before = self._max_skipped.get(listing, 0)
            self._max_skipped[listing] = max(count, before)
        if count > before:
            log.warning(
                "%s: skipped %d of %d records that could not be parsed",
                listing,
                count,
                page.received,
            )
        return page
