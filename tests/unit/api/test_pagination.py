"""Pagination of listings with wrong metadata, clamped pages and concurrent changes."""

import dataclasses
import threading

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinkerfs.api.models import Page
from tinkerfs.api.pagination import RecordList, fetch_all_pages

#: Default maximum number of pages in flight.
WORKERS = 8


class Server:
    """A listing of numbers.

    Attributes:
        offsets: offset of each requested page.
        on_request: called with the number of each request, from 1, before its response.
    """

    def __init__(self, count, *, clamp=100, total=..., has_limit=True, ignores_offset=False):
        self.records = list(range(count))
        self.clamp, self.total, self.has_limit = clamp, total, has_limit
        self.ignores_offset = ignores_offset
        self.offsets = []
        self.on_request = lambda number: None
        self._lock = threading.Lock()

    def page(self, limit, offset):
        with self._lock:
            self.offsets.append(offset)
            self.on_request(len(self.offsets))
            offset = 0 if self.ignores_offset else offset
            size = min(limit, self.clamp)
            items = tuple(self.records[offset : offset + size])
            total = self.total(len(self.records)) if callable(self.total) else self.total
            return Page(
                items,
                len(self.records) if total is ... else total,
                size if self.has_limit else None,
                len(items),
            )

    def read(self):
        return list(fetch_numbers(self.page))


def fetch_numbers(page, on_page=lambda _new: None, **options):
    """Return all records; `on_page` receives those that are new after each page, if any."""
    shown = 0

    def on_arrival(arrived):
        nonlocal shown
        new, shown = [arrived[index] for index in range(shown, len(arrived))], len(arrived)
        if new:
            on_page(new)

    def new_records():
        return RecordList(lambda number: number)

    return tuple(fetch_all_pages(page, new_records, new_records(), on_page=on_arrival, **options))


@pytest.mark.parametrize(
    ("count", "pages"), [(0, 1), (1, 1), (99, 1), (100, 1), (101, 2), (1000, 10), (1001, 11)]
)
def test_fetch_all_pages_sends_one_request_per_page(count, pages):
    server = Server(count)
    assert server.read() == list(range(count))
    assert sorted(server.offsets) == [100 * n for n in range(pages)]


@given(
    st.integers(0, 450),
    st.integers(1, 120),
    st.one_of(st.just(...), st.none(), st.integers(0, 1000)),
    st.booleans(),
)
def test_fetch_all_pages_with_wrong_metadata_is_complete(count, clamp, total, has_limit):
    # A count that is wrong by whole pages cannot be detected without an extra request.
    assume(total in (..., None) or not (0 < total < count and total % min(clamp, 100) == 0))
    server = Server(count, clamp=clamp, total=total, has_limit=has_limit)
    assert server.read() == list(range(count))


