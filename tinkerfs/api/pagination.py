"""Reads every page of a listing: the first alone, the others at once. Knows nothing of HTTP.

The server's words about a listing are hints: `limit` may be clamped in silence, `total_count` may
be stale, zero or missing, and records move between pages while these are read. What came is what
counts: the first page's length is the step, an empty page is the end, ids tell records apart.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from tinkerfs.api.models import Page, SessionSearchPage, SessionSummary

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How many records a page is asked for.
PAGE_SIZE = 100

#: How often a listing is read again because it changed while it was read.
MAX_REREADS = 2

#: A server that never sends an empty page is not followed for ever.
MAX_PAGES = 10_000


def fetch_all_pages(
    fetch: Callable[[int, int], Page[T]],
    key: Callable[[T], Hashable],
    *,
    on_page: Callable[[tuple[T, ...]], None] = lambda _items: None,
    workers: int = 8,
    page_size: int = PAGE_SIZE,
) -> tuple[T, ...]:
    """Return every record of a listing once, in the server's order.

    Costs ceil(records / page) calls where the server keeps its word and nothing changes meanwhile.
    Thread-safe; `fetch` is called from several threads at once.

    Args:
        fetch: reads the page of (limit, offset).
        key: a record's id.
        on_page: told the records of each page, in the server's order, before the next ones have come:
            every record of the outcome, and it may be one twice, or one that is gone by the end.
        workers: how many pages to ask for at once.
        page_size: how many records to ask for at once.

    Raises:
        Exception: what `fetch` raised: a listing is whole or it fails.
    """
    listing = _Listing(fetch, key, on_page, workers, page_size)
    listing.read()
    for _ in range(MAX_REREADS):
        if listing.is_whole():
            break
        if not listing.has_changed():
            if not listing.read_front_again():
                break
            continue
        fresh = _Listing(fetch, key, on_page, workers, page_size)
        fresh.read()
        if not fresh.is_whole():
            fresh.merge_missing(listing)
        listing = fresh
    return listing.items()


def read_all_found(search: Callable[[object], SessionSearchPage]) -> tuple[SessionSummary, ...]:
    """Return every session of a search once, in the server's order.

    Args:
        search: reads the page at a cursor; None for the first one.

    Raises:
        Exception: what `search` raised: a listing is whole or it fails.
    """
    found: dict[str, SessionSummary] = {}
    cursor: object = None
    while True:
        page = search(cursor)
        before = len(found)
        for session in page.items:
            found.setdefault(session.session_id, session)
        # A cursor that leads to nothing new would lead round in circles.
        if page.next_cursor is None or len(found) == before:
            return tuple(found.values())
        cursor = page.next_cursor


class _Listing(Generic[T]):
    """One pass through a listing; used by one thread, only `_Wave` has others."""

    def __init__(
        self,
        fetch: Callable[[int, int], Page[T]],
        key: Callable[[T], Hashable],
        on_page: Callable[[tuple[T, ...]], None],
        workers: int,
        page_size: int,
    ) -> None:
        self._fetch = fetch
        self._key = key
        self._came = on_page
        self._workers = workers
        self._page_size = page_size
        self._step = 0
        self._union: dict[Hashable, T] = {}
        self._received = 0
        self._unreadable = 0
        self._totals: set[int] = set()
        self._total = 0

    def items(self) -> tuple[T, ...]:
        return tuple(self._union.values())

    def merge_missing(self, other: "_Listing[T]") -> None:
        for key, item in other._union.items():
            self._union.setdefault(key, item)

    def has_changed(self) -> bool:
        """Tell whether the server's count changed between pages: records came or went."""
        return len(self._totals) > 1

    def is_whole(self) -> bool:
        """Tell whether nothing is missing, as far as can be told.

        Fewer records than promised, and none twice, is a wrong count; fewer because some came
        twice means that others were pushed or pulled from page to page, and one slipped through.
        """
        if self.has_changed():
            return False
        known = len(self._union) + self._unreadable
        return known >= self._total or self._received < self._total

    def read(self) -> None:
        """Read the first page, then what it promises, then on where the promise is no good."""
        first = self._fetch(self._page_size, 0)
        self._take(first)
        self._step = first.received
        if not self._step:
            return
        last, offset = first, self._step
        if self._total > offset:
            end = min(self._total, self._step * MAX_PAGES)
            wave = _ParallelPages(self._fetch, self._page_size, self._step, end)
            for page in wave.read(self._workers):
                self._take(page)
                last, offset = page, offset + self._step
        for _ in range(MAX_PAGES):
            if self._is_end(first, last, offset):
                break
            last = self._fetch(self._page_size, offset)
            offset += self._step
            if not self._take(last):  # a server that does not know `offset`
                break

    def _is_end(self, first: Page[T], last: Page[T], offset: int) -> bool:
        if not last.received:
            return True
        if self._total >= self._received:
            return offset >= self._total
        # The count is missing, or less than what came: only a short page tells the end. Where the
        # server does not name its page size, a first page shorter than asked may be a clamped one.
        if last is first:
            is_short = first.limit is not None and first.received < first.limit
            return is_short and not self._total  # a count below what came: nothing it says counts
        return last.received < self._step

    def read_front_again(self) -> bool:
        """Read from the first page until one brings nothing new; tell whether any did.

        A run that is used moves to the front, and pushes all that it passed one place back.
        """
        has_found = False
        for offset in range(0, self._total, self._step):
            before = self._received, self._unreadable
            is_new = self._take(self._fetch(self._page_size, offset))
            self._received, self._unreadable = before
            if not is_new:
                break
            has_found = True
            if self.is_whole():
                break
        return has_found

    def _take(self, page: Page[T]) -> bool:
        """Add a page's records; tell whether any of them is new."""
        self._came(page.items)
        before = len(self._union)
        for item in page.items:
            self._union.setdefault(self._key(item), item)
        self._received += page.received
        self._unreadable += page.received - len(page.items)
        if page.received and page.total_count:  # SkyRL's count is 0 past the end
            self._totals.add(page.total_count)
            self._total = page.total_count
        return len(self._union) > before


