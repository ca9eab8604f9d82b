"""Read-ahead: what is fetched before it is asked for."""

import itertools
import random

import pytest

from tinkerfs.weights.readahead import (
    HEADER_BYTES,
    MAX_READAHEAD_BYTES,
    READAHEAD_CONCURRENCY,
    SEEK_TOLERANCE_BYTES,
    ReadaheadState,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def ends(ahead, reads):
    """Return up to where is fetched after each read, all of it at once."""
    reached = []
    for offset, size in reads:
        start, stop, _ = ahead.on_read(offset, size)
        if stop > start:
            ahead.mark_fetched(stop)
        reached.append(stop)
    return reached


def is_far_ahead(reached, read):
    """Whether all is wanted that may be behind what was read, to within what one request is for."""
    return 0 <= read + MAX_READAHEAD_BYTES - reached < MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY


def in_order(size, step=128 * KIB, begin=0):
    return [(offset, step) for offset in range(begin, begin + size, step)]


def test_the_header_of_a_large_file_costs_no_more_than_itself():
    ahead = ReadaheadState(5 * GIB)
    assert max(ends(ahead, [(0, 8), (8, 150 * KIB)])) <= 512 * KIB


def test_who_reads_on_has_ever_more_fetched_up_to_a_bound():
    reached = ends(ReadaheadState(5 * GIB), in_order(200 * MIB))
    assert is_far_ahead(max(reached), 200 * MIB)
    assert max(reached[: 4 * 8]) <= 8 * MIB


def test_who_reads_on_behind_a_header_has_all_connections_busy_soon():
    reached = ends(ReadaheadState(5 * GIB), in_order(32 * MIB, step=MIB))
    assert max(reached[: HEADER_BYTES // MIB]) <= 2 * HEADER_BYTES
    assert reached[HEADER_BYTES // MIB] >= 5 * HEADER_BYTES
    assert is_far_ahead(max(reached), 32 * MIB)


def test_who_reads_from_elsewhere_has_no_more_ahead_than_was_read():
    begin, ahead = 100 * MIB, ReadaheadState(5 * GIB)
    for number, reached in enumerate(ends(ahead, in_order(20 * MIB, MIB, begin)), 1):
        assert reached <= begin + 2 * number * MIB


@pytest.mark.parametrize("seed", range(3))
def test_the_disorder_of_the_kernel_is_a_sequence_still(seed):
    rng, reads = random.Random(seed), in_order(100 * MIB)
    shuffled = [
        read for at in range(0, len(reads), 5) for read in rng.sample(reads[at : at + 5], 5)
    ]
    assert is_far_ahead(max(ends(ReadaheadState(5 * GIB), shuffled)), 100 * MIB)


def test_nothing_is_wanted_twice_and_nothing_before_what_is_read():
    ahead, asked = ReadaheadState(GIB), []
    for offset, size in in_order(150 * MIB):
        start, stop, _ = ahead.on_read(offset, size)
        if stop > start:
            assert start >= offset
            asked.append((start, stop))
            ahead.mark_fetched(stop)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(asked))


def test_what_is_wanted_is_worth_a_request_or_is_the_last():
    ahead, size, requests = ReadaheadState(300 * MIB), 300 * MIB, []
    for offset, step in in_order(size):
        start, stop, request = ahead.on_read(offset, step)
        if stop > start:
            assert stop - start >= request or stop == size
            requests.append(request)
            ahead.mark_fetched(stop)
    assert requests == sorted(requests)
    assert requests[-1] == MAX_READAHEAD_BYTES // READAHEAD_CONCURRENCY


def test_what_was_not_reached_is_wanted_again():
    ahead = ReadaheadState(GIB)
    ahead.on_read(0, 4 * MIB)
    first = ahead.on_read(4 * MIB, MIB)
    ahead.mark_fetched(first[0])
    assert ahead.on_read(5 * MIB, MIB)[0] == 6 * MIB


def test_a_jump_starts_at_nothing_again():
    ahead = ReadaheadState(5 * GIB)
    ends(ahead, in_order(100 * MIB))
    assert ends(ahead, [(3 * GIB, 4 * KIB)]) == [0]
    assert max(ends(ahead, in_order(MIB, begin=3 * GIB + 4 * KIB))) <= 3 * GIB + 3 * MIB


def test_random_reads_fetch_nothing_ahead():
    rng, ahead = random.Random(1), ReadaheadState(50 * GIB)
    reads = [(rng.randrange(50 * GIB), 4 * KIB) for _ in range(500)]
    assert sum(stop > 0 for stop in ends(ahead, reads)) <= 5


def test_a_stride_is_followed():
    stride, piece, ahead = 16 * MIB, MIB, ReadaheadState(5 * GIB)
    for number in range(8):
        found = []
        for offset, size in in_order(piece, begin=number * stride):
            start, stop, _ = ahead.on_read(offset, size)
            found.append((start, stop))
        if number > 2:
            begin, end = found[0]
            assert begin == (number + 1) * stride
            assert end >= begin + piece


def test_a_small_file_is_wanted_whole_at_the_second_read():
    ahead = ReadaheadState(60 * MIB)
    assert ahead.on_read(0, 8)[1] <= 16
    assert ahead.on_read(8, 4 * KIB)[:2] == (8 + 4 * KIB, 60 * MIB)
    assert ReadaheadState(60 * MIB).on_read(SEEK_TOLERANCE_BYTES + 1, 4 * KIB) == (0, 0, 0)


def test_nothing_is_wanted_beyond_the_end():
    ahead = ReadaheadState(10 * MIB)
    assert max(ends(ahead, in_order(10 * MIB))) == 10 * MIB
    assert ReadaheadState(0).on_read(0, 0) == (0, 0, 0)


def tensors_of(size, count):
    """A file of so many tensors, and read-ahead that knows them."""
    ahead = ReadaheadState(size * count)
    ends(ahead, in_order(MIB))
    assert not ahead.needs_tensor_offsets()
    ends(ahead, [(size * count // 2, 4 * KIB)])
    assert ahead.needs_tensor_offsets()
    ahead.set_tensor_offsets(range(size, size * count + 1, size))
    assert not ahead.needs_tensor_offsets()
    return ahead


@pytest.mark.parametrize("early", [0, 512 * KIB])
@pytest.mark.parametrize("late", [0, MIB])
def test_nothing_behind_a_tensor_is_fetched_for_who_jumped_to_it(early, late):
    size = 40 * MIB
    ahead = tensors_of(size, 25)
    reads = in_order(early + size + late, begin=7 * size - early)
    assert max(ends(ahead, reads)) == 8 * size


def test_who_leaves_a_tensor_behind_has_what_follows_fetched():
    size = 40 * MIB
    ahead = tensors_of(size, 25)
    reached = ends(ahead, in_order(size + SEEK_TOLERANCE_BYTES, begin=7 * size))
    assert (
        max(reached) == reached[-1] == 8 * size + SEEK_TOLERANCE_BYTES + size + SEEK_TOLERANCE_BYTES
    )


def test_small_tensors_that_are_read_in_order_hold_up_nothing():
    ahead = tensors_of(300 * KIB, 4000)
    reached = ends(ahead, in_order(140 * MIB, begin=500 * MIB))
    assert is_far_ahead(max(reached), 640 * MIB)
    assert max(reached[: 5 * 8]) == 510 * MIB


def test_who_reads_from_the_start_on_reads_all():
    ahead = tensors_of(40 * MIB, 25)
    assert is_far_ahead(max(ends(ahead, in_order(100 * MIB))), 100 * MIB)
