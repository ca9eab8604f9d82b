"""Blocks on their way to disk: written as they come, whatever the disk does, several a request."""

import errno
import os
import random
import re
import shutil
import time
from contextlib import closing, contextmanager
from functools import partial

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tinkerfs.cache import block_writer
from tinkerfs.cache.block_cache import BlockCache, BlockFile
from tinkerfs.cache.block_writer import BlockWriter
from tinkerfs.concurrency import run_concurrently
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import remote_file as remote_module
from tinkerfs.weights.block_math import BLOCK_BYTES
from tinkerfs.weights.prefetch import prefetch
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE = "GET store/archive"


def read(mount, subject):
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        places = range(0, file.size_bytes, MIB)
        return b"".join(file.read(MIB, offset, BACKGROUND_CONTEXT) for offset in places)


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
    mount.weights.files(subject, BACKGROUND_CONTEXT)
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
    monkeypatch.setattr(BlockWriter, "write", failing(BlockWriter.write, at, error))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 31 * MIB, "nothing was fetched again"
    assert errno.errorcode[error] in mount.telemetry.errors_text()
    assert not [path for path in mount.cache.folder.rglob(".*") if path.is_file()]


@pytest.mark.expect_warnings("telemetry")
def test_what_the_disk_neither_takes_nor_gives_back_is_fetched_again(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(BlockWriter, "write", failing(BlockWriter.write, 1, errno.EIO))
    monkeypatch.setattr(BlockWriter, "read_back", failing(BlockWriter.read_back, 0, errno.EIO))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 3 * 31 * MIB


@pytest.mark.expect_warnings("telemetry")
def test_a_block_that_cannot_get_its_name_is_in_memory(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(BlockWriter, "commit", failing(BlockWriter.commit, 0, errno.EROFS))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 31 * MIB
    assert not [path for path in mount.cache.folder.rglob("*") if path.name.isdigit()]


def test_a_block_that_goes_from_the_disk_as_it_lands_is_fetched_into_memory(opened, monkeypatch):
    server, subject, mount = opened
    keep = BlockFile.commit

    def lost(file, index, draft):
        is_kept = keep(file, index, draft)
        file.drop(index)
        return is_kept

    monkeypatch.setattr(BlockFile, "commit", lost)
    assert read(mount, subject) == truth(server, subject, NAME)
    assert asked(server)[1] < 3 * 31 * MIB


def test_what_is_far_ahead_is_asked_for_two_blocks_at_a_time(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=300 * MIB, latency_s=0.02)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
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
    cache = BlockCache(mount.cache.folder, Telemetry(), max_bytes=1 << 34, min_free_bytes=0)
    [folder] = [path for path in cache.folder.iterdir() if (path / "lock").exists()]
    with closing(cache.open("?", "?")) as file:
        file._name, file._folder = folder.name, str(folder)
        file.ensure_directory()
        yield file


def test_a_request_ends_before_a_block_that_another_process_is_at(opened):
    server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        assert file.read(9, 0, BACKGROUND_CONTEXT)  # so that there is a folder
        server.journal.clear()
        with another_process(mount) as other:
            data = truth(server, subject, NAME)[: 5 * BLOCK_BYTES]
            with other.lock_block(3, 0.0) as is_mine:
                assert is_mine
                remote.fetch_ahead(2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
                flight = remote.fetch(3, BACKGROUND_CONTEXT)
                remote.fetch(2, BACKGROUND_CONTEXT).result(10)
                assert not flight.done()
                offset = file._segments[0].place
                other.put(3, data[3 * BLOCK_BYTES - offset :][:BLOCK_BYTES])
            assert flight.result(10) is None
    assert asked(server)[0] == [(2, 3)]


def test_a_request_ends_before_a_block_whose_start_is_there(opened):
    server, subject, mount = opened
    server.faults.add("store", cut_after_bytes=MIB, times=1)
    server.faults.add("store", status=500, times=8)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        assert remote.fetch(3, BACKGROUND_CONTEXT).exception(30) is not None
        server.faults.clear()
        server.journal.clear()
        remote.fetch_ahead(2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        remote.fetch(3, BACKGROUND_CONTEXT).result(10)
        remote.fetch(2, BACKGROUND_CONTEXT).result(10)
    assert asked(server)[0] == [(2, 3), (3.25, 4)]


def test_a_block_under_way_is_not_part_of_another_request(opened):
    server, subject, mount = opened
    server.faults.add("store", hang=True, when=lambda entry: "=12582912-" in entry.range)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        flight = remote.fetch(3, BACKGROUND_CONTEXT)
        reached = remote.fetch_ahead(BLOCK_BYTES, 6 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        assert reached == 6 * BLOCK_BYTES
        for index in (1, 2, 4, 5):
            remote.fetch(index, BACKGROUND_CONTEXT).result(10)
        server.faults.clear()
        flight.result(10)
    assert asked(server)[0] == [(1, 3), (3, 4), (4, 6)]


@pytest.mark.expect_warnings("telemetry")
def test_a_draft_is_closed_once_whatever_closing_says(opened, monkeypatch):
    """EDQUOT of a `close` (NFS): the number is free by then, and may be another file's."""
    server, subject, mount = opened
    closed, close = [], os.close

    def failing_once(fd):
        close(fd)
        closed.append(fd)
        if len(closed) == 1:
            raise OSError(errno.EDQUOT, "quota")

    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        remote.fetch(0, BACKGROUND_CONTEXT).result(10)
        monkeypatch.setattr(block_writer, "os", Stand(os, close=failing_once))
        flights = [remote.fetch(1, BACKGROUND_CONTEXT, 2), remote.fetch(2, BACKGROUND_CONTEXT)]
        assert [flight.exception(10) for flight in flights] == [None, None]
    assert closed
    eventually(lambda: not mount.weights.memory._reserved_bytes)
    monkeypatch.undo()
    assert read(mount, subject) == truth(server, subject, NAME)


class Stand:
    """A module with some functions of its own."""

    def __init__(self, module, **own):
        self._module = module
        self.__dict__ |= own

    def __getattr__(self, name):
        return getattr(self._module, name)


def test_what_could_not_be_begun_ahead_is_told_even_if_it_could_a_moment_later(opened):
    _server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote, begun, answers = file._file, [], iter([True, False])

        def launch(run):
            if not next(answers, True):
                return False
            begun.extend(run)
            return True

        remote._start_prefetch = launch
        reached = remote.fetch_ahead(0, 7 * BLOCK_BYTES, BLOCK_BYTES)
    assert begun == [0]
    assert reached == BLOCK_BYTES


def test_a_block_is_nobody_s_claim_once_it_is_there(opened):
    server, subject, mount = opened
    server.faults.add("store", stall_after_bytes=BLOCK_BYTES + MIB, times=1)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        assert remote.fetch(2, BACKGROUND_CONTEXT, 2).result(10) is None
        with another_process(mount) as other:
            with other.lock_block(2, 5.0) as is_mine:
                assert is_mine
            with other.lock_block(3, 0.0) as is_mine:
                assert not is_mine
        server.faults.clear()
        remote.fetch(3, BACKGROUND_CONTEXT).result(20)


@pytest.mark.expect_warnings("telemetry")
def test_a_pass_goes_on_to_the_disk_behind_a_block_that_was_lost(opened, monkeypatch):
    server, subject, mount = opened
    server.faults.add("store", ignore_range=True, times=None)
    calls, write = [], BlockWriter.write

    def once(draft, data):
        calls.append(draft)
        if len(calls) == 2:
            raise OSError(errno.EIO, "x")
        return write(draft, data)

    monkeypatch.setattr(BlockWriter, "write", once)
    monkeypatch.setattr(BlockWriter, "read_back", failing(BlockWriter.read_back, 0, errno.EIO))
    assert read(mount, subject) == truth(server, subject, NAME)
    kept = {path.name for path in mount.cache.folder.rglob("*") if path.name.isdigit()}
    assert len(kept) >= 7


def test_where_there_can_be_no_thread_nobody_waits_for_ever(opened, monkeypatch):
    _server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        with monkeypatch.context() as patch:
            patch.setattr(remote_module, "in_thread", no_thread)
            with pytest.raises(RuntimeError):
                remote.fetch(0, BACKGROUND_CONTEXT)
        assert remote.fetch(0, BACKGROUND_CONTEXT).result(10) is None
        assert remote.is_idle()
        eventually(lambda: not remote._requests)


def no_thread(*_arguments):
    raise RuntimeError("can't start new thread")


def test_what_was_waited_for_in_memory_is_used(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=250 * MIB)
    subject, mount = subject_of(server), weights_of(server, limit_bytes=0)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        for index in range(40):
            file.read(1, index * 17 % 59 * BLOCK_BYTES + 77, BACKGROUND_CONTEXT)
        assert mount.weights.memory.can_prefetch(100 * MIB)


@pytest.mark.expect_warnings("telemetry")
@pytest.mark.parametrize("ignores_range", [False, True])
def test_many_readers_of_a_bad_disk_and_a_bad_store_get_the_right_bytes(
    demo_server, weights_of, monkeypatch, ignores_range
):
    """Writes that stop halfway, drafts that cannot be read, cuts, and a cache that is deleted."""
    server = demo_server(runs=1, size_bytes=40 * MIB)
    subject, mount = subject_of(server), weights_of(server, memory_bytes=24 * MIB)
    expected, rng = truth(server, subject, NAME), random.Random(1)
    write, commit, written = BlockWriter.write, BlockWriter.commit, BlockWriter.read_back

    def half_write(draft, data):
        if rng.random() < 0.1:
            write(draft, data[: len(data) // 2])
            draft._size_bytes -= len(data) // 2
            raise OSError(errno.ENOSPC, "x")
        write(draft, data)

    def no_commit(draft, *arguments):
        if rng.random() < 0.1:
            raise OSError(rng.choice([errno.EIO, errno.ENOENT]), "x")
        return commit(draft, *arguments)

    def not_written(draft):
        if rng.random() < 0.05:
            raise OSError(errno.EIO, "x")
        return written(draft)

    monkeypatch.setattr(BlockWriter, "write", half_write)
    monkeypatch.setattr(BlockWriter, "commit", no_commit)
    monkeypatch.setattr(BlockWriter, "read_back", not_written)
    if ignores_range:
        server.faults.add("store", ignore_range=True, times=None)
    else:
        is_cut = random.Random(2).random
        server.faults.add(
            "store", cut_after_bytes=MIB + 77, times=None, when=lambda _entry: is_cut() < 0.15
        )
    give_up, wrong = time.monotonic() + 4, []

    def reads(number):
        places = random.Random(number)
        while time.monotonic() < give_up:
            with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
                for _ in range(10):
                    at, size = places.randrange(39 * MIB), places.choice([10, 200_000, 5 * MIB])
                    if file.read(size, at, BACKGROUND_CONTEXT) != expected[at : at + size]:
                        wrong.append((at, size))
            if number == 0:
                shutil.rmtree(mount.cache.folder, ignore_errors=True)
        return True

    done = run_concurrently([partial(reads, number) for number in range(6)], 6, "readers")
    assert [each.result() for each in done] == [True] * 6
    assert not wrong
    eventually(lambda: not mount.weights.memory._reserved_bytes)
    eventually(lambda: not [p for p in mount.cache.folder.rglob(".*") if p.suffix != ".part"])


def eventually(holds, patience_s=10.0):
    give_up = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_prefetching_has_so_many_requests_under_way_and_no_more(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=300 * MIB, latency_s=0.05)
    subject, mount = subject_of(server), weights_of(server)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert not [each.error for each in prefetch([file], BACKGROUND_CONTEXT) if each.error]
        for index in range(0, 70, 2):
            file._file._disk.drop(index)
        server.journal.wait_until_idle()
        server.journal.clear()
        assert not [each.error for each in prefetch([file], BACKGROUND_CONTEXT) if each.error]
    server.journal.wait_until_idle()
    entries = server.journal.entries(ARCHIVE)
    most = max(sum(b.start_s <= a.start_s < b.end_s for b in entries) for a in entries)
    assert len(entries) == 35
    # The server takes a request for over a moment after its last byte was received.
    assert most <= READAHEAD_CONCURRENCY + 4
