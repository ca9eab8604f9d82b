"""The memory pool never exceeds its bound, and no caller waits forever."""

import threading

from tests.support.clocks import FakeTime
from tinkerfs.cache.data_layout import UNIT_BYTES
from tinkerfs.cache.memory_pool import BlockMemoryPool


def fill(memory, file, index):
    assert memory.reserve(30, 0)
    memory.keep(file, index * UNIT_BYTES, bytes(30))


def test_reserve_evicts_the_least_recently_used_block():
    memory = BlockMemoryPool(100)
    for index in range(3):
        fill(memory, "file", index)
        memory.get(("file", index))
    assert memory.get(("file", 0)) == bytes(30)
    assert memory.reserve(40, 0)
    assert [memory.has(("file", index)) for index in range(3)] == [True, False, True]
    assert memory.peak_bytes <= 100


def test_prefetched_block_is_evicted_last_and_limits_prefetch():
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
    assert not memory.has(("file", 0)), "a reservation evicts prefetched blocks if needed"
    assert memory.peak_bytes <= 100


def test_demoted_prefetches_do_not_limit_prefetch():
    memory = BlockMemoryPool(100)
    fill(memory, "one", 0)
    fill(memory, "other", 0)
    memory.demote_prefetched("one")
    assert memory.can_prefetch(20)
    assert not memory.can_prefetch(21)
    assert memory.get(("one", 0)) == memory.get(("other", 0)) == bytes(30)


def test_old_prefetches_do_not_limit_prefetch():
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


def test_old_prefetch_is_evicted_before_a_block_read_later():
    time = FakeTime()
    memory = BlockMemoryPool(100, time.clock)
    fill(memory, "idle", 0)
    time.advance(11)
    fill(memory, "other", 0)
    memory.get(("other", 0))
    assert memory.reserve(50, 0)
    assert not memory.has(("idle", 0))
    assert memory.has(("other", 0))


def test_block_kept_twice_replaces_the_first():
    memory = BlockMemoryPool(100)
    for _ in range(5):
        fill(memory, "file", 0)
        fill(memory, "file", 0)
        memory.get(("file", 0))
    assert memory.reserve(70, 0)
    assert memory.has(("file", 0))


def test_reserve_without_room_waits_until_its_timeout():
    memory = BlockMemoryPool(100)
    assert memory.reserve(80, 0)
    assert not memory.reserve(40, 0.05)
    threading.Timer(0.05, memory.release, [80]).start()
    assert memory.reserve(40, 10)


def test_reservation_beyond_the_bound_is_exclusive():
    memory = BlockMemoryPool(10)
    assert memory.reserve(50, 0)
    assert not memory.reserve(1, 0)
    memory.release(50)
    assert memory.reserve(1, 0)


def test_prefetch_uses_at_most_half_of_the_bound():
    memory = BlockMemoryPool(100)
    assert memory.can_prefetch(50)
    memory.reserve(30, 0)
    assert not memory.can_prefetch(30)
