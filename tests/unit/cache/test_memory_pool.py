"""The bound on memory: never more, and nobody waits for ever."""

import threading

from tests.support.clocks import FakeTime
from tinkerfs.cache.memory_pool import BlockMemoryPool


def fill(memory, file, index):
    assert memory.reserve(30, 0)
    memory.keep((file, index), bytes(30))


def test_room_is_taken_from_the_least_recently_used():
    memory = BlockMemoryPool(100)
    for index in range(3):
        fill(memory, "file", index)
        memory.get(("file", index))
    assert memory.get(("file", 0)) == bytes(30)
    assert memory.reserve(40, 0)
    assert [memory.has(("file", index)) for index in range(3)] == [True, False, True]
    assert memory.peak_bytes <= 100


def test_what_nobody_has_used_yet_goes_last_and_is_no_room_for_more_of_it():
    memory = BlockMemoryPool(100)
    for index in range(3):
        assert memory.can_prefetch(30) == (index < 1)
        fill(memory, "file", index)
    memory.get(("file", 1))
    memory.get(("file", 2))
    assert memory.can_prefetch(20)
    assert memory.reserve(40, 0)
    assert [memory.has(("file", index)) for index in range(3)] == [True, False, True]
    assert memory.reserve(50, 0)
    assert not memory.has(("file", 0)), "room that is needed is had"
    assert memory.peak_bytes <= 100


def test_what_was_fetched_ahead_of_a_file_that_is_closed_is_in_nobodys_way():
    memory = BlockMemoryPool(100)
    fill(memory, "one", 0)
    fill(memory, "other", 0)
    memory.demote_prefetched("one")
    assert memory.can_prefetch(20)
    assert not memory.can_prefetch(21)
    assert memory.get(("one", 0)) == memory.get(("other", 0)) == bytes(30)


def test_what_nobody_uses_for_long_is_in_nobodys_way():
    time = FakeTime()
    memory = BlockMemoryPool(100, time.clock)
    fill(memory, "idle", 0)
    time.advance(9)
    fill(memory, "other", 0)
    assert not memory.can_prefetch(21)
    time.advance(2)
    assert memory.can_prefetch(20)
    assert not memory.can_prefetch(21)
    assert memory.has(("idle", 0))


def test_a_block_that_comes_again_takes_the_place_of_the_one_before():
    memory = BlockMemoryPool(100)
    for _ in range(5):
        fill(memory, "file", 0)
        fill(memory, "file", 0)
        memory.get(("file", 0))
    assert memory.reserve(70, 0)
    assert memory.has(("file", 0))


def test_who_finds_no_room_waits_for_it_and_not_for_ever():
    memory = BlockMemoryPool(100)
    assert memory.reserve(80, 0)
    assert not memory.reserve(40, 0.05)
    threading.Timer(0.05, memory.release, [80]).start()
    assert memory.reserve(40, 10)


def test_what_is_larger_than_all_is_given_to_one_alone():
    memory = BlockMemoryPool(10)
    assert memory.reserve(50, 0)
    assert not memory.reserve(1, 0)
    memory.release(50)
    assert memory.reserve(1, 0)


def test_half_of_it_is_left_to_those_who_wait():
    memory = BlockMemoryPool(100)
    assert memory.can_prefetch(50)
    memory.reserve(30, 0)
    assert not memory.can_prefetch(30)
