"""Blocks on their way to disk: written as they come, whatever the disk does, several a request."""

import errno
import os
import re
from contextlib import closing, contextmanager

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tinkerfs.cache.blocks import BlockCache, BlockFile
from tinkerfs.cache.drafts import Draft
from tinkerfs.call import IN_PROCESS
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.remote import BLOCK_BYTES

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE = "GET store/archive"


def read(mount, subject):
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        places = range(0, file.size_bytes, MIB)
        return b"".join(file.read(MIB, offset, IN_PROCESS) for offset in places)


def asked(server):
    """Return the ranges that were asked for, in blocks, and how many bytes were sent."""
    server.journal.wait_until_idle()
    entries = server.journal.entries(ARCHIVE)
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", entry.range).groups() for entry in entries]
    blocks = [(int(a) / BLOCK_BYTES, (int(b) + 1) / BLOCK_BYTES) for a, b in ranges]
    return sorted(blocks), sum(entry.sent_bytes for entry in entries)


@pytest.fixture
def opened(demo_server, weights_of):
    """A server with one file of 30 MiB, and a mount that knows it and has nothing of it."""
    server = demo_server(runs=1, size_bytes=30 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, IN_PROCESS)
    server.journal.clear()
    return server, subject, mount


def failing(method, at, error):
    """Return a method of drafts that fails at its call number `at` of each draft."""
    calls = {}

    def wrapped(draft, *arguments):
        calls[draft] = calls.get(draft, 0) + 1
        if calls[draft] > at:
            raise OSError(error, os.strerror(error))
        return method(draft, *arguments)

    return wrapped


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.expect_warnings("telemetry")
def test_what_the_disk_no_longer_takes_goes_on_in_memory(opened, monkeypatch, at, error):
    server, subject, mount = opened
    monkeypatch.setattr(Draft, "write", failing(Draft.write, at, error))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 31 * MIB, "nothing was fetched again"
    assert errno.errorcode[error] in mount.telemetry.errors_text()
    assert not [path for path in mount.cache.folder.rglob(".*") if path.is_file()]


@pytest.mark.expect_warnings("telemetry")
def test_what_the_disk_neither_takes_nor_gives_back_is_fetched_again(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(Draft, "write", failing(Draft.write, 1, errno.EIO))
    monkeypatch.setattr(Draft, "written", failing(Draft.written, 0, errno.EIO))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 3 * 31 * MIB


@pytest.mark.expect_warnings("telemetry")
def test_a_block_that_cannot_get_its_name_is_in_memory(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(Draft, "commit", failing(Draft.commit, 0, errno.EROFS))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 31 * MIB
    assert not [path for path in mount.cache.folder.rglob("*") if path.name.isdigit()]


def test_a_block_that_goes_from_the_disk_as_it_lands_is_fetched_into_memory(opened, monkeypatch):
    server, subject, mount = opened
    keep = BlockFile.keep

    def lost(file, index, draft):
        is_kept = keep(file, index, draft)
        file.drop(index)
        return is_kept

    monkeypatch.setattr(BlockFile, "keep", lost)
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 3 * 31 * MIB


def test_what_is_far_ahead_is_asked_for_two_blocks_at_a_time(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=300 * MIB, latency_s=0.02)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, IN_PROCESS)
    server.journal.clear()
    assert read(mount, subject) == truth(server, subject, NAME)
    ranges, sent_bytes = asked(server)
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) == 2
    assert len(ranges) < 0.8 * 300 * MIB / BLOCK_BYTES
    assert sent_bytes < 300 * MIB + 2 * BLOCK_BYTES


@contextmanager
def another_process(mount):
    """Open the same file of the cache as another process has it."""
    cache = BlockCache(mount.cache.folder, Telemetry(), limit_bytes=1 << 34, floor_bytes=0)
    [folder] = [path for path in cache.folder.iterdir() if (path / "lock").exists()]
    with closing(cache.open("?", "?")) as file:
        file._name, file._folder = folder.name, str(folder)
        file.prepare()
        yield file


def test_a_request_ends_before_a_block_that_another_process_is_at(opened):
    server, subject, mount = opened
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        remote = file._file
        assert file.read(9, 0, IN_PROCESS)  # so that there is a folder
        server.journal.clear()
        with another_process(mount) as other:
            data = truth(server, subject, NAME)[: 5 * BLOCK_BYTES]
            with other.claimed(3, 0.0) as is_mine:
                assert is_mine
                remote.fetch_ahead(2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
                flight = remote.fetch(3, IN_PROCESS)
                remote.fetch(2, IN_PROCESS).result(10)
                assert not flight.done()
                offset = file._segments[0].place
                other.put(3, data[3 * BLOCK_BYTES - offset :][:BLOCK_BYTES])
            assert flight.result(10) is None
    assert asked(server)[0] == [(2, 3)]


def test_a_request_ends_before_a_block_whose_start_is_there(opened):
    server, subject, mount = opened
    server.faults.add("store", cut_after_bytes=MIB, times=1)
    server.faults.add("store", status=500, times=8)
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        remote = file._file
        assert remote.fetch(3, IN_PROCESS).exception(30) is not None
        server.faults.clear()
        server.journal.clear()
        remote.fetch_ahead(2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        remote.fetch(3, IN_PROCESS).result(10)
        remote.fetch(2, IN_PROCESS).result(10)
    assert asked(server)[0] == [(2, 3), (3.25, 4)]


def test_a_block_under_way_is_not_part_of_another_request(opened):
    server, subject, mount = opened
    server.faults.add("store", hang=True)
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        remote = file._file
        flight = remote.fetch(3, IN_PROCESS)
        reached = remote.fetch_ahead(BLOCK_BYTES, 6 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        assert reached == 6 * BLOCK_BYTES
        for index in (1, 2, 4, 5):
            remote.fetch(index, IN_PROCESS).result(10)
        server.faults.clear()
        flight.result(10)
    assert asked(server)[0] == [(1, 3), (3, 4), (4, 6)]
