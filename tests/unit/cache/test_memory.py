"""The bound on memory: never more, and nobody waits for ever."""

import threading

from tinkerfs.cache.memory import BlockMemory


def test_room_is_taken_from_the_least_recently_used():
    memory = BlockMemory(100)
    for key in "abc":
        assert memory.reserve(30, 0)
        memory.keep(key, key.encode() * 30)
    assert memory.get("a") == b"a" * 30
    assert memory.reserve(40, 0)
    assert [memory.get(key) is not None for key in "abc"] == [True, False, True]
    assert memory.most_bytes <= 100


def test_who_finds_no_room_waits_for_it_and_not_for_ever():
    memory = BlockMemory(100)
    assert memory.reserve(80, 0)
    assert not memory.reserve(40, 0.05)
    threading.Timer(0.05, memory.release, [80]).start()
    assert memory.reserve(40, 10)


def test_what_is_larger_than_all_is_given_to_one_alone():
    memory = BlockMemory(10)
    assert memory.reserve(50, 0)
    assert not memory.reserve(1, 0)
    memory.release(50)
    assert memory.reserve(1, 0)


def test_half_of_it_is_left_to_those_who_wait():
    memory = BlockMemory(100)
    assert memory.has_room(50)
    memory.reserve(30, 0)
    assert not memory.has_room(30)
