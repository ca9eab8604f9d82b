"""Cache of values derived from cached API responses."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

from tinkerfs.validity import Validity

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _ValidatedEntry(msgspec.Struct, Generic[V], frozen=True):
    value: V
    validity: Validity
    generation: int
    weight: int


class ValidatedCache(Generic[K, V]):
    """Values by key, each valid as long as all of its dependencies. Thread-safe.

    The generation reveals new information, such as a listing that has changed. The validity lets
    an unchanged refresh prolong every value that was derived from it.

    Args:
        check: returns whether a validity and a generation still hold; called without a lock.
        max_weight: bound on the sum of the weights; the oldest entries are evicted.
    """

    def __init__(self, check: Callable[[Validity, int], bool], max_weight: int) -> None:
        self._check = check
        self._max_weight = max_weight
        self._lock = threading.Lock()
        # Writes hold _lock; reads do not, because single operations on a dict are atomic.
        self._entries: dict[K, _ValidatedEntry[V]] = {}
        self._weight = 0
        self._generation = 0

    def get(self, key: K) -> V | None:
        """Return the cached value, None if there is no valid one."""
        entry = self._entries.get(key)
        if entry is None or not self._check(entry.validity, entry.generation):
            return None
        return entry.value

    def peek(self, key: K) -> V | None:
        """Return the cached value even if it has expired."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def put(
        self, key: K, value: V, validity: Validity, generation: int, *, weight: int = 1
    ) -> None:
        """Cache a value, unless it is uncacheable or takes more than a quarter of the cache.

        Values of older generations are dropped, because they never become valid again.

        Args:
            key: the key.
            value: the value.
            validity: the dependencies of the value.
            generation: the generation of the metadata before the value was derived.
            weight: share of `max_weight`.
        """
        if validity.is_uncacheable or weight > self._max_weight // 4:
            return
        with self._lock:
            if generation < self._generation:
                return
            if generation > self._generation:
                self._entries.clear()
                self._weight, self._generation = 0, generation
            previous = self._entries.pop(key, None)  # so that the new entry is the last one
            self._weight += weight - (0 if previous is None else previous.weight)
            self._entries[key] = _ValidatedEntry(value, validity, generation, weight)
            if self._weight > self._max_weight:
                self._evict()

    def _evict(self) -> None:
        """Evict the oldest eighth; the caller holds the lock.

        It is more than one entry, because finding the first key of a dict takes the longer the more
        keys were deleted before it.
        """
        for key in list(self._entries):
            if self._weight <= self._max_weight * 7 // 8:
                break
            self._weight -= self._entries.pop(key).weight
