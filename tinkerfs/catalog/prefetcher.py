"""Prefetching for traversals such as `ls -lR`, `find` and loops of scripts.

A traversal accesses one run or weights info after another, each after the response to the previous
request. `SequencePrefetcher` recognises it by two accesses to neighbours, predicts its next
accesses, and prefetches them. A window bounds how far it is ahead, so that little is requested for
a traversal that ends early.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from tinkerfs.catalog.listings import CheckpointListing, RunListing
from tinkerfs.catalog.order_index import Order
from tinkerfs.clock import Clock

K = TypeVar("K", bound=Hashable)

#: A traversal ends after this time without an access, seconds.
TRAVERSAL_TIMEOUT_S = 10.0
#: Maximum number of concurrent traversals; also single accesses that may start one.
MAX_TRAVERSALS = 32
#: Maximum number of already cached items that are skipped at each access.
MAX_SKIPPED = 64


@dataclass(slots=True, eq=False)
class _Traversal(Generic[K]):
    """State of one traversal.

    Attributes:
        reached: the item that was accessed last.
        order: None until two neighbours were accessed.
        end: the last item of the window; None after the traversal has ended.
        window: maximum number of outstanding prefetches.
        outstanding: prefetched items that were not accessed yet, in order.
        seen_at: monotonic time of the last access, seconds.
    """

    reached: K
    order: Order | None
    end: K | None
    window: int
    seen_at: float
    outstanding: dict[K, None] = field(default_factory=dict)


class SequencePrefetcher(Generic[K]):
    """Prefetches the next items of each traversal of a sequence. Thread-safe.

    Args:
        following: returns the item after another one in an order; None if it is unknown.
        prefetch: requests an item in the background; returns False if it is cached.
        may_prefetch: returns whether prefetches make sense now.
        max_window: maximum number of outstanding prefetches of one traversal. The window starts at
            a quarter of this and doubles with each correct prediction.
        clock: source of monotonic time, by which traversals end.
        group: returns the group of an item, such as the run of a checkpoint. The first access in a
            group then starts a traversal by name. None if only two neighbours start one.
    """

    def __init__(
        self,
        following: Callable[[K, Order], K | None],
        prefetch: Callable[[K], bool],
        may_prefetch: Callable[[], bool],
        max_window: int,
        clock: Clock,
        *,
        group: Callable[[K], Hashable] | None = None,
    ) -> None:
        self._following = following
        self._prefetch = prefetch
        self._may_prefetch = may_prefetch
        self._max_window = max_window
        self._clock = clock
        self._group = group
        self._lock = threading.Lock()
        #: The traversal of each outstanding prefetch; read without the lock, changed under it.
        self._owners: dict[K, _Traversal[K]] = {}
        self._traversals: list[_Traversal[K]] = []  # guarded by _lock; last accessed first

    def on_read(self, item: K) -> None:
        """Record that an item is read, from the cache or not; cheap unless it was prefetched."""
        if item in self._owners:
            self.on_access(item)

    def on_access(self, item: K) -> None:
        """Record an access that was prefetched or is about to send a request; prefetch more."""
        if not self._may_prefetch():
            return
        previous = {}
        if self._traversals:  # checked first: indexing 100,000 runs is slow
            previous = {order: self._following(item, order.reversed) for order in Order}
        with self._lock:
            traversal = self._advance(item, previous)
            end, order = traversal.end, traversal.order
        if end is None or order is None:
            return
        for following in islice(self._after(end, order), MAX_SKIPPED):
            with self._lock:
                if traversal.end != end or len(traversal.outstanding) >= traversal.window:
                    return  # the window is full, or another thread continues
                end = traversal.end = following
                traversal.outstanding[following] = None
                self._owners[following] = traversal
            if not self._prefetch(following):
                with self._lock:
                    self._forget(traversal, following)

    def clear(self) -> None:
        """End every traversal."""
        with self._lock:
            for traversal in list(self._traversals):
                self._end(traversal)

    def _after(self, item: K, order: Order) -> Iterator[K]:
        following = self._following(item, order)
        while following is not None:
            yield following
            following = self._following(following, order)

    # The caller of the methods below holds the lock.

    def _advance(self, item: K, previous: dict[Order, K | None]) -> _Traversal[K]:
        """Return the traversal of an access, which may be a new one, at its new position."""
        now = self._clock.monotonic()
        for idle in [t for t in self._traversals if now - t.seen_at > TRAVERSAL_TIMEOUT_S]:
            self._end(idle)
        traversal = self._owners.get(item)
        if traversal is not None:
            traversal.window = min(2 * traversal.window, self._max_window)
            for passed in list(traversal.outstanding):
                self._forget(traversal, passed)
                if passed == item:
                    break
        else:
            traversal, order = self._find(item, previous)
            if order is not traversal.order:
                self._forget(traversal, *traversal.outstanding)
                traversal.order, traversal.window = order, self._min_window
            if not traversal.outstanding:
                traversal.end = item
        traversal.reached, traversal.seen_at = item, now
        self._traversals.remove(traversal)
        self._traversals.insert(0, traversal)
        return traversal

    def _find(self, item: K, previous: dict[Order, K | None]) -> tuple[_Traversal[K], Order | None]:
        """Return the traversal that reached a neighbour of an item, and the order of the two.

        Two items may be neighbours in several orders: then the order so far is more likely.
        """
        found = [
            (traversal, order)
            for traversal in self._traversals
            for order, reached in previous.items()
            if traversal.reached == reached
        ]
        if found:
            return next((each for each in found if each[0].order is each[1]), found[0])
        order = Order.BY_NAME if self._is_first_of_group(item) else None
        traversal = _Traversal(item, order, item, self._min_window, self._clock.monotonic())
        self._traversals.insert(0, traversal)
        for oldest in self._traversals[MAX_TRAVERSALS:]:
            self._end(oldest)
        return traversal, order

    def _is_first_of_group(self, item: K) -> bool:
        if self._group is None:
            return False
        return self._group(item) not in {self._group(each.reached) for each in self._traversals}

    @property
    def _min_window(self) -> int:
        return max(self._max_window // 4, 1)

    def _forget(self, traversal: _Traversal[K], *items: K) -> None:
        """Remove items from the outstanding ones."""
        for item in items:
            # Another thread may have removed it, and another traversal prefetched it again.
            traversal.outstanding.pop(item, None)
            if self._owners.get(item) is traversal:
                del self._owners[item]

    def _end(self, traversal: _Traversal[K]) -> None:
        self._traversals.remove(traversal)
        self._forget(traversal, *traversal.outstanding)
        traversal.end = None


def following_checkpoint(
    key: tuple[str, str, str],
    order: Order,
    runs: RunListing | None,
    listing_of: Callable[[str], CheckpointListing | None],
) -> tuple[str, str, str] | None:
    """Return the checkpoint after another one, of the same run or of a following run.

    Args:
        key: the `Checkpoint.key` of the other one.
        order: the order of runs and of checkpoints within a run.
        runs: all runs; None if they are unknown.
        listing_of: returns the checkpoints of a run; None if they are unknown.
    """
    run_id, kind, name = key
    listing = listing_of(run_id)
    if listing is None or listing.get(kind, name) is None:
        return None
    found = listing.order.next((kind, name), order)
    for _ in range(MAX_SKIPPED):  # runs without checkpoints
        if found is not None or runs is None:
            break
        following = runs.order.next(run_id, order)
        listing = None if following is None else listing_of(following)
        if following is None or listing is None:
            break
        run_id, found = following, listing.order.first(order)
    return None if found is None else found.key
