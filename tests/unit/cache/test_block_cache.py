"""The block cache returns what was stored, whatever happens to the disk and to processes."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.clocks import FakeTime
from tinkerfs.cache import data_files
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.cache.data_files import DataFiles
from tinkerfs.cache.data_layout import (
    BLOCK_BYTES,
    OVERHEAD_BYTES,
    UNIT_BYTES,
    DataLayout,
    units_of_block,
)
from tinkerfs.cache.eviction import scan_cache
from tinkerfs.concurrency import run_in_thread
from tinkerfs.telemetry import Telemetry

KIB = 1 << 10
BLOCK = 64 * KIB


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def cache_of(tmp_path, telemetry):
    def make(max_bytes=1 << 30, min_free_bytes=0, clock=None, name="blocks"):
        more = {} if clock is None else {"clock": clock}
        return BlockCache(
            tmp_path / name,
            telemetry,
            max_bytes=max_bytes,
            min_free_bytes=min_free_bytes,
            **more,
        )

    return make


def block(number, size=BLOCK):
    return random.Random(number).randbytes(size)


def whole(file, index, size=BLOCK):
    return file.read(index, 0, size, size)


def on_disk(cache):
    return sum(directory.size_bytes for directory in scan_cache(cache.directory))


def put_part(file, index, data):
    with contextlib.closing(file.begin_write(index * BLOCK_BYTES, BLOCK_BYTES)) as writer:
        writer.write(data)
        file.commit_part(writer)


def data_path(cache):
    """Return the only data file of a cache."""
    [path] = [path for path in cache.directory.rglob("*") if path.name.isdigit()]
    return path


def test_put_block_is_read_in_part_and_by_the_next_mount(cache_of):
    with contextlib.closing(cache_of().open("key", "about")) as file:
        assert whole(file, 3) is None
        assert file.put(3, block(1))
        assert file.read(3, 100, 200, BLOCK) == block(1)[100:200]
        assert (file.has(3), file.has(2)) == (True, False)
    with contextlib.closing(cache_of().open("key", "about")) as again:
        assert whole(again, 3) == block(1)
    with contextlib.closing(cache_of().open("another key", "about")) as other:
        assert whole(other, 3) is None


def test_start_of_block_is_not_a_block_and_survives_remount(cache_of):
    data = block(1, 2 * UNIT_BYTES + 1000)
    with contextlib.closing(cache_of().open("key", "about", 5 * BLOCK_BYTES)) as file:
        assert file.missing(units_of_block(3)) == units_of_block(3)
        put_part(file, 3, data)
        assert not file.has(3)
        assert file.missing(units_of_block(3), 5 * BLOCK_BYTES) == units_of_block(3)[2:]
        assert whole(file, 3, BLOCK_BYTES) is None
        assert file.read(3, 100, 200, BLOCK_BYTES) == data[100:200]
    with contextlib.closing(cache_of().open("key", "about", 5 * BLOCK_BYTES)) as again:
        kept = 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 2 * UNIT_BYTES
        assert again.cached_bytes(0, 5 * BLOCK_BYTES) == 2 * UNIT_BYTES, "only complete units"
        assert again.cached_bytes(kept[0] + 7, kept[1] + 9) == 2 * UNIT_BYTES - 7
        assert again.put(3, block(2, BLOCK_BYTES))
        assert again.has(3)
        assert not again.missing(units_of_block(3), 5 * BLOCK_BYTES)


def test_units_within_a_block_are_read_and_missing_around(cache_of):
    """A whole block is then requested from its first to its last missing unit."""
    data, units = block(1, 2 * UNIT_BYTES), units_of_block(1)
    with contextlib.closing(cache_of().open("key", "about", 3 * BLOCK_BYTES)) as file:
        with contextlib.closing(file.begin_write(units[5] * UNIT_BYTES, len(data))) as writer:
            writer.write(data)
            assert file.commit(writer)
        assert file.read(1, 5 * UNIT_BYTES + 9, 7 * UNIT_BYTES, BLOCK_BYTES) == data[9:]
        assert file.read(1, 5 * UNIT_BYTES - 1, 7 * UNIT_BYTES, BLOCK_BYTES) is None
        assert file.missing(units) == units
        assert file.missing(units[5:]) == units[7:]
        assert file.missing(units[:7], 3 * BLOCK_BYTES) == units[:5]
        spoil_byte(data_path(cache_of()), 7 * UNIT_BYTES + BLOCK_BYTES - 1)
    with contextlib.closing(cache_of().open("key", "about", 3 * BLOCK_BYTES)) as again:
        assert again.missing(units[5:]) == units[7:]
        assert again.missing(units[5:7], 3 * BLOCK_BYTES) == units[6:7], "the altered one"
        assert not again.missing(units[5:6], 3 * BLOCK_BYTES)


def test_corrupt_start_of_block_is_not_returned(cache_of):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about", 5 * BLOCK_BYTES)) as file:
        put_part(file, 0, block(1, 2 * UNIT_BYTES))
        spoil_byte(data_path(cache))
    with contextlib.closing(cache_of().open("key", "about", 5 * BLOCK_BYTES)) as file:
        units = units_of_block(0)
        assert file.missing(units[:2], BLOCK_BYTES) == units[:1]


def test_data_verified_before_its_removal_does_not_count_later(cache_of, monkeypatch):
    """While a thread verifies a unit, the files are removed and another block is stored."""
    cache, expected = cache_of(), block(1, BLOCK_BYTES)
    with contextlib.closing(cache.open("key", "about", 3 * BLOCK_BYTES)) as file:
        assert file.put(0, expected)
        checksum_of, calls = data_files.checksum_of, []

        def replace_files(*arguments):
            if not calls:
                calls.append(1)
                shutil.rmtree(cache.directory)
                assert file.put(2, block(2, BLOCK_BYTES))
            return checksum_of(*arguments)

        monkeypatch.setattr(data_files, "checksum_of", replace_files)
        assert file.read(0, 0, 100, BLOCK_BYTES) == expected[:100]
        assert calls
        assert file.read(0, 0, 100, BLOCK_BYTES) is None, "a hole"
        assert file.read(2, 0, 100, BLOCK_BYTES) == block(2, BLOCK_BYTES)[:100]


def test_last_block_of_a_file_is_short(cache_of):
    with contextlib.closing(cache_of().open("key", "about", BLOCK_BYTES + 100)) as file:
        assert file.put(1, block(1, 100))
        assert file.has(1)
        assert whole(file, 1, 100) == block(1, 100)


@pytest.mark.parametrize("start", [0, 100])
def test_first_read_verifies_units_in_its_own_buffer(cache_of, monkeypatch, start):
    with contextlib.closing(cache_of().open("key", "about")) as file:
        file.put(3, block(3, BLOCK_BYTES))
    sizes, read = [], DataFiles.read

    def recorded(files, buffer, *more):
        sizes.append(len(buffer))
        return read(files, buffer, *more)

    monkeypatch.setattr(DataFiles, "read", recorded)
    with contextlib.closing(cache_of().open("key", "about")) as again:
        stop = start + 4 * UNIT_BYTES
        found = again.read(3, start, stop, BLOCK_BYTES)
    assert found == block(3, BLOCK_BYTES)[start:stop]
    # What the buffer lacks of the first and of the last unit is read apart from it.
    edges = [start, UNIT_BYTES - start] if start else []
    assert sorted(sizes) == sorted([4 * UNIT_BYTES, *edges])


@pytest.mark.parametrize("stored", [0, 1])
def test_chunk_is_written_by_one_call_unless_it_is_stored(cache_of, monkeypatch, stored):
    data, half = block(3, BLOCK_BYTES), BLOCK_BYTES // 2
    with contextlib.closing(cache_of().open("key", "about")) as file:
        put_part(file, 0, data[: stored * UNIT_BYTES])
        offsets, write = [], DataFiles.write

        def recorded(files, chunk, offset):
            offsets.append(offset)
            write(files, chunk, offset)

        monkeypatch.setattr(DataFiles, "write", recorded)
        with contextlib.closing(file.begin_write(0, BLOCK_BYTES)) as writer:
            for start in (0, half):
                writer.write(data[start : start + half])
            assert file.commit(writer)
        assert whole(file, 0, BLOCK_BYTES) == data
    if not stored:
        assert offsets == [0, half]
    assert 0 not in offsets or not stored, "others may read the stored unit"


def test_read_of_many_units_drops_only_the_altered_one(cache_of):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0, BLOCK_BYTES))
        with open(data_path(cache), "r+b") as altered:
            altered.seek(2 * UNIT_BYTES + 5)
            altered.write(b"altered")
    with contextlib.closing(cache_of().open("key", "about")) as again:
        assert again.read(0, 100, 4 * UNIT_BYTES, BLOCK_BYTES) is None
        assert again.missing(units_of_block(0)) == range(2, 3)


def test_cache_files_are_private_to_the_user(cache_of, tmp_path):
    cache = cache_of(name="a/b/blocks")
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
    paths = [*(tmp_path / "a").rglob("*"), tmp_path / "a"]
    assert {path.stat().st_mode & 0o077 for path in paths} == {0}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o700}


def spoil_byte(path, offset=1000):
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def truncate(path):
    os.truncate(path, 100)


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def punch(path):
    subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "8192", path], check=True)


def spoil_record(path):
    with path.with_name("index").open("r+b") as file:
        file.write(b"\1" * 5)


def cut_record(path):
    os.truncate(path.with_name("index"), 5)


@pytest.mark.parametrize("spoil", [spoil_byte, truncate, empty, zero, punch])
@pytest.mark.parametrize("is_remounted", [True, False])
def test_corrupt_block_is_never_returned(cache_of, telemetry, spoil, is_remounted):
    cache = cache_of()
    file = cache.open("key", "about")
    file.put(0, block(0))
    assert whole(file, 0) == whole(file, 0) == block(0)
    time.sleep(0.01)  # the clock of file times ticks every 4 ms
    spoil(data_path(cache))
    if is_remounted:
        file.close()
        file = cache_of().open("key", "about")
    assert whole(file, 0) is None
    assert "altered" in telemetry.errors.text().decode()
    assert file.put(0, block(0))
    assert whole(file, 0) == block(0)
    file.close()


@pytest.mark.parametrize("spoil", [spoil_record, cut_record])
def test_block_with_a_corrupt_record_is_not_returned(cache_of, spoil):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        spoil(data_path(cache))
    with contextlib.closing(cache_of().open("key", "about")) as again:
        assert whole(again, 0) is None
        assert again.put(0, block(0))
        assert whole(again, 0) == block(0)


def test_hole_is_noticed_while_another_block_is_written(cache_of):
    """During the write the time of the data file does not show other changes."""
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        assert whole(file, 0) == block(0)
        with contextlib.closing(file.begin_write(BLOCK_BYTES, BLOCK)) as writer:
            writer.write(block(1)[:1000])
            assert whole(file, 0) == block(0)
            punch(data_path(cache))
            assert whole(file, 0) is None


@pytest.mark.parametrize("is_over", [True, False])
def test_change_during_a_write_of_another_block_is_noticed(cache_of, is_over):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        assert whole(file, 0) == whole(file, 0) == block(0)
        writer = file.begin_write(BLOCK_BYTES, BLOCK)
        writer.write(block(1)[:1000])
        assert whole(file, 0) == block(0)
        spoil_byte(data_path(cache))
        if is_over:
            writer.write(block(1)[1000:])
            assert file.commit(writer)
            writer.close()
        assert whole(file, 0) is None
        if not is_over:
            writer.close()


def test_reads_find_blocks_while_another_process_writes(cache_of):
    """Each write of the other process changes the time of the data file."""
    cache = cache_of()
    code = f"""if True:
        from pathlib import Path
        from tinkerfs.cache.block_cache import BlockCache
        from tinkerfs.telemetry import Telemetry
        cache = BlockCache(Path({str(cache.directory)!r}), Telemetry(), max_bytes=1 << 34,
                           min_free_bytes=0)
        file = cache.open("key", "about")
        writer = file.begin_write({BLOCK_BYTES}, {BLOCK_BYTES})
        print("ready", flush=True)
        while True:
            file._files.write(memoryview(b"x"), {2 * BLOCK_BYTES})
    """
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert other.stdout.readline() == b"ready\n"
            assert all(whole(file, 0) == block(0) for _ in range(3000))
        finally:
            other.kill()
            other.wait()
            other.stdout.close()


def test_unit_of_a_removed_data_file_is_not_valid_in_a_new_one(cache_of):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        assert whole(file, 0) == block(0)
        data_path(cache).unlink()
        assert whole(file, 0) is None
        with contextlib.closing(file.begin_write(0, BLOCK)) as writer:
            writer.write(block(0)[: BLOCK - 100])
            assert whole(file, 0) is None, "the rest of the last page is zeros"


LAYOUT = DataLayout([(1000, 1000 + 3 * UNIT_BYTES), (2 * BLOCK_BYTES, 3 * BLOCK_BYTES)])


def test_data_file_of_a_member_has_its_bytes_from_0(cache_of):
    size = 3 * BLOCK_BYTES + 77
    data = block(1, size)
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about", size, LAYOUT)) as file:
        for start in range(0, size, BLOCK_BYTES):
            assert file.put(start // BLOCK_BYTES, data[start : start + BLOCK_BYTES])
        assert whole(file, 0, BLOCK_BYTES) == data[:BLOCK_BYTES]
    [directory] = cache.directory.iterdir()
    assert (directory / "1").read_bytes() == data[1000 : 1000 + 3 * UNIT_BYTES]
    assert (directory / "2").read_bytes() == data[2 * BLOCK_BYTES : 3 * BLOCK_BYTES]
    rest = (directory / "0").read_bytes()
    assert (rest[:1000], rest[3 * BLOCK_BYTES :]) == (data[:1000], data[3 * BLOCK_BYTES :])
    with contextlib.closing(cache_of().open("key", "about", size)) as again:  # knows no members
        assert whole(again, 0, BLOCK_BYTES) == data[:BLOCK_BYTES]
        assert (
            again.read(2, BLOCK_BYTES - 9, BLOCK_BYTES, BLOCK_BYTES) == data[: 3 * BLOCK_BYTES][-9:]
        )


@pytest.mark.parametrize("content", [b"", b"[[5, 3]]", b"[[0, 9], [8, 12]]", b"{", b"7", b"[[0]]"])
def test_corrupt_layout_returns_no_wrong_byte(cache_of, content):
    cache = cache_of()
    data = block(1, BLOCK_BYTES)
    with contextlib.closing(cache.open("key", "about", BLOCK_BYTES, LAYOUT)) as file:
        file.put(0, data)
    [directory] = cache.directory.iterdir()
    (directory / "layout").write_bytes(content)
    with contextlib.closing(cache_of().open("key", "about", BLOCK_BYTES, LAYOUT)) as file:
        assert whole(file, 0, BLOCK_BYTES) is None
        assert file.put(0, data)
        assert whole(file, 0, BLOCK_BYTES) == data


def test_eviction_is_lru_and_spares_open_files(cache_of):
    clock = FakeTime()
    cache = cache_of(max_bytes=8 * (BLOCK + OVERHEAD_BYTES), clock=clock.clock)
    for number in range(6):
        with contextlib.closing(cache.open(f"key {number}", "about")) as file:
            assert file.put(0, block(number))
        clock.advance(100)
    opened = cache.open("key 0", "about")
    with contextlib.closing(cache.open("key 1", "about")) as file:
        assert whole(file, 0) == block(1)
    clock.advance(100)
    with contextlib.closing(cache.open("new", "about")) as file:
        for index in range(4):
            assert file.put(index, block(index))
    cached = set()
    for number in range(6):
        with contextlib.closing(cache.open(f"key {number}", "about")) as file:
            cached |= {number} if file.has(0) else set()
    assert {0, 1} <= cached
    assert 2 not in cached
    assert whole(opened, 0) == block(0)
    opened.close()


def test_cache_stays_within_its_bound(cache_of):
    limit = 40 * BLOCK
    caches = [cache_of(max_bytes=limit) for _ in range(2)]
    for number in range(100):
        with contextlib.closing(caches[number % 2].open(f"key {number // 5}", "about")) as file:
            file.put(number % 5, block(number))
        assert on_disk(caches[0]) <= limit
    assert on_disk(caches[0]) >= limit // 2
    directories = list(caches[0].directory.iterdir())
    assert len(directories) <= 9, "evicted directories are removed"


def test_block_being_written_counts_as_a_whole_block(cache_of):
    limit = 32 * (BLOCK + OVERHEAD_BYTES)
    cache = cache_of(max_bytes=limit)
    with contextlib.closing(cache.open("key", "about")) as file:
        writers = []
        for index in range(60):
            writer = file.begin_write(index * BLOCK_BYTES, BLOCK)
            if writer is not None:
                writer.write(b"x")
                writers.append(writer)
        for writer in writers:
            writer.write(bytes(BLOCK - 1))
            assert file.commit(writer)
            writer.close()
        assert 25 <= len(writers) <= 34
    assert on_disk(cache) <= limit


def test_cache_full_of_open_files_rejects_blocks(cache_of, telemetry):
    cache = cache_of(max_bytes=4 * (BLOCK + OVERHEAD_BYTES))
    with contextlib.closing(cache.open("key", "about")) as file:
        stored = [file.put(index, block(index)) for index in range(20)]
        assert stored[:3] == [True] * 3
        assert not any(stored[5:])
        assert whole(file, 0) == block(0)
    assert telemetry.errors.text().decode().count("full of open files") == 1


def test_minimum_free_disk_space_is_respected(cache_of, telemetry):
    cache = cache_of(min_free_bytes=1 << 62)
    with contextlib.closing(cache.open("key", "about")) as file:
        assert not file.put(0, block(0))
    assert "ENOSPC" in telemetry.errors.text().decode()


def test_smaller_bound_evicts_blocks_of_a_larger_one(cache_of):
    with contextlib.closing(cache_of().open("key", "about")) as file:
        for index in range(10):
            file.put(index, block(index))
    smaller = cache_of(max_bytes=4 * (BLOCK + OVERHEAD_BYTES))
    with contextlib.closing(smaller.open("another", "about")) as file:
        assert file.put(0, block(0))
    assert on_disk(smaller) <= 4 * (BLOCK + OVERHEAD_BYTES)


def test_bound_of_0_caches_nothing(cache_of):
    cache = cache_of(max_bytes=0)
    with contextlib.closing(cache.open("key", "about")) as file:
        assert not file.put(0, block(0))
    assert on_disk(cache) == 0


def test_removed_directory_is_created_again(cache_of):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
        subprocess.run(["rm", "-rf", cache.directory], check=True)
        assert whole(file, 0) is None
        assert file.put(0, block(0))
        assert whole(file, 0) == block(0)


def test_unwritable_directory_is_reported_once(cache_of, telemetry, tmp_path):
    (tmp_path / "blocks").write_text("not a directory")
    with contextlib.closing(cache_of().open("key", "about")) as file:
        for index in range(5):
            assert not file.put(index, block(0))
            assert whole(file, index) is None
    assert len(telemetry.errors.text().decode().splitlines()) == 1


def test_full_disk_leaves_no_partial_block(cache_of, telemetry):
    """RLIMIT_FSIZE makes a write fail with EFBIG, like ENOSPC; set in a subprocess."""
    cache = cache_of()
    code = f"""
