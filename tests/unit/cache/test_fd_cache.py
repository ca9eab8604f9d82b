"""Descriptors that are kept for the next read."""

import os
import resource
import time

import pytest

from tinkerfs.cache import fd_cache
from tinkerfs.cache.fd_cache import CachedFd, FdCache


@pytest.fixture
def opened(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    return lambda: CachedFd(os.open(path, os.O_RDONLY))


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def wait_until_closed(fd):
    deadline = time.monotonic() + 10
    while is_open(fd):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fd_cache, "GENERATION_S", 0.05)


@pytest.mark.usefixtures("quick")
def test_what_nobody_asks_for_is_closed_soon(opened):
    kept = FdCache()
    for _ in range(2):  # the second time by another thread that sweeps
        fd = opened().fd
        assert not is_open(fd)
        kept.keep(("file", 1), opened())
        fd = kept.get(("file", 1)).fd
        assert is_open(fd)
        wait_until_closed(fd)
        assert kept.get(("file", 1)) is None


@pytest.mark.usefixtures("quick")
def test_what_is_kept_again_stays(opened):
    kept = FdCache()
    kept.keep(("file", 1), opened())
    fd = kept.get(("file", 1)).fd
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        found = kept.get(("file", 1))
        assert found.fd == fd
        kept.keep(("file", 1), found)
        del found
        time.sleep(0.01)
    wait_until_closed(fd)


@pytest.mark.usefixtures("quick")
def test_what_was_kept_within_a_generation_is_recent(opened):
    kept = FdCache()
    kept.keep(("file", 1), opened())
    assert kept.recent(("file", 1)) is kept.get(("file", 1))
    deadline = time.monotonic() + 10
    while kept.recent(("file", 1)) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_is_sound_while_it_is_the_file_that_was_found_so(opened, tmp_path):
    descriptor, path = opened(), tmp_path / "file"
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    assert descriptor.is_intact()
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    assert descriptor.is_intact(), "it was used"
    os.truncate(path, 4)
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    os.utime(path, ns=(0, 0))
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    path.unlink()
    assert not descriptor.is_intact()


def test_there_is_a_bound(opened, monkeypatch):
    monkeypatch.setattr(fd_cache, "MAX_FDS", 4)
    kept = FdCache()
    for number in range(20):
        kept.keep(("file", number), opened())
    found = [number for number in range(20) if kept.get(("file", number)) is not None]
    assert 4 <= len(found) <= 8
    assert max(found) == 19


def test_they_are_a_share_of_what_the_process_may_have_open(opened, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (64, 64))
    kept = FdCache()
    for number in range(40):
        kept.keep(("file", number), opened())
    assert len([n for n in range(40) if kept.get(("file", n)) is not None]) == 16


def test_what_is_kept_again_ages_nothing(opened, monkeypatch):
    monkeypatch.setattr(fd_cache, "MAX_FDS", 4)
    kept = FdCache()
    for number in range(8):
        kept.keep(("file", number), opened())
    for _ in range(9):
        kept.keep(("file", 7), kept.get(("file", 7)))
    assert all(kept.get(("file", number)) is not None for number in range(8))


def test_nothing_is_kept_where_nobody_can_sweep(opened, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    kept = FdCache()
    with monkeypatch.context() as patch:
        patch.setattr(fd_cache, "in_thread", none)
        kept.keep(("file", 1), opened())
        assert kept.get(("file", 1)) is None
    kept.keep(("file", 1), opened())
    assert kept.get(("file", 1)) is not None


def test_those_of_a_file_can_be_let_go_of_but_not_from_under_who_reads(opened):
    kept = FdCache()
    kept.keep(("file", 1), opened())
    kept.keep(("other", 1), opened())
    reading = kept.get(("file", 1))
    kept.drop("file")
    assert kept.get(("file", 1)) is None
    assert kept.get(("other", 1)) is not None
    assert os.pread(reading.fd, 5, 0) == b"bytes"
    fd = reading.fd
    del reading
    assert not is_open(fd)
