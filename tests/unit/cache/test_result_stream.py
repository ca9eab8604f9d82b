from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tinkerfs import errors
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.context import RequestContext

CALL = RequestContext(timeout_s=30.0)


def outcome(error=None):
    future = Future()
    if error is None:
        future.set_result("the whole")
    else:
        future.set_exception(error)
    return future


def test_each_is_had_once_as_it_comes():
    parts = ResultStream()
    parts.add([("a", 1), ("b", 2)])
    each = parts.iterate(CALL)
    assert [next(each), next(each)] == [1, 2]
    with ThreadPoolExecutor() as threads:
        third = threads.submit(next, each)
        parts.add([("b", 20), ("c", 3)])
        assert third.result(10) == 3
        parts.add([("a", 10)])
        rest = threads.submit(list, each)
        parts.close(outcome())
        assert rest.result(10) == []
    assert list(parts.iterate(CALL)) == [1, 2, 3], "who comes late gets all of it"


def test_one_of_them_is_found_by_its_key():
    parts = ResultStream()
    assert parts.find("a") is None
    parts.add([("a", 1)])
    parts.add([("a", 2)])
    assert parts.find("a") == 1


def test_a_failure_comes_after_what_came_before_it():
    parts = ResultStream()
    parts.add([("a", 1)])
    parts.close(outcome(errors.ServerError("no more")))
    each = parts.iterate(CALL)
    assert next(each) == 1
    with pytest.raises(errors.ServerError):
        next(each)


def test_the_first_is_waited_for_as_anything_is_and_the_others_in_their_own_bound():
    parts = ResultStream()
    with pytest.raises(TimeoutError):
        next(parts.iterate(RequestContext(timeout_s=0.01, page_timeout_s=30.0)))
    parts.add([("a", 1)])
    each = parts.iterate(RequestContext(timeout_s=30.0, page_timeout_s=0.01))
    assert next(each) == 1
    with pytest.raises(TimeoutError):
        next(each)


def test_none_is_lost_between_threads():
    parts, count = ResultStream(), 20_000
    with ThreadPoolExecutor(5) as threads:
        readers = [threads.submit(lambda: list(parts.iterate(CALL))) for _ in range(4)]
        for start in range(0, count, 7):
            parts.add((n, n) for n in range(start, min(start + 7, count)))
        parts.close(outcome())
        for reader in readers:
            assert reader.result(30) == list(range(count))