import resource, signal
from pathlib import Path
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.telemetry import Telemetry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
telemetry = Telemetry()
cache = BlockCache(Path({str(cache.directory)!r}), telemetry, max_bytes=1 << 30, min_free_bytes=0)
file = cache.open("key", "about")
assert not file.put(0, bytes({BLOCK}))
assert [file.read(0, 0, 10, {BLOCK})] == [None]
assert "EFBIG" in telemetry.errors.text().decode()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with contextlib.closing(cache_of().open("key", "about")) as file:
        assert not file.has(0)


CLAIMER = """
import sys, time
from pathlib import Path
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.telemetry import Telemetry
cache = BlockCache(Path(sys.argv[1]), Telemetry(), max_bytes=1 << 30, min_free_bytes=0)
file = cache.open("key", "about")
file.ensure_directory()
with file.lock_units(range(7, 8), 10):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_lock_units_excludes_other_processes_until_they_exit(cache_of):
    cache = cache_of()
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(cache.directory)], stdout=subprocess.PIPE
    )
    file = cache.open("key", "about")
    file.ensure_directory()
    try:
        assert other.stdout.readline() == b"claimed\n"
        began = time.monotonic()
        with file.lock_units(range(8, 10), 10):
            assert time.monotonic() - began < 1
        with file.lock_units(range(7, 8), 0.2):
            assert time.monotonic() - began >= 0.2
        threading.Timer(0.2, other.kill).start()
        with file.lock_units(range(7, 8), 30):
            assert time.monotonic() - began < 10
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
        file.close()


def test_file_open_in_another_process_is_not_evicted(cache_of):
    clock = FakeTime()
    cache = cache_of(max_bytes=6 * (BLOCK + OVERHEAD_BYTES), clock=clock.clock)
    with contextlib.closing(cache.open("key", "about")) as file:
        file.put(0, block(0))
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(cache.directory)], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"claimed\n"
        clock.advance(1000)
        with contextlib.closing(cache.open("new", "about")) as file:
            for index in range(20):
                file.put(index, block(index))
        with contextlib.closing(cache.open("key", "about")) as file:
            assert whole(file, 0) == block(0)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


WRITER = """
import random, sys
from pathlib import Path
from tinkerfs.cache.about import read_about
from tinkerfs.cache.block_cache import BlockCache
from tinkerfs.telemetry import Telemetry
cache = BlockCache(Path(sys.argv[1]), Telemetry(), max_bytes=40 * 65536, min_free_bytes=0)
print("ready", flush=True)
number = 0
while True:
    file = cache.open(f"key {number % 7}", "about")
    for index in range(10):
        file.put(index, random.Random(number % 7 * 100 + index).randbytes(65536))
    file.close()
    number += 1
