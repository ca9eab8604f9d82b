"""Prefetching for traversals such as `ls -lR`, `find` and loops of scripts.

A traversal requests one run's listing or one checkpoint's weights info after another, each after
the response to the previous one. This module recognises traversals and predicts their next
requests, so that the catalog can send them concurrently. `Traversal` is the state of one traversal,
free of I/O. `TraversalPrefetcher` assigns accesses to traversals. Neither sends requests or caches
values.

One access to a run is not a traversal: prefetching starts with the second of two runs that are
adjacent, either in the server's order or sorted by name. Weights infos are prefetched from the
first access on, because siblings are likely to follow and each is requested only once ever.
"""

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice, pairwise
from typing import TypeVar

from tinkerfs import errors
from tinkerfs.catalog.listings import Checkpoint, CheckpointListing, RunListing
from tinkerfs.clock import Clock
from tinkerfs.context import Priority

#: A prefetch: of a run's listing, by the run's id, or of a checkpoint's weights info.
PrefetchItem = str | Checkpoint
#: The key of a prefetch: the run's id, or the checkpoint's key.
Key = str | tuple[str, str, str]

T = TypeVar("T")

#: A traversal ends after this time without an access, seconds.
TRAVERSAL_TIMEOUT_S = 10.0
#: The window grows by this with each access to a weights info that was not predicted.
MISPREDICTION_WINDOW_STEP = 4
#: Maximum number of mispredictions after which an order is still searched for. A search takes 10 ms
#: for a run with 10,000 checkpoints.
MAX_MISPREDICTIONS = 3
#: Maximum number of concurrent traversals, and of remembered accesses that may start one.
MAX_TRAVERSALS, MAX_RECENT_ACCESSES = 8, 64


class TraversalOrder(Enum):
    """The orders in which clients traverse directories."""

    #: The order of readdir(3), as find(1) and scripts use it.
    LISTED = "listed"
    #: Sorted by name, as ls(1) does.
    BY_NAME = "by name"
    #: The same two backwards: bash expands patterns with `*` in this order, and `ls -r` sorts so.
    LISTED_BACKWARDS = "listed, backwards"
    BY_NAME_BACKWARDS = "by name, backwards"

    @property
    def is_by_name(self) -> bool:
        """Whether the names are sorted."""
        return self in (TraversalOrder.BY_NAME, TraversalOrder.BY_NAME_BACKWARDS)

    @property
    def is_backwards(self) -> bool:
        """Whether the order starts with the last name."""
        return self in (TraversalOrder.LISTED_BACKWARDS, TraversalOrder.BY_NAME_BACKWARDS)


class OrderIndex:
    """Immutable index of names by their position in each order."""

    def __init__(self, names: Iterable[str]) -> None:
        self._listed = tuple(names)
        by_name = sorted(range(len(self._listed)), key=self._listed.__getitem__)
        self._by_name = [self._listed[position] for position in by_name]
        self._listed_positions = array("L", by_name)  # by the position in the sorted order

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._listed)

    def name(self, order: TraversalOrder, position: int) -> str:
        """Return the name at a position of an order, `0 <= position < len`."""
        names = self._by_name if order.is_by_name else self._listed
        return names[-1 - position] if order.is_backwards else names[position]

    def position(self, order: TraversalOrder, name: str) -> int | None:
        """Return the position of a name in an order, or None if the name is unknown."""
        position = bisect_left(self._by_name, name)
        if position == len(self) or self._by_name[position] != name:
            return None
        if not order.is_by_name:
            position = self._listed_positions[position]
        return len(self) - 1 - position if order.is_backwards else position


def in_order(listing: CheckpointListing, order: TraversalOrder) -> list[Checkpoint]:
    """Return a run's checkpoints in the order in which a traversal reaches them."""
    groups = [(kind, [(c.name, c) for c in listing.of_kind(kind)]) for kind in listing.kinds]
    if order.is_by_name:
        groups = sorted((kind, sorted(group, key=_name)) for kind, group in groups)
    ordered = [checkpoint for _, group in groups for _, checkpoint in group]
    return ordered[::-1] if order.is_backwards else ordered


def _name(named: tuple[str, object]) -> str:
    return named[0]


