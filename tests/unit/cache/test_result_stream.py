from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tinkerfs import errors
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.context import RequestContext

CTX = RequestContext(timeout_s=30.0)


def outcome(error=None):
    future = Future()
    if error is None:
        future.set_result("the value")
    else:
        future.set_exception(error)
    return future


def test_iterate_yields_each_value_once_on_arrival():
    stream = ResultStream()
    stream.add([("a", 1), ("b", 2)])
    each = stream.iterate(CTX)
    assert [next(each), next(each)] == [1, 2]
    with ThreadPoolExecutor() as threads:
        third = threads.submit(next, each)
        stream.add([("b", 20), ("c", 3)])
        assert third.result(10) == 3
        stream.add([("a", 10)])
        rest = threads.submit(list, each)
        stream.close(outcome())
        assert rest.result(10) == []
    assert list(stream.iterate(CTX)) == [1, 2, 3], "a late reader gets every value"


def test_find_returns_the_first_value_of_a_key():
    stream = ResultStream()
    assert stream.find("a") is None
    stream.add([("a", 1)])
    stream.add([("a", 2)])
    assert stream.find("a") == 1


def test_error_is_raised_after_the_values_before_it():
    stream = ResultStream()
    stream.add([("a", 1)])
    stream.close(outcome(errors.ServerError("no more")))
    each = stream.iterate(CTX)
    assert next(each) == 1
    with pytest.raises(errors.ServerError):
        next(each)


def test_page_timeout_applies_after_the_first_value():
    stream = ResultStream()
    with pytest.raises(TimeoutError):
        next(stream.iterate(RequestContext(timeout_s=0.01, page_timeout_s=30.0)))
    stream.add([("a", 1)])
    each = stream.iterate(RequestContext(timeout_s=30.0, page_timeout_s=0.01))
    assert next(each) == 1
    with pytest.raises(TimeoutError):
        next(each)


def test_concurrent_readers_get_every_value():
    stream, count = ResultStream(), 20_000
    with ThreadPoolExecutor(5) as threads:
        readers = [threads.submit(lambda: list(stream.iterate(CTX))) for _ in range(4)]
        for start in range(0, count, 7):
            stream.add((n, n) for n in range(start, min(start + 7, count)))
        stream.close(outcome())
        for reader in readers:
            assert reader.result(30) == list(range(count))