"""


@pytest.mark.timeout(60)
def test_killed_processes_leave_no_corrupt_block(cache_of):
    """200 kills: 8 writers at a time live for a few milliseconds each."""
    cache = cache_of(max_bytes=40 * BLOCK)
    rng, kills, found = random.Random(0), 0, 0
    pids = []
    # Forked from one process that has imported everything, because an interpreter starts slowly.
    code = WRITER.replace(
        'print("ready", flush=True)',
        """import os
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
else:
    os._exit(0)
""",
    )
    nursery = subprocess.Popen(
        [sys.executable, "-c", code, str(cache.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while kills < 200:
            while len(pids) < 4:
                nursery.stdin.write("fork\n")
                nursery.stdin.flush()
                pids.append(int(nursery.stdout.readline()))
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(pids.pop(0), signal.SIGKILL)
            kills += 1
            number, index = rng.randrange(7), rng.randrange(10)
            with contextlib.closing(cache_of().open(f"key {number}", "about")) as file:
                data = whole(file, index)
            assert data in (None, block(number * 100 + index))
            found += data is not None
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        nursery.stdin.close()
        nursery.wait(10)
        nursery.stdout.close()
    assert found > 20
    for number in range(7):
        with contextlib.closing(cache_of().open(f"key {number}", "about")) as file:
            for index in filter(file.has, range(100)):
                assert whole(file, index) == block(number * 100 + index)


class Blocks(RuleBasedStateMachine):
    """Compare the cache with a dict: what it returns is correct."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.temporary = tempfile.TemporaryDirectory()
        self.model = {}
        self.files = {}
        self.remount()

    @rule()
    def remount(self):
        for file in self.files.values():
            file.close()
        self.files = {}
        self.cache = BlockCache(
            Path(self.temporary.name) / "blocks", Telemetry(), max_bytes=100 * KIB, min_free_bytes=0
        )

    def file(self, key):
        if key not in self.files:
            self.files[key] = self.cache.open(f"{key}", "about")
        return self.files[key]

    @rule(key=st.integers(0, 3), index=st.integers(0, 5), data=st.binary(min_size=10, max_size=99))
    def put(self, key, index, data):
        if self.file(key).put(index, data):
            self.model[key, index] = data

    @rule(key=st.integers(0, 3), index=st.integers(0, 5))
    def read(self, key, index):
        expected = self.model.get((key, index), b"x" * 20)
        found = self.file(key).read(index, 3, 9, len(expected))
        assert found is None or found == expected[3:9]

    @rule(key=st.integers(0, 3))
    def close(self, key):
        if key in self.files:
            self.files.pop(key).close()

    @rule(key=st.integers(0, 3), index=st.integers(0, 5))
    def drop(self, key, index):
        self.file(key).drop(index)

    @invariant()
    def bounded(self):
        assert on_disk(self.cache) <= 100 * KIB

    def teardown(self):
        for file in self.files.values():
            file.close()
        self.temporary.cleanup()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=25, stateful_step_count=40)