class Traversal:
    """State of one traversal: its order, its position and the size of its window.

    Args:
        order: the order in which it traverses directories.
        run_id: the run at its current position.
        runs: the runs that it traverses; empty if it traverses the checkpoints of one run.
        wants_infos: whether it reads weights infos too.
        max_window: maximum number of outstanding prefetches. The window starts at a quarter of this
            and doubles with each correct prediction.

    Attributes:
        outstanding: keys of prefetches that the traversal has not reached yet.
        seen_at: monotonic time of its last access, seconds.
    """

    def __init__(
        self,
        order: TraversalOrder,
        run_id: str,
        runs: OrderIndex,
        *,
        wants_infos: bool,
        max_window: int,
    ) -> None:
        self.order = order
        self.run_id = run_id
        self.seen_at = 0.0
        self.outstanding: set[Key] = set()
        self._runs = runs
        position = runs.position(order, run_id)
        self._position = 0 if position is None else position
        self._next = self._position + 1
        self._window = max(max_window // 4, 1)
        self._max_window = max_window
        self._wants_infos = wants_infos
        self._mispredictions = 0
        #: Runs with weights infos to queue, from the position on; each with its listing if known.
        self._pending: dict[str, CheckpointListing | None] = (
            {} if position is None else {run_id: None}
        )
        self._infos: deque[Checkpoint] = deque()

    def is_misprediction(self, key: Key) -> bool:
        """Return whether an access within one run suggests another order than assumed."""
        may_retry = self._mispredictions < MAX_MISPREDICTIONS
        return not len(self._runs) and key not in self.outstanding and may_retry

    def is_at(self, run_id: str) -> bool:
        """Return whether a run is the current one or the next one of the traversal."""
        if run_id == self.run_id:
            return True
        position = self._runs.position(self.order, run_id)
        return position is not None and position == self._position + 1

    def may_reach(self, run_id: str) -> bool:
        """Return whether a run is the current one or at most a window ahead."""
        position = self._runs.position(self.order, run_id)
        return position is not None and self._position <= position <= self._next + self._max_window

    def advance_to_run(self, run_id: str) -> None:
        """Move the position to a run that was accessed; earlier runs are ignored."""
        self._widen_window(run_id)
        position = self._runs.position(self.order, run_id)
        # Threads that share a traversal overtake each other.
        if position is None or position <= self._position:
            return
        self.run_id, self._position = run_id, position
        if position >= self._next:
            self._pending[run_id] = None
            self._next = position + 1
        for passed in [each for each in self._pending if self._is_passed(each)]:
            del self._pending[passed]
        self._infos = deque(each for each in self._infos if not self._is_passed(each.run_id))
        self.outstanding = {key for key in self.outstanding if not self._is_passed(_run_of(key))}

    def advance_to_info(self, checkpoint: Checkpoint, siblings: CheckpointListing | None) -> None:
        """Record an access to the weights info of a checkpoint of the current run."""
        if checkpoint.key in self.outstanding:
            self._widen_window(checkpoint.key)
        elif self._wants_infos:  # an unknown order: prefetch more, as all siblings may be read
            self._window = min(self._window + MISPREDICTION_WINDOW_STEP, 2 * self._max_window)
            self._mispredictions += 1
        if self._infos and self._infos[0].key == checkpoint.key:
            self._infos.popleft()
        if siblings is None:
            return
        if self._wants_infos:
            self.on_listing(checkpoint.run_id, siblings)
            return
        self._wants_infos = True
        self._pending.pop(checkpoint.run_id, None)
        ordered = in_order(siblings, self.order)
        index = next((i for i, c in enumerate(ordered) if c.key == checkpoint.key), len(ordered))
        self._infos.extend(ordered[index + 1 :] + ordered[:index])

    def on_listing(self, run_id: str, listing: CheckpointListing) -> bool:
        """Store a run's listing if needed; return whether it allows more prefetches."""
        if run_id not in self._pending:
            return False
        self._pending[run_id] = listing
        return self._wants_infos

    def next(self) -> PrefetchItem | None:
        """Return the next prefetch, now outstanding, or None if the window is full."""
        while len(self.outstanding) < self._window:
            if self._next < len(self._runs) and self._needs_listings():
                run_id = self._runs.name(self.order, self._next)
                self._next += 1
                self._pending[run_id] = None
                self.outstanding.add(run_id)
                return run_id
            if not self._wants_infos:
                return None
            if self._infos:
                checkpoint = self._infos.popleft()
                self.outstanding.add(checkpoint.key)
                return checkpoint
            run_id, listing = next(iter(self._pending.items()), ("", None))
            if listing is None:
                return None
            del self._pending[run_id]
            self._infos.extend(in_order(listing, self.order))
        return None

    def drop(self, key: Key) -> None:
        """Remove a prefetch that needed no request from the outstanding ones."""
        self.outstanding.discard(key)

    def _needs_listings(self) -> bool:
        # With weights infos most requests are for those, so a few listings suffice.
        return not self._wants_infos or len(self._pending) < max(self._window // 4, 1)

    def _is_passed(self, run_id: str) -> bool:
        position = self._runs.position(self.order, run_id)
        return position is not None and position < self._position

    def _widen_window(self, reached: Key) -> None:
        if reached in self.outstanding:
            self.outstanding.discard(reached)
            self._window = max(min(self._window * 2, self._max_window), self._window)


class TraversalPrefetcher:
    """The current traversals of one account. Thread-safe.

    Args:
        max_window: maximum number of outstanding prefetches of one traversal.
        clock: source of monotonic time, by which traversals end.
    """

    def __init__(self, max_window: int, clock: Clock) -> None:
        self._max_window = max_window
        self._clock = clock
        self._lock = threading.Lock()
        #: The traversal of each outstanding prefetch; read without the lock, changed under it.
        self._owners: dict[Key, Traversal] = {}
        # Guarded by _lock.
        self._traversals: list[Traversal] = []  # newest first
        self._recent_run_accesses: OrderedDict[str, float] = OrderedDict()
        self._recent_info_accesses: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        self._runs: RunListing | None = None
        self._index = OrderIndex(())

    def is_prefetched(self, key: Key) -> bool:
        """Return whether a listing or weights info was prefetched and not read since."""
        return key in self._owners

    def on_run_access(self, run_id: str, runs: RunListing | None) -> Traversal | None:
        """Record an access to a run; return the traversal that it belongs to, if any.

        Args:
            run_id: the run.
            runs: all runs; None if they are unknown or must not be prefetched.
        """
        with self._lock:
            now = self._expire()
            traversal = self._find(run_id, runs)
            _remember(self._recent_run_accesses, run_id, now)
            if traversal is not None:
                traversal.advance_to_run(run_id)
                traversal.seen_at = now
            return traversal

    def on_info_access(
        self, checkpoint: Checkpoint, siblings: CheckpointListing | None, runs: RunListing | None
    ) -> Traversal | None:
        """Record an access to a weights info; return its traversal, if any.

        Args:
            checkpoint: the checkpoint of the weights info.
            siblings: all checkpoints of its run; None if they are unknown.
            runs: as in `on_run_access`.
        """
        key, run_id = checkpoint.key, checkpoint.run_id
        with self._lock:
            now = self._expire()
            traversal = self._find(key, runs)
            last, _ = self._recent_info_accesses.get(run_id, (key, now))
            if siblings is not None and (traversal is None or traversal.is_misprediction(key)):
                traversal = self._traverse_run(siblings, last, key, traversal)
            _remember(self._recent_info_accesses, run_id, (key, now))
            if traversal is not None:
                traversal.advance_to_run(run_id)
                traversal.advance_to_info(checkpoint, siblings)
                traversal.seen_at = now
            return traversal

    def on_listing(self, run_id: str, listing: CheckpointListing) -> list[Traversal]:
        """Record a run's listing; return the traversals that can prefetch more with it."""
        with self._lock:
            return [each for each in self._traversals if each.on_listing(run_id, listing)]

    def next(self, traversal: Traversal) -> PrefetchItem | None:
        """Return the next prefetch of a traversal, or None if it may send none now."""
        with self._lock:
            self._expire()
            item = traversal.next() if traversal in self._traversals else None
            if item is not None:
                self._owners[_key(item)] = traversal
            return item

    def drop(self, traversal: Traversal, item: PrefetchItem) -> None:
        """Record that a prefetch returned by `next` needed no request."""
        with self._lock:
            traversal.drop(_key(item))
            self._owners.pop(_key(item), None)

    @contextmanager
    def stop_on_outage(self, key: Key, priority: Priority) -> Iterator[None]:
        """End a traversal if its prefetch, sent in the body, fails in an outage.

        The client process then sends its own requests and gets their errors.
        """
        try:
            yield
        except errors.UNAVAILABLE_ERRORS:
            with self._lock:
                traversal = None if priority.is_demand else self._owners.get(key)
                if traversal is not None:
                    self._end(traversal)
            raise

    def on_runs_reloaded(self) -> None:
        """Release the index of the runs after they were listed again."""
        with self._lock:
            self._runs, self._index = None, OrderIndex(())

    def clear(self) -> None:
        """End every traversal and discard the recorded accesses."""
        with self._lock:
            for traversal in list(self._traversals):
                self._end(traversal)
            self._recent_run_accesses.clear()
            self._recent_info_accesses.clear()
            self._runs, self._index = None, OrderIndex(())

    # The caller of the methods below holds the lock.

    def _expire(self) -> float:
        """Discard idle traversals and old accesses; return the current time."""
        now = self._clock.monotonic()
        for traversal in [t for t in self._traversals if now - t.seen_at > TRAVERSAL_TIMEOUT_S]:
            self._end(traversal)
        runs, infos = self._recent_run_accesses, self._recent_info_accesses
        while runs and now - next(iter(runs.values())) > TRAVERSAL_TIMEOUT_S:
            runs.popitem(last=False)
        while infos and now - next(iter(infos.values()))[1] > TRAVERSAL_TIMEOUT_S:
            infos.popitem(last=False)
        return now

    def _find(self, key: Key, runs: RunListing | None) -> Traversal | None:
        """Return the traversal that an access belongs to, which may be a new one.

        Two runs may be adjacent in two orders. A traversal that expected this run next therefore
        takes precedence over one that may reach the run later. A new traversal in another order
        replaces the one at the previous run.
        """
        run_id = _run_of(key)
        owner = self._owners.pop(key, None)
        traversal = next((each for each in self._traversals if each.is_at(run_id)), None)
        traversal = traversal or self._start(key, runs) or owner
        if traversal is None:
            traversal = next((each for each in self._traversals if each.may_reach(run_id)), None)
        if owner is not None and owner is not traversal:
            owner.drop(key)
        return traversal

    def _traverse_run(
        self, siblings: CheckpointListing, last: Key, key: Key, traversal: Traversal | None
    ) -> Traversal | None:
        """Return a traversal of one run's weights infos, restarted if the order changed."""
        order = next(
            (each for each in TraversalOrder if _are_next(siblings, each, last, key)), None
        )
        if traversal is not None:
            if order is None:
                return traversal
            self._end(traversal)
        started = Traversal(
            order or TraversalOrder.BY_NAME,
            _run_of(key),
            OrderIndex(()),
            wants_infos=False,
            max_window=self._max_window,
        )
        self._add(started)
        return started

    def _start(self, key: Key, runs: RunListing | None) -> Traversal | None:
        """Start a traversal if the run before this one was accessed recently."""
        run_id = _run_of(key)
        is_run = isinstance(key, str)
        accesses = self._recent_run_accesses if is_run else self._recent_info_accesses
        recent = [each for each in islice(reversed(accesses), MAX_TRAVERSALS) if each != run_id]
        if runs is None or not recent:  # checked first: indexing 100,000 runs is slow
            return None
        index = self._index_of(runs)
        previous = {
            index.name(order, position - 1): order
            for order in reversed(TraversalOrder)
            if (position := index.position(order, run_id))
        }
        last = next((each for each in recent if each in previous), None)
        if last is None:
            return None
        for replaced in [each for each in self._traversals if each.run_id == last]:
            self._end(replaced)
        traversal = Traversal(
            previous[last],
            run_id,
            index,
            wants_infos=last in self._recent_info_accesses,
            max_window=self._max_window,
        )
        self._add(traversal)
        return traversal

    def _add(self, traversal: Traversal) -> None:
        traversal.seen_at = self._clock.monotonic()
        self._traversals.insert(0, traversal)
        for oldest in self._traversals[MAX_TRAVERSALS:]:
            self._end(oldest)

    def _end(self, traversal: Traversal) -> None:
        self._traversals.remove(traversal)
        for key in [key for key, owner in self._owners.items() if owner is traversal]:
            del self._owners[key]

    def _index_of(self, runs: RunListing) -> OrderIndex:
        if runs is not self._runs:
            self._runs, self._index = runs, OrderIndex(runs.by_id)
        return self._index


def _run_of(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _key(item: PrefetchItem) -> Key:
    return item if isinstance(item, str) else item.key


def _are_next(listing: CheckpointListing, order: TraversalOrder, first: Key, second: Key) -> bool:
    ordered = [checkpoint.key for checkpoint in in_order(listing, order)]
    return any(pair == (first, second) for pair in pairwise(ordered))


def _remember(accesses: "OrderedDict[str, T]", run_id: str, access: T) -> None:
    accesses[run_id] = access
    accesses.move_to_end(run_id)
    if len(accesses) > MAX_RECENT_ACCESSES:
        accesses.popitem(last=False)
