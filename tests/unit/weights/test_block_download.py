"""Block downloads: written as they arrive, with failing disks, several blocks per request."""

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
from tinkerfs.cache import data_files
from tinkerfs.cache.block_cache import BlockCache, BlockFile
from tinkerfs.cache.block_writer import BlockWriter
from tinkerfs.cache.data_layout import BLOCK_BYTES, DataLayout, units_of_block
from tinkerfs.concurrency import run_concurrently
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import remote_file as remote_module
from tinkerfs.weights.prefetch import prefetch
from tinkerfs.weights.readahead import READAHEAD_CONCURRENCY

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE = "GET store/archive"


def read(mount, subject):
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        offsets = range(0, file.size_bytes, MIB)
        return b"".join(file.read(MIB, offset, BACKGROUND_CONTEXT) for offset in offsets)


def requested(server):
    """Return the requested ranges, in blocks, and how many bytes were sent."""
    server.journal.wait_until_idle()
    entries = server.journal.entries(ARCHIVE)
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", entry.range).groups() for entry in entries]
    blocks = [(int(a) / BLOCK_BYTES, (int(b) + 1) / BLOCK_BYTES) for a, b in ranges]
    return sorted(blocks), sum(entry.sent_bytes for entry in entries)


@pytest.fixture
def opened(demo_server, weights_of):
    """A server with one file of 30 MiB, and a reader that has its index but no block."""
    server = demo_server(runs=1, size_bytes=30 * MIB)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    return server, subject, mount


def failing(method, at, error):
    """Return a writer method that fails from call number `at` on, counted per writer."""
    calls = {}

    def wrapped(writer, *arguments):
        calls[writer] = calls.get(writer, 0) + 1
        if calls[writer] > at:
            raise OSError(error, os.strerror(error))
        return method(writer, *arguments)

    return wrapped


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.expect_warnings("telemetry")
def test_download_with_failing_disk_continues_in_memory(opened, monkeypatch, at, error):
    server, subject, mount = opened
    monkeypatch.setattr(BlockWriter, "write", failing(BlockWriter.write, at, error))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert requested(server)[1] < 31 * MIB, "nothing was downloaded again"
    assert errno.errorcode[error] in mount.telemetry.errors.text().decode()
    assert not [path for path in mount.cache.directory.rglob(".*") if path.is_file()]