def test_usage_bytes_is_refreshed_after_5_s(cache_of):
    time = FakeTime()
    cache = cache_of(clock=time.clock)
    assert cache.usage_bytes() == 0
    with contextlib.closing(cache.open("key", "it")) as file:
        file.put(0, block(0))
    time.advance(4.9)
    assert cache.usage_bytes() == 0, "the directory is not scanned again"
    time.advance(0.2)
    assert BLOCK <= cache.usage_bytes() < 2 * BLOCK


# --- blocking reads ------------------------------------------------------------------------------


@pytest.fixture
def waits():
    return []


@pytest.fixture
def read_of(cache_of, monkeypatch, waits):
    """A read of a block, with a fake for reads that must not wait for the disk."""

    @contextlib.contextmanager
    def waiting():
        waits.append("begun")
        yield
        waits.append("over")

    def make(at_once):
        preadv, offsets, is_first = os.preadv, [], True

        def fake_preadv(fd, buffers, offset, flags=0):
            if not flags or is_first:
                return preadv(fd, buffers, offset)
            offsets.append(offset)
            return at_once(lambda: preadv(fd, buffers, offset), buffers)

        file = cache_of().open("key", "about")
        file.put(0, block(1))
        monkeypatch.setattr(os, "preadv", fake_preadv)
        whole(file, 0)
        is_first = False

        def read():
            buffer = memoryview(bytearray(100))
            assert file.read_into(0, 50, buffer, BLOCK, waiting)
            assert buffer == block(1)[50:150]
            return len(offsets)

        return read

    return make


