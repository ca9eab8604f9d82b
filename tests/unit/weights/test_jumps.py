"""Reads that jump: only the units that they touch are requested, and each of them once."""

import itertools
import random
import threading
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.server import FaultyServer
from tests.unit.weights.conftest import (
    assert_disjoint,
    range_of,
    subject_of,
    truth,
    weights_in,
)
from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES, units_of
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.weights.prefetch import prefetch

KIB, MIB = 1 << 10, 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE = "GET store/archive"
SIZE_BYTES = 80 * MIB


@pytest.fixture
def large(demo_server):
    return demo_server(runs=1, size_bytes=SIZE_BYTES)


def opened(mount, subject):
    return mount.weights.open(subject, NAME, BACKGROUND_CONTEXT)


def read(file, size, offset):
    return file.read(size, offset, BACKGROUND_CONTEXT)


def entries_of(server):
    server.journal.wait_until_idle()
    return server.journal.entries(ARCHIVE)


def jumps(count, seed=0):
    """Return offsets that are far from each other, in random order."""
    rng = random.Random(seed)
    step = (SIZE_BYTES - 8 * MIB) // count
    offsets = [4 * MIB + step * number + rng.randrange(step // 2) for number in range(count)]
    rng.shuffle(offsets)
    return offsets


def touched(file, size, offset):
    start = file._segments[0].archive_offset + offset
    return units_of(start, start + size)


@pytest.mark.parametrize("limit_bytes", [1 << 34, 0])
def test_small_reads_request_the_units_that_they_touch(large, weights_of, limit_bytes):
    subject, mount = subject_of(large), weights_of(large, limit_bytes=limit_bytes)
    expected = truth(large, subject, NAME)
    with opened(mount, subject) as file:
        large.journal.clear()
        offsets = jumps(12)
        for offset in offsets * 2:
            assert read(file, 4 * KIB, offset) == expected[offset : offset + 4 * KIB]
        units = sorted(unit for offset in offsets for unit in touched(file, 4 * KIB, offset))
        requested = sorted(
            unit for entry in entries_of(large) for unit in units_of(*range_of(entry))
        )
        assert requested == units, "each unit once"
        assert file.cached_bytes() == (len(units) * UNIT_BYTES if limit_bytes else 0)
        assert not any(file.is_cached(block) for block in file.blocks())
        assert file.backing_fd(BACKGROUND_CONTEXT) is None
    large.journal.clear()
    with opened(weights_of(large, limit_bytes=limit_bytes), subject) as file:
        if limit_bytes:
            assert read(file, 4 * KIB, offsets[0]) == expected[offsets[0] :][: 4 * KIB]
            assert not entries_of(large)


def test_prefetch_completes_a_file_with_some_units(large, weights_of):
    """A block is requested from its first to its last missing unit."""
    subject, mount = subject_of(large), weights_of(large)
    expected = truth(large, subject, NAME)
    with opened(mount, subject) as file:
        for offset in jumps(6):
            read(file, 4 * KIB, offset)
        cached_bytes = file.cached_bytes()
        large.journal.clear()
        results = list(prefetch([file], BACKGROUND_CONTEXT))
        assert not [each.error for each in results if each.error]
        assert sum(each.size_bytes for each in results) == file.size_bytes - cached_bytes
        assert file.cached_bytes() == file.size_bytes
        assert not file.missing_blocks()
        # In the middle of a block, requesting a cached unit again costs less than a request.
        assert_disjoint(entries_of(large), len(expected) - 6 * UNIT_BYTES)
        fd = file.backing_fd(BACKGROUND_CONTEXT)
        with open(fd, "rb") as whole:
            assert whole.read() == expected


def test_readers_of_one_unit_share_a_download(large, weights_of):
    subject = subject_of(large)
    mounts = [weights_of(large) for _ in range(2)]
    with ExitStack() as stack:
        files = [stack.enter_context(opened(mount, subject)) for mount in mounts]
        large.journal.clear()
        rule = large.faults.add("store", hang=True, times=None)
        found, expected = [], truth(large, subject, NAME)[50 * MIB :][: 4 * KIB]

        def work(number):
            found.append(read(files[number % 2], 4 * KIB, 50 * MIB) == expected)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        rule.wait_for(1)
        rule.release()
        large.faults.clear()
        for thread in threads:
            thread.join(60)
    assert found == [True] * 64
    [entry] = entries_of(large)
    assert units_of(*range_of(entry)) == touched(files[0], 4 * KIB, 50 * MIB)


def test_whole_block_leaves_units_in_flight_to_their_request(large, weights_of):
    subject, mount = subject_of(large), weights_of(large)
    with opened(mount, subject) as file:
        remote = file._file
        large.journal.clear()
        unit = 10 * BLOCK_BYTES + 7 * UNIT_BYTES
        rule = large.faults.add("store", hang=True, when=lambda e: f"={unit}-" in e.range)
        buffer = memoryview(bytearray(9))
        reader = threading.Thread(
            target=lambda: remote.read_into(buffer, unit, BACKGROUND_CONTEXT, UNIT_BYTES)
        )
        reader.start()
        rule.wait_for(1)
        future = remote.fetch(10, BACKGROUND_CONTEXT)
        assert not future.done()
        rule.release()
        assert future.result(20) is None
        reader.join(20)
        assert remote.is_on_disk(10)
    units = sorted(tuple(units_of(*range_of(entry))) for entry in entries_of(large))
    first = 10 * BLOCK_BYTES // UNIT_BYTES
    assert units == [
        (*range(first, first + 7),),
        (first + 7,),
        (*range(first + 8, first + 16),),
    ]


def test_altered_length_of_a_unit_is_requested_again(large, weights_of):
    subject, mount = subject_of(large), weights_of(large)
    with opened(mount, subject) as file:
        large.journal.clear()
        large.faults.add("store", cut_after_bytes=100 * KIB, times=2)
        data = read(file, 4 * KIB, 40 * MIB)
        assert data == truth(large, subject, NAME)[40 * MIB :][: 4 * KIB]
        assert file.cached_bytes() == UNIT_BYTES
    assert len(entries_of(large)) == 3


READS = st.lists(
    st.tuples(st.integers(0, 90 * MIB), st.sampled_from([1, 4 * KIB, 128 * KIB, MIB, 3 * MIB])),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def shared_server():
    with FaultyServer(runs=1, size_bytes=90 * MIB) as server:
        yield server


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(reads=READS, is_stored=st.booleans(), follows=st.integers(0, 4))
def test_any_reads_return_the_bytes_and_fetch_few(
    shared_server, tmp_path_factory, reads, is_stored, follows
):
    """Whatever the order: the right bytes, and at most the file, or what the reads explain."""
    server, subject = shared_server, subject_of(shared_server)
    expected = truth(server, subject, NAME)
    options = {"limit_bytes": 1 << 34 if is_stored else 0}
    server.journal.wait_until_idle()
    with (
        weights_in(
            tmp_path_factory.mktemp("jumps"), server.base_url, server.api_key, **options
        ) as mount,
        opened(mount, subject) as file,
    ):
        server.journal.clear()
        for offset, size in reads:
            for number in range(follows + 1):
                begin = offset + number * size
                assert read(file, size, begin) == expected[begin : begin + size]
        sent_bytes = sum(entry.sent_bytes for entry in entries_of(server))
    assert sent_bytes <= len(expected) + MIB
    if not follows and all(size <= 4 * KIB for _, size in reads) and is_far_apart(reads):
        assert sent_bytes <= 2 * UNIT_BYTES * len(reads)


def is_far_apart(reads):
    """Return whether no read continues or repeats the stride of others."""
    offsets = [0, *(offset for offset, _ in reads)]
    steps = [b - a for a, b in itertools.pairwise(offsets)]
    return all(abs(step) > 4 * MIB for step in steps) and len(set(steps)) == len(steps)