@pytest.mark.expect_warnings("telemetry")
def test_download_with_unreadable_disk_is_repeated(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(BlockWriter, "write", failing(BlockWriter.write, 1, errno.EIO))
    monkeypatch.setattr(BlockWriter, "read_back", failing(BlockWriter.read_back, 0, errno.EIO))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert requested(server)[1] < 3 * 31 * MIB


@pytest.mark.expect_warnings("telemetry")
def test_block_that_cannot_be_recorded_is_kept_in_memory(opened, monkeypatch):
    server, subject, mount = opened
    monkeypatch.setattr(BlockWriter, "commit", failing(BlockWriter.commit, 0, errno.EROFS))
    assert read(mount, subject) == truth(server, subject, NAME)
    assert requested(server)[1] < 31 * MIB
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert not file.cached_bytes()


def test_block_removed_during_commit_is_downloaded_to_memory(opened, monkeypatch):
    server, subject, mount = opened
    keep = BlockFile.commit

    def lost(file, writer):
        is_stored = keep(file, writer)
        file.drop(writer.start // BLOCK_BYTES)
        return is_stored

    monkeypatch.setattr(BlockFile, "commit", lost)
    assert read(mount, subject) == truth(server, subject, NAME)
    assert requested(server)[1] < 3 * 31 * MIB


def test_sequential_read_requests_two_blocks_at_a_time(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=400 * MIB, latency_s=0.02)
    subject, mount = subject_of(server), weights_of(server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    server.journal.clear()
    assert read(mount, subject) == truth(server, subject, NAME)
    ranges, sent_bytes = requested(server)
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) == 2
    assert len(ranges) < 0.85 * 400 * MIB / BLOCK_BYTES
    assert sent_bytes < 400 * MIB + 2 * BLOCK_BYTES


@contextmanager
def another_process(mount):
    """Open the same file of the cache as another process would."""
    cache = BlockCache(mount.cache.directory, Telemetry(), max_bytes=1 << 34, min_free_bytes=0)
    [directory] = [path for path in cache.directory.iterdir() if (path / "lock").exists()]
    with closing(BlockFile(cache, directory.name, b"?\n", None, DataLayout())) as file:
        yield file


def test_request_ends_before_block_locked_by_another_process(opened):
    server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        assert file.read(9, 0, BACKGROUND_CONTEXT)  # so that the directory exists
        server.journal.clear()
        with another_process(mount) as other:
            data = truth(server, subject, NAME)[: 5 * BLOCK_BYTES]
            with other.lock_units(units_of_block(3), 0.0) as is_mine:
                assert is_mine
                remote.fetch_ahead(2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
                future = remote.fetch(3, BACKGROUND_CONTEXT)
                remote.fetch(2, BACKGROUND_CONTEXT).result(10)
                assert not future.done()
                offset = file._segments[0].archive_offset
                other.put(3, data[3 * BLOCK_BYTES - offset :][:BLOCK_BYTES])
            assert future.result(10) is None
    assert requested(server)[0] == [(2, 3)]


def test_request_ends_before_partly_downloaded_block(opened):
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
    assert requested(server)[0] == [(2, 3), (3.25, 4)]


def test_block_in_flight_is_not_requested_again(opened):
    server, subject, mount = opened
    server.faults.add("store", hang=True, when=lambda entry: "=12582912-" in entry.range)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        future = remote.fetch(3, BACKGROUND_CONTEXT)
        reached = remote.fetch_ahead(BLOCK_BYTES, 6 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        assert reached == 6 * BLOCK_BYTES
        for index in (1, 2, 4, 5):
            remote.fetch(index, BACKGROUND_CONTEXT).result(10)
        server.faults.clear()
        future.result(10)
    assert requested(server)[0] == [(1, 3), (3, 4), (4, 6)]


@pytest.mark.expect_warnings("telemetry")
def test_block_writer_is_closed_once_even_if_close_fails(opened, monkeypatch):
    """A failed close(2) frees the descriptor (EDQUOT on NFS), so it must not be closed again."""
    server, subject, mount = opened
    closed, close = [], os.close

    def fail_first_close(fd):
        close(fd)
        closed.append(fd)
        if len(closed) == 1:
            raise OSError(errno.EDQUOT, "quota")

    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        remote.fetch(0, BACKGROUND_CONTEXT).result(10)
        monkeypatch.setattr(data_files, "os", ModuleProxy(os, close=fail_first_close))
        futures = [remote.fetch(1, BACKGROUND_CONTEXT, 2), remote.fetch(2, BACKGROUND_CONTEXT)]
        assert [future.exception(10) for future in futures] == [None, None]
    assert closed
    eventually(lambda: not mount.weights.memory._reserved_bytes)
    monkeypatch.undo()
    assert read(mount, subject) == truth(server, subject, NAME)


class ModuleProxy:
    """A module with some functions replaced."""

    def __init__(self, module, **own):
        self._module = module
        self.__dict__ |= own

    def __getattr__(self, name):
        return getattr(self._module, name)


def test_fetch_ahead_stops_at_first_block_not_started(opened):
    _server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote, started, results = file._file, [], iter([True, False])

        def start(run):
            if not next(results, True):
                return False
            started.extend(run)
            return True

        remote._start_prefetch = start
        reached = remote.fetch_ahead(0, 7 * BLOCK_BYTES, BLOCK_BYTES)
    assert started == [*units_of_block(0)]
    assert reached == BLOCK_BYTES


def test_block_lock_is_released_once_block_is_stored(opened):
    server, subject, mount = opened
    server.faults.add("store", stall_after_bytes=BLOCK_BYTES + MIB, times=1)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        assert remote.fetch(2, BACKGROUND_CONTEXT, 2).result(10) is None
        with another_process(mount) as other:
            with other.lock_units(units_of_block(2), 5.0) as is_mine:
                assert is_mine
            with other.lock_units(units_of_block(3), 0.0) as is_mine:
                assert not is_mine
        server.faults.clear()
        remote.fetch(3, BACKGROUND_CONTEXT).result(20)


@pytest.mark.expect_warnings("telemetry")
def test_full_scan_continues_on_disk_after_lost_block(opened, monkeypatch):
    server, subject, mount = opened
    server.faults.add("store", ignore_range=True, times=None)
    calls, write = [], BlockWriter.write

    def once(writer, data):
        calls.append(writer)
        if len(calls) == 2:
            raise OSError(errno.EIO, "x")
        return write(writer, data)

    monkeypatch.setattr(BlockWriter, "write", once)
    monkeypatch.setattr(BlockWriter, "read_back", failing(BlockWriter.read_back, 0, errno.EIO))
    assert read(mount, subject) == truth(server, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert len([index for index in range(8) if file.is_cached(index)]) >= 7


def test_fetch_without_a_free_thread_fails_and_recovers(opened, monkeypatch):
    _server, subject, mount = opened
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        remote = file._file
        with monkeypatch.context() as patch:
            patch.setattr(remote_module, "run_in_thread", no_thread)
            with pytest.raises(RuntimeError):
                remote.fetch(0, BACKGROUND_CONTEXT)
        assert remote.fetch(0, BACKGROUND_CONTEXT).result(10) is None
        assert remote.is_idle()
        eventually(lambda: not remote._requests)


def no_thread(*_arguments):
    raise RuntimeError("can't start new thread")


def test_block_in_memory_is_marked_used_after_a_wait(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=250 * MIB)
    subject, mount = subject_of(server), weights_of(server, limit_bytes=0)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        for index in range(40):
            file.read(1, index * 17 % 59 * BLOCK_BYTES + 77, BACKGROUND_CONTEXT)
        assert mount.weights.memory.can_prefetch(100 * MIB)


@pytest.mark.expect_warnings("telemetry")
@pytest.mark.parametrize("ignores_range", [False, True])
def test_concurrent_reads_with_bad_disk_and_store_are_correct(
    demo_server, weights_of, monkeypatch, ignores_range
):
    """Writes fail halfway, files are unreadable, bodies are cut, and the cache is deleted."""
    server = demo_server(runs=1, size_bytes=40 * MIB)
    subject, mount = subject_of(server), weights_of(server, memory_bytes=24 * MIB)
    expected, rng = truth(server, subject, NAME), random.Random(1)
    write, commit, written = BlockWriter.write, BlockWriter.commit, BlockWriter.read_back

    def half_write(writer, data):
        if rng.random() < 0.1:
            write(writer, data[: len(data) // 2])
            writer._size_bytes -= len(data) // 2
            raise OSError(errno.ENOSPC, "x")
        write(writer, data)

    def no_commit(writer, *arguments):
        if rng.random() < 0.1:
            raise OSError(rng.choice([errno.EIO, errno.ENOENT]), "x")
        return commit(writer, *arguments)

    def not_written(writer):
        if rng.random() < 0.05:
            raise OSError(errno.EIO, "x")
        return written(writer)

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

    def read_randomly(number):
        offsets = random.Random(number)
        while time.monotonic() < give_up:
            with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
                for _ in range(10):
                    at, size = offsets.randrange(39 * MIB), offsets.choice([10, 200_000, 5 * MIB])
                    if file.read(size, at, BACKGROUND_CONTEXT) != expected[at : at + size]:
                        wrong.append((at, size))
            if number == 0:
                shutil.rmtree(mount.cache.directory, ignore_errors=True)
        return True

    done = run_concurrently([partial(read_randomly, number) for number in range(6)], 6, "readers")
    assert [each.result() for each in done] == [True] * 6
    assert not wrong
    eventually(lambda: not mount.weights.memory._reserved_bytes)
    eventually(lambda: not list(mount.cache.directory.rglob(".*")))


def eventually(holds, timeout_s=10.0):
    give_up = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_prefetch_bounds_concurrent_requests(demo_server, weights_of):
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
    max_concurrent = max(sum(b.start_s <= a.start_s < b.end_s for b in entries) for a in entries)
    assert len(entries) == 35
    # The server counts a request as active for a moment after its last byte was received.
    assert max_concurrent <= READAHEAD_CONCURRENCY + 4