def test_read_from_the_page_cache_is_not_blocking(read_of, waits):
    read = read_of(lambda read, _buffers: read())
    assert [read(), read()] == [1, 2]
    assert waits == []


def blocked(_read, _buffers):
    raise BlockingIOError


def in_part(read, _buffers):
    read()
    return 7


@pytest.mark.parametrize("at_once", [blocked, in_part])
def test_read_from_the_disk_is_blocking(read_of, waits, at_once):
    read = read_of(at_once)
    assert [read(), read()] == [1, 2]
    assert waits == ["begun", "over"] * 2


def test_nowait_is_tried_once_if_unsupported(read_of, waits):
    def unsupported(_read, _buffers):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    read = read_of(unsupported)
    assert read() == 1
    waits.clear()
    assert read() == 1
    assert waits == []


@pytest.mark.parametrize("is_in_page_cache", [True, False])
def test_verification_is_blocking_if_the_disk_is_read(
    cache_of, waits, monkeypatch, is_in_page_cache
):
    preadv = os.preadv

    def fake_preadv(fd, buffers, offset, flags=0):
        if flags and not is_in_page_cache:
            raise BlockingIOError
        return preadv(fd, buffers, offset)

    @contextlib.contextmanager
    def waiting():
        waits.append("begun")
        yield
        waits.append("over")

    with contextlib.closing(cache_of().open("key", "about")) as file:
        file.put(0, block(1))
    monkeypatch.setattr(os, "preadv", fake_preadv)
    with contextlib.closing(cache_of().open("key", "about")) as file:
        buffer = memoryview(bytearray(BLOCK))
        assert file.read_into(0, 0, buffer, BLOCK, waiting)
    assert waits == ([] if is_in_page_cache else ["begun", "over"])