@given(st.integers(0, 450), st.integers(1, 120))
def test_fetch_all_pages_with_clamp_sends_no_extra_request(count, clamp):
    server = Server(count, clamp=clamp)
    server.read()
    assert len(server.offsets) == max(-(-count // min(clamp, 100)), 1)


@pytest.mark.parametrize("total", [..., 0, None])
def test_fetch_all_pages_with_echoed_limit_is_complete(total):
    server = Server(450, clamp=100, total=total)

    def page(limit, offset):
        return dataclasses.replace(server.page(limit, offset), limit=limit)

    records = fetch_numbers(page, page_size=1000)
    assert list(records) == list(range(450))


def test_fetch_all_pages_limits_pages_in_flight():
    server = Server(5000)
    full = threading.Barrier(WORKERS)
    now, max_in_flight = 0, 0
    lock = threading.Lock()

    def page(limit, offset):
        nonlocal now, max_in_flight
        with lock:
            now += 1
            max_in_flight = max(max_in_flight, now)
        if 0 < offset <= 100 * WORKERS:
            full.wait(10)  # times out if the pages are fetched one by one
        result = server.page(limit, offset)
        with lock:
            now -= 1
        return result

    assert fetch_numbers(page) == tuple(range(5000))
    assert max_in_flight == WORKERS
    assert len(server.offsets) == 50


def test_fetch_all_pages_with_moved_record_is_complete():
    server = Server(1000)

    def move(number):
        if number == 2:
            server.records.insert(0, server.records.pop())

    server.on_request = move
    assert sorted(server.read()) == list(range(1000))
    assert len(server.offsets) <= 12


def test_fetch_all_pages_with_created_record_is_complete():
    server = Server(1000)
    server.on_request = lambda number: server.records.insert(0, 5000) if number == 4 else None
    assert sorted(server.read()) == [*range(1000), 5000]


def test_fetch_all_pages_with_deleted_record_is_complete():
    server = Server(1000)
    server.on_request = lambda number: server.records.remove(3) if number == 3 else None
    assert sorted(server.read()) == sorted(server.records)


def test_fetch_all_pages_with_constant_changes_ends():
    server = Server(300)
    server.on_request = lambda number: server.records.insert(0, 1000 + number)
    found = server.read()
    assert set(range(300)) <= set(found)
    assert len(server.offsets) < 40


def test_fetch_all_pages_with_huge_count_stops_at_empty_page():
    server = Server(250, total=10**12)
    assert server.read() == list(range(250))
    assert len(server.offsets) <= 3 + WORKERS


def test_fetch_all_pages_with_ignored_offset_ends():
    server = Server(100, total=None, ignores_offset=True)
    assert server.read() == list(range(100))
    assert len(server.offsets) == 2


def test_fetch_all_pages_with_zero_count_past_end_is_complete():
    server = Server(200, total=None)
    server.total = lambda count: count if server.offsets[-1] < count else 0
    assert server.read() == list(range(200))
    assert len(server.offsets) == 2


def test_listing_with_failing_page_fails():
    server = Server(5000)

    def page(limit, offset):
        if offset == 700:
            raise ValueError("page 7")
        return server.page(limit, offset)

    with pytest.raises(ValueError, match="page 7"):
        fetch_numbers(page)
    assert len(server.offsets) < 50


def test_fetch_all_pages_counts_skipped_records_as_received():
    server = Server(250)

    def page(limit, offset):
        full_page = server.page(limit, offset)
        return Page(full_page.items[1:], full_page.total_count, full_page.limit, full_page.received)

    assert len(fetch_numbers(page)) == 247
    assert len(server.offsets) == 3


def test_on_page_receives_pages_in_order_as_they_arrive():
    server = Server(1000)
    seen, later = [], threading.Event()

    def page(limit, offset):
        if offset == 200:  # later pages arrive first
            assert later.wait(10)
        if offset == 900:
            later.set()
        return server.page(limit, offset)

    def on_page(items):
        seen.extend(items)
        if items[0] == 0:
            assert server.offsets == [0]

    assert fetch_numbers(page, on_page=on_page) == tuple(range(1000))
    assert seen == list(range(1000))


def test_on_page_receives_pages_before_failing_page():
    server, seen, failing = Server(1000), [], threading.Event()

    def page(limit, offset):
        if offset == 500:
            assert failing.wait(10)
            raise ValueError("page 5")
        return server.page(limit, offset)

    def on_page(items):
        seen.extend(items)
        if items[-1] == 499:
            failing.set()

    with pytest.raises(ValueError, match="page 5"):
        fetch_numbers(page, on_page=on_page)
    assert seen == list(range(500))


@given(st.integers(0, 450), st.integers(1, 120), st.integers(1, 20))
def test_on_page_receives_every_returned_record(count, clamp, moved_at):
    server = Server(count, clamp=clamp)

    def move(number):
        if number == moved_at and server.records:
            server.records.insert(0, server.records.pop())

    server.on_request = move
    seen = []
    found = fetch_numbers(server.page, on_page=seen.extend)
    assert set(found) == set(seen) == set(range(count))


def test_on_page_receives_pages_despite_earlier_error():
    server, seen = Server(1000), []
    served, failed = threading.Semaphore(0), threading.Event()

    def page(limit, offset):
        if offset == 500:
            for _ in range(4):
                assert served.acquire(timeout=10)
            failed.set()
            raise ValueError("page 5")
        result = server.page(limit, offset)
        if 0 < offset < 500:
            served.release()
        return result

    def on_page(items):
        seen.extend(items)
        if items[0] == 100:
            assert failed.wait(10)

    with pytest.raises(ValueError, match="page 5"):
        fetch_numbers(page, on_page=on_page)
    assert seen == list(range(500))


def test_on_page_error_stops_requests():
    server, resume = Server(100_000), threading.Event()

    def page(limit, offset):
        if offset > 1000:
            assert resume.wait(10)
        return server.page(limit, offset)

    def on_page(items):
        if items[0] == 200:
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fetch_numbers(page, on_page=on_page)
    resume.set()
    for thread in threading.enumerate():
        if thread.name == "page":
            thread.join(10)
    assert len(server.offsets) <= 11 + WORKERS
