from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter

import pytest

from tinkerfs import errors
from tinkerfs.api.pagination import RecordList
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.context import RequestContext

CTX = RequestContext(timeout_s=30.0)


class Load:
    """A stream and the pairs that it shows."""

    def __init__(self):
        self.stream = ResultStream()
        self._pairs = RecordList(itemgetter(0))

    def add(self, *pairs):
        for pair in pairs:
            self._pairs.add(pair)
        self.stream.show(self._pairs)


def outcome(error=None):
    future = Future()
    if error is None:
        future.set_result("the value")
    else:
        future.set_exception(error)
    return future


def test_iterate_yields_each_value_once_on_arrival():
    load = Load()
    load.add(("a", 1), ("b", 2))
    each = load.stream.iterate(CTX)
    assert [next(each), next(each)] == [("a", 1), ("b", 2)]
    with ThreadPoolExecutor() as threads:
        third = threads.submit(next, each)
        load.add(("b", 20), ("c", 3))
        assert third.result(10) == ("c", 3)
        load.add(("a", 10))
        rest = threads.submit(list, each)
        load.stream.close(outcome())
        assert rest.result(10) == []
    late = list(load.stream.iterate(CTX))
    assert late == [("a", 1), ("b", 2), ("c", 3)], "a late reader gets every value"


def test_find_returns_the_first_value_of_a_key():
    load = Load()
    assert load.stream.find("a") is None
    load.add(("a", 1))
    load.add(("a", 2))
    assert load.stream.find("a") == ("a", 1)


def test_error_is_raised_after_the_values_before_it():
    load = Load()
    load.add(("a", 1))
    load.stream.close(outcome(errors.ServerError("no more")))
    each = load.stream.iterate(CTX)
    assert next(each) == ("a", 1)
    with pytest.raises(errors.ServerError):
        next(each)


def test_page_timeout_applies_after_the_first_value():
    load = Load()
    with pytest.raises(TimeoutError):
        next(load.stream.iterate(RequestContext(timeout_s=0.01, page_timeout_s=30.0)))
    load.add(("a", 1))
    each = load.stream.iterate(RequestContext(timeout_s=30.0, page_timeout_s=0.01))
    assert next(each) == ("a", 1)
    with pytest.raises(TimeoutError):
        next(each)


def test_concurrent_readers_get_every_value():
    load, count = Load(), 20_000
    with ThreadPoolExecutor(5) as threads:
        readers = [threads.submit(lambda: list(load.stream.iterate(CTX))) for _ in range(4)]
        for start in range(0, count, 7):
            load.add(*((n, n) for n in range(start, min(start + 7, count))))
        load.stream.close(outcome())
        for reader in readers:
            assert reader.result(30) == [(n, n) for n in range(count)]