def test_removed_block_is_not_read_and_frees_its_space(cache_of):
    with contextlib.closing(cache_of().open("key", "about")) as file:
        file.put(0, block(1))
        assert whole(file, 0) == block(1)
        (path,) = [path for path in file_paths(file) if path.name == "0"]
        path.unlink()
        assert whole(file, 0) is None
        file.put(0, block(2))
        assert whole(file, 0) == block(2)
    own = Path("/proc/self/fd")
    targets = [os.readlink(own / name) for name in os.listdir(own) if (own / name).is_symlink()]
    assert not [target for target in targets if str(path) in target]


def file_paths(file):
    return list(Path(file._directory).iterdir())


#: Types of file that can replace a file of the cache.
FOREIGN_KINDS = {"fifo": os.mkfifo, "directory": os.mkdir}


def in_time(work):
    """Return the result of work that must not block."""
    return run_in_thread(work, "cache").result(20)


@pytest.mark.parametrize("kind", FOREIGN_KINDS)
@pytest.mark.parametrize("name", ["0", "index", "layout", "about", "lock"])
def test_cache_with_another_kind_of_file_keeps_serving(cache_of, kind, name):
    with contextlib.closing(cache_of().open("key", "about")) as file:
        file.put(3, block(1))
    cache = cache_of()
    [directory] = cache.directory.iterdir()
    (directory / name).unlink()
    FOREIGN_KINDS[kind](directory / name)
    is_lost = name in ("0", "index", "layout")
    with contextlib.closing(in_time(lambda: cache.open("key", "about"))) as file:
        assert in_time(lambda: whole(file, 3)) == (None if is_lost else block(1))
        assert in_time(lambda: file.put(5, block(3)))
        assert in_time(lambda: whole(file, 5)) == block(3)
        with file.lock_units(range(3, 4), 0.0) as is_free:
            assert is_free
        assert in_time(lambda: file.put(3, block(1)))
        assert whole(file, 3) == block(1)
    in_time(lambda: read_about(directory))


