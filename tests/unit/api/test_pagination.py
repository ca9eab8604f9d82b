"""Listings that lie, clamp, and change while they are read, as functions of (limit, offset)."""

import threading

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinkerfs.api.models import Page
from tinkerfs.api.pagination import fetch_all_pages

#: Pages at once, unless told otherwise.
WORKERS = 8


class Server:
    """A listing of numbers.

    Attributes:
        calls: the offset of each page that was asked for.
        on_call: called with the number of each call, from 1, before it is answered.
    """

    def __init__(self, count, *, clamp=100, total=..., tells_limit=True, ignores_offset=False):
        self.records = list(range(count))
        self.clamp, self.total, self.tells_limit = clamp, total, tells_limit
        self.ignores_offset = ignores_offset
        self.calls = []
        self.on_call = lambda number: None
        self._lock = threading.Lock()

    def page(self, limit, offset):
        with self._lock:
            self.calls.append(offset)
            self.on_call(len(self.calls))
            offset = 0 if self.ignores_offset else offset
            size = min(limit, self.clamp)
            items = tuple(self.records[offset : offset + size])
            total = self.total(len(self.records)) if callable(self.total) else self.total
            return Page(
                items,
                len(self.records) if total is ... else total,
                size if self.tells_limit else None,
                len(items),
            )

    def read(self):
        return list(fetch_all_pages(self.page, lambda number: number))


@pytest.mark.parametrize(
    ("count", "calls"), [(0, 1), (1, 1), (99, 1), (100, 1), (101, 2), (1000, 10), (1001, 11)]
)
def test_as_many_calls_as_pages(count, calls):
    server = Server(count)
    assert server.read() == list(range(count))
    assert sorted(server.calls) == [100 * n for n in range(calls)]


@given(
    st.integers(0, 450),
    st.integers(1, 120),
    st.one_of(st.just(...), st.none(), st.integers(0, 1000)),
    st.booleans(),
)
def test_nothing_is_lost_whatever_the_server_says(count, clamp, total, tells_limit):
    # A count that is wrong by whole pages looks like the truth; telling would cost a call always.
    assume(total in (..., None) or not (0 < total < count and total % min(clamp, 100) == 0))
    server = Server(count, clamp=clamp, total=total, tells_limit=tells_limit)
    assert server.read() == list(range(count))


@given(st.integers(0, 450), st.integers(1, 120))
def test_a_clamp_costs_no_call_too_many(count, clamp):
    server = Server(count, clamp=clamp)
    server.read()
    assert len(server.calls) == max(-(-count // min(clamp, 100)), 1)


def test_pages_are_read_at_once_but_not_all():
    server = Server(5000)
    full = threading.Barrier(WORKERS)
    now, most = 0, 0
    lock = threading.Lock()

    def page(limit, offset):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if 0 < offset <= 100 * WORKERS:
            full.wait(10)  # breaks where they come one after the other
        result = server.page(limit, offset)
        with lock:
            now -= 1
        return result

    assert fetch_all_pages(page, lambda n: n) == tuple(range(5000))
    assert most == WORKERS
    assert len(server.calls) == 50


def test_a_run_that_moves_to_the_front_is_not_lost():
    server = Server(1000)

    def move(number):
        if number == 2:
            server.records.insert(0, server.records.pop())

    server.on_call = move
    assert sorted(server.read()) == list(range(1000))
    assert len(server.calls) <= 12


def test_a_run_that_is_created_meanwhile_costs_no_other():
    server = Server(1000)
    server.on_call = lambda number: server.records.insert(0, 5000) if number == 4 else None
    assert sorted(server.read()) == [*range(1000), 5000]


def test_a_run_that_is_deleted_meanwhile_costs_no_other():
    server = Server(1000)
    server.on_call = lambda number: server.records.remove(3) if number == 3 else None
    assert sorted(server.read()) == sorted(server.records)


def test_an_account_that_never_rests_ends_all_the_same():
    server = Server(300)
    server.on_call = lambda number: server.records.insert(0, 1000 + number)
    found = server.read()
    assert set(range(300)) <= set(found)
    assert len(server.calls) < 40


def test_a_count_far_too_large_is_not_believed():
    server = Server(250, total=10**12)
    assert server.read() == list(range(250))
    assert len(server.calls) <= 3 + WORKERS


def test_a_server_without_offset_is_read_once_more():
    server = Server(100, total=None, ignores_offset=True)
    assert server.read() == list(range(100))
    assert len(server.calls) == 2


def test_skyrl_counts_zero_past_the_end():
    server = Server(200, total=None)
    server.total = lambda count: count if server.calls[-1] < count else 0
    assert server.read() == list(range(200))
    assert len(server.calls) == 2


def test_a_page_that_fails_fails_the_listing():
    server = Server(5000)

    def page(limit, offset):
        if offset == 700:
            raise ValueError("page 7")
        return server.page(limit, offset)

    with pytest.raises(ValueError, match="page 7"):
        fetch_all_pages(page, lambda n: n)
    assert len(server.calls) < 50


def test_records_that_cannot_be_read_count_as_received():
    server = Server(250)

    def page(limit, offset):
        one = server.page(limit, offset)
        return Page(one.items[1:], one.total_count, one.limit, one.received)

    assert len(fetch_all_pages(page, lambda n: n)) == 247
    assert len(server.calls) == 3


def test_pages_are_told_in_order_and_before_the_last_has_come():
    server = Server(1000)
    told, later = [], threading.Event()

    def page(limit, offset):
        if offset == 200:  # the pages after it come first, and wait for their turn
            assert later.wait(10)
        if offset == 900:
            later.set()
        return server.page(limit, offset)

    def came(items):
        told.extend(items)
        if items[0] == 0:
            assert server.calls == [0]

    assert fetch_all_pages(page, lambda n: n, on_page=came) == tuple(range(1000))
    assert told == list(range(1000))


def test_what_came_before_a_page_that_fails_was_told():
    server, told, failing = Server(1000), [], threading.Event()

    def page(limit, offset):
        if offset == 500:
            assert failing.wait(10)
            raise ValueError("page 5")
        return server.page(limit, offset)

    def came(items):
        told.extend(items)
        if items[-1] == 499:
            failing.set()

    with pytest.raises(ValueError, match="page 5"):
        fetch_all_pages(page, lambda n: n, on_page=came)
    assert told == list(range(500))


@given(st.integers(0, 450), st.integers(1, 120), st.integers(1, 20))
def test_all_that_is_returned_was_told(count, clamp, moved_at):
    server = Server(count, clamp=clamp)

    def move(number):
        if number == moved_at and server.records:
            server.records.insert(0, server.records.pop())

    server.on_call = move
    told = []
    found = fetch_all_pages(server.page, lambda number: number, on_page=told.extend)
    assert set(found) == set(told) == set(range(count))


def test_what_came_is_told_also_where_a_later_page_failed_meanwhile():
    server, told = Server(1000), []
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

    def came(items):
        told.extend(items)
        if items[0] == 100:
            assert failed.wait(10)

    with pytest.raises(ValueError, match="page 5"):
        fetch_all_pages(page, lambda n: n, on_page=came)
    assert told == list(range(500))


def test_who_cannot_take_a_page_asks_for_no_more():
    server, go_on = Server(100_000), threading.Event()

    def page(limit, offset):
        if offset > 1000:
            assert go_on.wait(10)
        return server.page(limit, offset)

    def came(items):
        if items[0] == 200:
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fetch_all_pages(page, lambda n: n, on_page=came)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tinkerfs-page"):
            thread.join(10)
    assert len(server.calls) <= 11 + WORKERS
