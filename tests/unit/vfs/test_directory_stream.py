import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinkerfs import errors
from tinkerfs.vfs.directory_stream import MAX_KEPT_ENTRIES, DirectoryStream
from tinkerfs.vfs.node import Entry

LIMIT = 40


def entry(number):
    return Entry(str(number), number, 0, None)


ENTRIES = tuple(entry(n) for n in range(350))


def read_to_end(stream):
    found = []
    while batch := stream.read(len(found), LIMIT):
        assert len(batch) <= LIMIT
        found += batch
    return tuple(found)


def test_read_returns_entries_in_order_and_completes_once():
    completed = []
    stream = DirectoryStream(source=lambda: iter(ENTRIES), on_complete=completed.append)
    assert stream.read(0, LIMIT) == list(ENTRIES[:LIMIT])
    assert completed == []
    assert read_to_end(stream) == read_to_end(stream) == ENTRIES
    assert stream.read_all() == ENTRIES
    assert completed == [ENTRIES]
    assert stream.read(len(ENTRIES), LIMIT) == ()


def test_entries_are_built_on_demand():
    built = []
    stream = DirectoryStream(source=lambda: (built.append(each) or each for each in ENTRIES))
    assert built == []
    stream.read(0, 1)
    assert 0 < len(built) < len(ENTRIES)


def test_available_entries_are_not_copied():
    assert DirectoryStream(ENTRIES).read_all() is ENTRIES
    assert read_to_end(DirectoryStream(ENTRIES)) == ENTRIES
    assert read_to_end(DirectoryStream()) == ()


def test_read_of_available_entries_is_not_blocked():
    resume, is_blocked = threading.Event(), threading.Event()

    def source():
        yield from ENTRIES[:100]
        is_blocked.set()
        assert resume.wait(10)
        yield from ENTRIES[100:]

    stream = DirectoryStream(source=source)
    with ThreadPoolExecutor() as threads:
        first = stream.read(0, LIMIT)
        slow = threads.submit(stream.read, 100, LIMIT)
        assert is_blocked.wait(10)
        assert stream.read(0, LIMIT) == first
        assert stream.read(99, LIMIT) == [ENTRIES[99]]
        resume.set()
        assert slow.result(10) == list(ENTRIES[100 : 100 + LIMIT])
    assert read_to_end(stream) == ENTRIES


def test_failure_is_raised_once_after_available_entries():
    def source():
        yield from ENTRIES[:150]
        raise errors.not_found("/directory")

    completed = []
    stream = DirectoryStream(source=source, on_complete=completed.append)
    for start in range(0, 150, 50):
        assert stream.read(start, 50) == list(ENTRIES[start : start + 50])
    for read in (lambda: stream.read(150, 1), stream.read_all):
        with pytest.raises(FileNotFoundError):
            read()
    assert stream.read(149, LIMIT) == [ENTRIES[149]]
    # A program that continues after the error reaches the end; read_all() fails again.
    assert stream.read(150, 1) == []
    with pytest.raises(FileNotFoundError):
        stream.read_all()
    assert completed == []


@pytest.mark.parametrize("error", [errors.interrupted, lambda: errors.timed_out("", "late")])
def test_read_after_an_interruption_continues(error):
    failures = iter([error(), error(), None])

    def source():
        yield from ENTRIES[:150]
        if (failure := next(failures)) is not None:
            raise failure
        yield from ENTRIES[150:]

    completed = []
    stream = DirectoryStream(source=source, on_complete=completed.append)
    assert stream.read(149, LIMIT) == [ENTRIES[149]]
    with pytest.raises(OSError):  # noqa: PT011
        stream.read(150, LIMIT)
    assert stream.read(150, LIMIT) == list(ENTRIES[150:190])
    assert read_to_end(stream) == ENTRIES
    assert completed == [ENTRIES]


# --- long streams --------------------------------------------------------------------------------

LONG = 3 * MAX_KEPT_ENTRIES


class Source:
    """Yields many entries, and counts how often it is started and how many it yields.

    Attributes:
        fails_at: position at which it is interrupted once.
    """

    def __init__(self, fails_at=None):
        self.starts = self.yielded = 0
        self.fails_at = fails_at

    def __call__(self):
        self.starts += 1
        for number in range(LONG):
            if number == self.fails_at:
                self.fails_at = None
                raise errors.interrupted()
            self.yielded += 1
            yield entry(number)


def test_long_stream_keeps_only_the_latest_entries():
    source, completed = Source(), []
    stream = DirectoryStream(source=source, on_complete=completed.append)
    tracemalloc.start()
    try:
        offset = 0
        while batch := stream.read(offset, 256):
            assert batch[0].name == str(offset)
            offset += len(batch)
        _kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert offset == LONG
    assert most_bytes < 200 * (MAX_KEPT_ENTRIES + LONG // 8)
    assert (source.starts, source.yielded) == (1, LONG)
    assert completed == []
    assert stream.read(LONG, 1) == ()
    assert stream.read(LONG - 1000, 1) == (entry(LONG - 1000),)
    assert source.starts == 1


@pytest.mark.parametrize("is_complete", [False, True])
def test_reader_that_goes_back_gets_the_same_entries(is_complete):
    source = Source()
    stream = DirectoryStream(source=source)
    assert len(stream.read(LONG - (not is_complete), 1)) == (not is_complete)
    assert stream.read(5, 2) == [entry(5), entry(6)]
    assert source.starts == 2
    assert list(stream.read(LONG - 1, 5)) == [entry(LONG - 1)]
    assert tuple(each.name for each in stream.read_all()) == tuple(map(str, range(LONG)))


def test_long_stream_continues_after_an_interruption():
    source = Source(fails_at=LONG - 50)
    stream = DirectoryStream(source=source)
    offset = 0
    while batch := stream.read(offset, 100):
        assert [each.name for each in batch] == [str(offset + n) for n in range(len(batch))]
        offset += len(batch)
    assert (offset, source.starts) == (LONG, 2)