def test_eviction_with_other_kinds_of_file_stays_in_bound(cache_of):
    first = cache_of()
    with contextlib.closing(first.open("old", "about")) as file:
        file.put(0, block(1))
    [directory] = first.directory.iterdir()
    (directory / "7").mkdir()
    (directory / "\N{SUPERSCRIPT TWO}").write_bytes(b"")
    os.mkfifo(directory / "9")
    cache = cache_of(max_bytes=3 * BLOCK)
    with contextlib.closing(cache.open("new", "about")) as file:
        for index in range(2):
            assert in_time(lambda index=index: file.put(index, block(index)))
    assert on_disk(cache) <= 3 * BLOCK
    assert not directory.exists()


def test_directory_of_an_earlier_format_is_evicted_first(cache_of):
    cache = cache_of(max_bytes=8 * (BLOCK + OVERHEAD_BYTES))
    earlier = cache.directory / "0123456789"
    earlier.mkdir(parents=True)
    for name in ("about", "lock", "0", "17"):
        (earlier / name).write_bytes(bytes(BLOCK))
    for number in range(6):
        with contextlib.closing(cache.open(f"key {number}", "about")) as file:
            assert file.put(0, block(number))
    assert not earlier.exists()
    with contextlib.closing(cache.open("key 0", "about")) as file:
        assert whole(file, 0) == block(0)


def test_backing_file_of_a_cleared_cache_is_none(cache_of, telemetry):
    cache = cache_of()
    with contextlib.closing(cache.open("key", "about", BLOCK)) as file:
        file.put(0, block(0))
        os.close(file.backing_fd(0, BLOCK))
        data_path(cache).unlink()
        assert file.backing_fd(0, BLOCK) is None
        assert file.put(0, block(0))
        os.close(file.backing_fd(0, BLOCK))
    assert telemetry.errors.text() == b""