class _ParallelPages(Generic[T]):
    """Pages at known offsets, read by a few threads of its own.

    Daemon threads: a process that ends does not wait for a listing. The first failure, or an empty
    page, keeps further pages from being asked for.
    """

    def __init__(
        self, fetch: Callable[[int, int], Page[T]], page_size: int, step: int, end: int
    ) -> None:
        self._fetch = fetch
        self._page_size = page_size
        self._step = step
        self._end = end
        self._come = threading.Condition()
        # All guarded by _come.
        self._next = step
        self._is_over = False
        self._pages: dict[int, Page[T]] = {}
        self._error: BaseException | None = None

    def read(self, workers: int) -> Iterator[Page[T]]:
        """Yield the pages in their order as they come, up to the first empty one, included.

        Raises:
            Exception: the first that a page raised.
        """
        count = min(workers, -(-(self._end - self._step) // self._step))
        for n in range(count):
            threading.Thread(target=self._work, name=f"tinkerfs-page-{n}", daemon=True).start()
        try:
            for offset in range(self._step, self._end, self._step):
                page = self._page(offset)
                yield page
                if not page.received:
                    return
        finally:
            with self._come:
                self._is_over = True

    def _page(self, offset: int) -> Page[T]:
        """Wait for a page; it was asked for if no earlier one was empty."""
        with self._come:
            self._come.wait_for(lambda: self._error is not None or offset in self._pages)
            if self._error is not None and offset not in self._pages:
                raise self._error
            return self._pages.pop(offset)

    def _work(self) -> None:
        while True:
            with self._come:
                offset = self._next
                if self._is_over or offset >= self._end:
                    return
                self._next += self._step
            try:
                page = self._fetch(self._page_size, offset)
            except BaseException as error:  # noqa: BLE001  (raised by `read`, in the caller)
                with self._come:
                    self._error = self._error or error
                    self._is_over = True
                    self._come.notify()
                return
            with self._come:
                self._pages[offset] = page
                self._is_over = self._is_over or not page.received
                self._come.notify()


class SkippedRecordReporter:
    """How many records of each listing could not be read: told once, and when there are more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._most: dict[str, int] = {}  # guarded by _lock

    def report(self, listing: str, page: Page[T]) -> Page[T]:
        """Return a page; log how many of its records are left out."""
        count = page.received - len(page.items)
        with self._lock:
            before = self._most.get(listing, 0)
            self._most[listing] = max(count, before)
        if count > before:
            log.warning(
                "%s: %d of %d records could not be read and are left out",
                listing,
                count,
                page.received,
            )
        return page
