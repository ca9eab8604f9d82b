"""The cache of derived values: validity, generations, eviction."""

import threading

import pytest

from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.validity import Expiry, Validity


class Metadata:
    """What the cached values are derived from."""

    def __init__(self):
        self.generation, self.now = 1, 0.0

    def check(self, validity, generation):
        return generation == self.generation and validity.check_and_touch(self.now)


@pytest.fixture
def metadata():
    return Metadata()


@pytest.fixture
def cache(metadata):
    return ValidatedCache(metadata.check, 16)


def until(*times):
    validity = Validity()
    for fresh_until in times:
        validity.add(Expiry(fresh_until))
    return validity


def keys(cache):
    return [key for key in range(100) if cache.get(key) is not None]


def test_get_returns_value_until_first_expiry(cache, metadata):
    assert cache.get("key") is None
    cache.put("key", "value", until(5, 3), 1)
    metadata.now = 2.9
    assert cache.get("key") == "value"
    metadata.now = 3.0
    assert cache.get("key") is None
    assert cache.peek("key") == "value"


def test_get_marks_dependencies_as_used(cache, metadata):
    expiry, validity = Expiry(5), Validity()
    validity.add(expiry)
    cache.put("key", "value", validity, 1)
    metadata.now = 4.0
    cache.get("key")
    assert expiry.last_used == 4.0


def test_prolonged_dependency_prolongs_the_value(cache, metadata):
    expiry, validity = Expiry(5), Validity()
    validity.add(expiry)
    cache.put("key", "value", validity, 1)
    metadata.now, expiry.fresh_until = 9.0, 10.0
    assert cache.get("key") == "value"


def test_value_of_old_generation_is_dropped_at_next_put(cache, metadata):
    for key in range(3):
        cache.put(key, key, until(5), 1)
    metadata.generation = 2
    assert keys(cache) == []
    cache.put(7, 7, until(5), 2)
    assert cache.peek(0) is None
    cache.put(8, 8, until(5), 1)  # derived before the change
    assert cache.peek(8) is None
    assert keys(cache) == [7]


def test_uncacheable_value_is_not_cached(cache):
    validity = until(5)
    validity.mark_uncacheable()
    cache.put("key", "value", validity, 1)
    assert cache.peek("key") is None


def test_full_cache_evicts_the_oldest(cache):
    for key in range(16):
        cache.put(key, key, until(5), 1)
    cache.put(0, 0, until(5), 1)
    assert len(keys(cache)) == 16
    cache.put(16, 16, until(5), 1)
    assert keys(cache) == [0, *range(4, 17)]


def test_cache_is_bounded_by_weight(cache):
    cache.put(0, 0, until(5), 1, weight=5)
    assert keys(cache) == [], "more than a quarter of the cache"
    for _ in range(20):
        cache.put(0, 0, until(5), 1, weight=4)
    assert keys(cache) == [0]
    for key in range(1, 4):
        cache.put(key, key, until(5), 1, weight=4)
    assert keys(cache) == [0, 1, 2, 3]
    cache.put(4, 4, until(5), 1)
    assert keys(cache) == [1, 2, 3, 4]


def test_concurrent_puts_keep_the_bound(cache):
    def put_all(start):
        for number in range(2000):
            cache.put((start + number) % 50, number, until(5), 1, weight=1 + number % 4)
            cache.get(number % 50)

    threads = [threading.Thread(target=put_all, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in range(50, 66):
        cache.put(key, key, until(5), 1)
    assert len(keys(cache)) >= 14, "the weights of evicted values are subtracted"
    assert len(keys(cache)) <= 16
