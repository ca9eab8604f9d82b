"""Readahead: what is prefetched for a sequence of reads."""

import itertools
import random

import pytest

from tinkerfs.cache.data_layout import BLOCK_BYTES, UNIT_BYTES
from tinkerfs.weights.readahead import (
    FIRST_WINDOW_BYTES,
    HEADER_BYTES,
    MAX_READAHEAD_BYTES,
    READAHEAD_CONCURRENCY,
    SEEK_TOLERANCE_BYTES,
    ReadaheadState,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def prefetch_ends(state, reads):
    """Return the end of each planned prefetch; each is completed at once."""
    reached = []
    for offset, size in reads:
        plan = state.on_read(offset, size)
        if plan.stop > plan.start:
            state.mark_fetched(plan.stop)
        reached.append(plan.stop if plan.stop > plan.start else 0)
    return reached


def is_far_ahead(reached, read):
    """Return whether the window has its maximum length, to within one request."""
    return 0 <= read + MAX_READAHEAD_BYTES - reached < MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY


def in_order(size, step=128 * KIB, begin=0):
    return [(offset, step) for offset in range(begin, begin + size, step)]


def test_header_of_large_file_is_prefetched_only_itself():
    state = ReadaheadState(5 * GIB)
    assert max(prefetch_ends(state, [(0, 8), (8, 150 * KIB)])) <= 512 * KIB


def test_data_after_a_long_header_begin_like_a_file():
    start = 20 * MIB
    reads = in_order(32 * MIB, step=MIB)
    expected = prefetch_ends(ReadaheadState(5 * GIB), reads)
    state = ReadaheadState(5 * GIB + start, start)
    moved = prefetch_ends(state, [(offset + start, size) for offset, size in reads])
    assert moved == [max(reached + start, 0) if reached else 0 for reached in expected]
    assert not state.needs_tensor_offsets(start)


def test_sequential_reads_grow_the_window_up_to_its_maximum():
    reached = prefetch_ends(ReadaheadState(5 * GIB), in_order(200 * MIB))
    assert is_far_ahead(max(reached), 200 * MIB)
    assert max(reached[: 4 * 8]) <= 4 * MIB + FIRST_WINDOW_BYTES


def test_sequential_read_past_header_grows_window_fast():
    reached = prefetch_ends(ReadaheadState(5 * GIB), in_order(48 * MIB, step=MIB))
    assert max(reached[: HEADER_BYTES // MIB]) <= HEADER_BYTES + FIRST_WINDOW_BYTES
    assert reached[HEADER_BYTES // MIB] >= 5 * HEADER_BYTES
    assert is_far_ahead(max(reached), 48 * MIB)


def test_sequential_read_after_seek_prefetches_its_own_length():
    begin, state = 100 * MIB, ReadaheadState(5 * GIB)
    for number, reached in enumerate(prefetch_ends(state, in_order(20 * MIB, MIB, begin)), 1):
        assert reached <= begin + number * MIB + max(number * MIB, FIRST_WINDOW_BYTES)


@pytest.mark.parametrize("seed", range(3))
def test_slightly_reordered_reads_count_as_sequential(seed):
    rng, reads = random.Random(seed), in_order(100 * MIB)
    shuffled = [
        read for at in range(0, len(reads), 5) for read in rng.sample(reads[at : at + 5], 5)
    ]
    assert is_far_ahead(max(prefetch_ends(ReadaheadState(5 * GIB), shuffled)), 100 * MIB)


def test_prefetch_ranges_never_overlap_or_precede_the_read():
    state, planned = ReadaheadState(GIB), []
    for offset, size in in_order(150 * MIB):
        plan = state.on_read(offset, size)
        if plan.stop > plan.start:
            assert plan.start >= offset
            planned.append((plan.start, plan.stop))
            state.mark_fetched(plan.stop)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(planned))


def test_prefetch_range_fills_a_request_or_reaches_the_end():
    state, size, requests = ReadaheadState(300 * MIB), 300 * MIB, []
    for offset, step in in_order(size):
        plan = state.on_read(offset, step)
        if plan.stop > plan.start:
            assert plan.stop - plan.start >= plan.request_bytes or plan.stop == size
            requests.append(plan.request_bytes)
            state.mark_fetched(plan.stop)
    assert requests == sorted(requests)
    assert requests[-1] == MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY


def test_prefetch_not_started_is_planned_again():
    state = ReadaheadState(GIB)
    state.on_read(0, 4 * MIB)
    first = state.on_read(4 * MIB, MIB)
    state.mark_fetched(first.start)
    assert state.on_read(5 * MIB, MIB).start == 6 * MIB


def test_seek_resets_the_window():
    state = ReadaheadState(5 * GIB)
    prefetch_ends(state, in_order(100 * MIB))
    assert prefetch_ends(state, [(3 * GIB, 4 * KIB)]) == [0]
    reached = prefetch_ends(state, in_order(MIB, begin=3 * GIB + 4 * KIB))
    assert reached[0] == 0, "one unit may be all that is read"
    assert max(reached) <= 3 * GIB + 2 * MIB + FIRST_WINDOW_BYTES


def test_random_reads_prefetch_nothing():
    rng, state = random.Random(1), ReadaheadState(50 * GIB)
    reads = [(rng.randrange(50 * GIB), 4 * KIB) for _ in range(500)]
    assert sum(stop > 0 for stop in prefetch_ends(state, reads)) <= 5


def test_stride_is_prefetched():
    stride, stride_read_bytes, state = 16 * MIB, MIB, ReadaheadState(5 * GIB)
    for number in range(8):
        found = []
        for offset, size in in_order(stride_read_bytes, begin=number * stride):
            plan = state.on_read(offset, size)
            found.append((plan.start, plan.stop))
        if number > 2:
            begin, end = found[0]
            assert begin == (number + 1) * stride
            assert end >= begin + stride_read_bytes


def test_small_file_is_prefetched_whole_at_second_read():
    state = ReadaheadState(60 * MIB)
    assert state.on_read(0, 8).stop <= 16
    assert state.on_read(8, 4 * KIB)[1:3] == (8 + 4 * KIB, 60 * MIB)
    assert not prefetch_ends(ReadaheadState(60 * MIB), [(SEEK_TOLERANCE_BYTES + 1, 4 * KIB)])[0]


def test_prefetch_ends_at_the_end_of_the_file():
    state = ReadaheadState(10 * MIB)
    assert max(prefetch_ends(state, in_order(10 * MIB))) == 10 * MIB
    assert prefetch_ends(ReadaheadState(0), [(0, 0)]) == [0]


def state_with_tensors(size, count):
    """Return the state of a file with `count` tensors after their offsets were set."""
    state = ReadaheadState(size * count)
    prefetch_ends(state, in_order(MIB))
    middle = size * count // 2
    assert not state.needs_tensor_offsets(MIB)
    assert state.needs_tensor_offsets(middle)
    state.set_tensor_offsets(range(size, size * count + 1, size))
    assert not state.needs_tensor_offsets(middle)
    prefetch_ends(state, [(middle, 4 * KIB)])
    return state


@pytest.mark.parametrize("early", [0, 512 * KIB])
@pytest.mark.parametrize("late", [0, MIB])
def test_seek_to_a_tensor_prefetches_nothing_after_it(early, late):
    size = 40 * MIB
    state = state_with_tensors(size, 25)
    reads = in_order(early + size + late, begin=7 * size - early)
    assert max(prefetch_ends(state, reads)) == 8 * size


def test_read_past_a_tensor_prefetches_the_next():
    size = 40 * MIB
    state = state_with_tensors(size, 25)
    reached = prefetch_ends(state, in_order(size + SEEK_TOLERANCE_BYTES, begin=7 * size))
    assert (
        max(reached) == reached[-1] == 8 * size + SEEK_TOLERANCE_BYTES + size + SEEK_TOLERANCE_BYTES
    )


def test_sequential_small_tensors_grow_the_window():
    state = state_with_tensors(300 * KIB, 4000)
    reached = prefetch_ends(state, in_order(200 * MIB, begin=500 * MIB))
    assert is_far_ahead(max(reached), 700 * MIB)
    assert max(reached[: 5 * 8]) == 510 * MIB


def test_read_from_the_start_ignores_tensor_ends():
    state = state_with_tensors(40 * MIB, 25)
    assert is_far_ahead(max(prefetch_ends(state, in_order(100 * MIB))), 100 * MIB)


def granules(state, reads):
    """Return the granule of each read; each planned prefetch is completed at once."""
    found = []
    for offset, size in reads:
        plan = state.on_read(offset, size)
        if plan.stop > plan.start:
            state.mark_fetched(plan.stop)
        found.append(plan.granule_bytes)
    return found


def test_jumps_request_units_and_sequential_reads_blocks():
    state, rng = ReadaheadState(50 * GIB), random.Random(2)
    jumps = [(rng.randrange(50 * GIB), 4 * KIB) for _ in range(100)]
    assert set(granules(state, jumps)) == {UNIT_BYTES}
    reads = in_order(4 * MIB)
    assert granules(ReadaheadState(5 * GIB), reads) == [UNIT_BYTES] * 2 + [BLOCK_BYTES] * 30
    assert granules(ReadaheadState(5 * GIB), in_order(MIB, 4 * KIB))[64:] == [BLOCK_BYTES] * 192
    assert granules(ReadaheadState(3 * MIB), [(0, 9)]) == [BLOCK_BYTES], "it is read whole"


def test_runs_of_equal_length_prefetch_no_more_than_the_last():
    state, rng = ReadaheadState(50 * GIB), random.Random(3)
    begins = [rng.randrange(50 * GIB) for _ in range(20)]
    for number, begin in enumerate(begins):
        reached = max(prefetch_ends(state, in_order(MIB, begin=begin)))
        if number > 0:
            assert reached <= begin + MIB
    reached = prefetch_ends(state, in_order(9 * MIB, begin=7 * GIB))
    assert max(reached[:8]) == 7 * GIB + MIB
    assert max(reached) >= 7 * GIB + 17 * MIB, "a longer run is prefetched as the first one"


def test_large_read_that_begins_a_tensor_prefetches_the_tensor():
    size = 5 * MIB
    state = ReadaheadState(100 * size)
    state.set_tensor_offsets(range(size, 100 * size + 1, size))
    assert prefetch_ends(state, [(70 * size - MIB // 2, MIB)]) == [71 * size]
    assert prefetch_ends(state, [(30 * size, 4 * KIB), (90 * size - MIB, 64 * KIB)]) == [0, 0]
