"""Cache of open descriptors for later reads."""

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
def test_unused_fd_is_closed_soon(opened):
    fds = FdCache()
    for _ in range(2):  # the second time with another sweeper thread
        fd = opened().fd
        assert not is_open(fd)
        fds.keep(("file", 1), opened())
        fd = fds.get(("file", 1)).fd
        assert is_open(fd)
        wait_until_closed(fd)
        assert fds.get(("file", 1)) is None


@pytest.mark.usefixtures("quick")
def test_fd_that_is_kept_repeatedly_stays_open(opened):
    fds = FdCache()
    fds.keep(("file", 1), opened())
    fd = fds.get(("file", 1)).fd
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        found = fds.get(("file", 1))
        assert found.fd == fd
        fds.keep(("file", 1), found)
        del found
        time.sleep(0.01)
    wait_until_closed(fd)


@pytest.mark.usefixtures("quick")
def test_fd_is_recent_for_one_generation(opened):
    fds = FdCache()
    fds.keep(("file", 1), opened())
    assert fds.recent(("file", 1)) is fds.get(("file", 1))
    deadline = time.monotonic() + 10
    while fds.recent(("file", 1)) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_fd_is_intact_until_the_file_changes(opened, tmp_path):
    descriptor, path = opened(), tmp_path / "file"
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    assert descriptor.is_intact()
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns))
    assert descriptor.is_intact(), "only the access time changed"
    os.truncate(path, 4)
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    os.utime(path, ns=(0, 0))
    assert not descriptor.is_intact()
    descriptor.mark_intact(os.fstat(descriptor.fd))
    path.unlink()
    assert not descriptor.is_intact()


def test_number_of_fds_is_bounded(opened, monkeypatch):
    monkeypatch.setattr(fd_cache, "MAX_FDS", 4)
    fds = FdCache()
    for number in range(20):
        fds.keep(("file", number), opened())
    found = [number for number in range(20) if fds.get(("file", number)) is not None]
    assert 4 <= len(found) <= 8
    assert max(found) == 19


def test_number_of_fds_is_a_share_of_the_rlimit(opened, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (64, 64))
    fds = FdCache()
    for number in range(40):
        fds.keep(("file", number), opened())
    assert len([n for n in range(40) if fds.get(("file", n)) is not None]) == 16


def test_keeping_an_fd_again_evicts_no_other(opened, monkeypatch):
    monkeypatch.setattr(fd_cache, "MAX_FDS", 4)
    fds = FdCache()
    for number in range(8):
        fds.keep(("file", number), opened())
    for _ in range(9):
        fds.keep(("file", 7), fds.get(("file", 7)))
    assert all(fds.get(("file", number)) is not None for number in range(8))


def test_nothing_is_cached_if_no_thread_can_be_started(opened, monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    fds = FdCache()
    with monkeypatch.context() as patch:
        patch.setattr(fd_cache, "run_in_thread", fail)
        fds.keep(("file", 1), opened())
        assert fds.get(("file", 1)) is None
    fds.keep(("file", 1), opened())
    assert fds.get(("file", 1)) is not None


def test_drop_of_a_file_keeps_an_fd_in_use_open(opened):
    fds = FdCache()
    fds.keep(("file", 1), opened())
    fds.keep(("other", 1), opened())
    reading = fds.get(("file", 1))
    fds.drop("file")
    assert fds.get(("file", 1)) is None
    assert fds.get(("other", 1)) is not None
    assert os.pread(reading.fd, 5, 0) == b"bytes"
    fd = reading.fd
    del reading
    assert not is_open(fd)
