import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinkerfs import errors
from tinkerfs.vfs.directory_stream import DirectoryStream
from tinkerfs.vfs.node import Entry

MOST = 40


def entry(number):
    return Entry(str(number), number, 0, None)


ALL = tuple(entry(n) for n in range(350))


def read(scan):
    found = []
    while some := scan.read(len(found), MOST):
        assert len(some) <= MOST
        found += some
    return tuple(found)


def test_all_are_handed_out_in_order_and_told_once_when_whole():
    told = []
    scan = DirectoryStream(source=lambda: iter(ALL), on_complete=told.append)
    assert scan.read(0, MOST) == list(ALL[:MOST])
    assert told == []
    assert read(scan) == read(scan) == ALL
    assert scan.read_all() == ALL
    assert told == [ALL]
    assert scan.read(len(ALL), MOST) == ()


def test_nothing_is_made_before_it_is_asked_for():
    made = []
    scan = DirectoryStream(source=lambda: (made.append(each) or each for each in ALL))
    assert made == []
    scan.read(0, 1)
    assert 0 < len(made) < len(ALL)


def test_what_is_known_is_not_copied():
    assert DirectoryStream(ALL).read_all() is ALL
    assert read(DirectoryStream(ALL)) == ALL
    assert read(DirectoryStream()) == ()


def test_what_is_there_is_had_while_somebody_waits_for_more():
    wait, waiting = threading.Event(), threading.Event()

    def more():
        yield from ALL[:100]
        waiting.set()
        assert wait.wait(10)
        yield from ALL[100:]

    scan = DirectoryStream(source=more)
    with ThreadPoolExecutor() as threads:
        first = scan.read(0, MOST)
        slow = threads.submit(scan.read, 100, MOST)
        assert waiting.wait(10)
        assert scan.read(0, MOST) == first
        assert scan.read(99, MOST) == [ALL[99]]
        wait.set()
        assert slow.result(10) == list(ALL[100 : 100 + MOST])
    assert read(scan) == ALL


def test_failure_comes_once_after_what_came_before():
    def more():
        yield from ALL[:150]
        raise errors.not_found("/folder")

    told = []
    scan = DirectoryStream(source=more, on_complete=told.append)
    for start in range(0, 150, 50):
        assert scan.read(start, 50) == list(ALL[start : start + 50])
    for look in (lambda: scan.read(150, 1), scan.read_all):
        with pytest.raises(FileNotFoundError):
            look()
    assert scan.read(149, MOST) == [ALL[149]]
    # A program that reads on after an error comes to an end; a new listing fails again.
    assert scan.read(150, 1) == []
    with pytest.raises(FileNotFoundError):
        scan.read_all()
    assert told == []


@pytest.mark.parametrize("error", [errors.interrupted, lambda: errors.timed_out("", "late")])
def test_who_was_interrupted_while_waiting_goes_on_where_that_was(error):
    waits = iter([error(), error(), None])

    def more():
        yield from ALL[:150]
        if (failure := next(waits)) is not None:
            raise failure
        yield from ALL[150:]

    told = []
    scan = DirectoryStream(source=more, on_complete=told.append)
    assert scan.read(149, MOST) == [ALL[149]]
    with pytest.raises(OSError):  # noqa: PT011
        scan.read(150, MOST)
    assert scan.read(150, MOST) == list(ALL[150:190])
    assert read(scan) == ALL
    assert told == [ALL]
