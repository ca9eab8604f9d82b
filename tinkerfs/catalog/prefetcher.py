"""Walks: where somebody goes through the account, and what will be asked for next.

A walk (`ls -lR`, `find`, a script's loop) asks for one thing after the other, each once the one
before is answered. Here it is recognised and its next questions are told, so that they can be asked
side by side. `Walk` is one walk, a pure value machine; `Walks` finds out which one somebody is on,
for the catalogue, which asks. Nothing here makes a call or keeps an answer.

A look at one run is no walk: nothing is asked ahead before two were looked into that stand beside
each other, as the server lists them or sorted by name. Whoever asks for one checkpoint's weights
info will mostly ask for those beside it: a few are asked ahead from the first on, since each is
asked for once ever, and more as that turns out right. Thread-safe.
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

#: What is to be asked ahead: the listing of a run, by its id, or a checkpoint's weights info.
PrefetchItem = str | Checkpoint
#: What names it: the run's id, or the checkpoint's key.
Key = str | tuple[str, str, str]

T = TypeVar("T")

#: Who does not go on within this time, seconds, walks no more.
WALK_WINDOW_S = 10.0
#: Whoever asks for weights infos in an order that is not known has so many more asked each time.
MISPREDICTION_WINDOW_STEP = 4
#: Who comes to so many that were not foreseen, and none beside the last, has no order: to look for
#: one takes 10 ms each time where a run has 10,000 checkpoints.
MAX_MISPREDICTIONS = 3
#: So many walks, and looks that may be the first of one, are kept in mind.
MAX_WALKS, MAX_LOOKS = 8, 64


class TraversalOrder(Enum):
    """The orders that folders are gone through in."""

    #: As readdir(3) gives the names: find(1), scripts.
    LISTED = "listed"
    #: Sorted by name: ls(1).
    BY_NAME = "by name"
    #: Either backwards: bash looks for what a pattern with a `*` means in this order, `ls -r`.
    LISTED_BACKWARDS = "listed, backwards"
    BY_NAME_BACKWARDS = "by name, backwards"

    @property
    def is_by_name(self) -> bool:
        """Whether the names are sorted."""
        return self in (TraversalOrder.BY_NAME, TraversalOrder.BY_NAME_BACKWARDS)

    @property
    def is_backwards(self) -> bool:
        """Whether the last one comes first."""
        return self in (TraversalOrder.LISTED_BACKWARDS, TraversalOrder.BY_NAME_BACKWARDS)


class OrderIndex:
    """Names, and where each stands in each order; immutable."""

    def __init__(self, names: Iterable[str]) -> None:
        self._listed = tuple(names)
        by_name = sorted(range(len(self._listed)), key=self._listed.__getitem__)
        self._by_name = [self._listed[place] for place in by_name]
        self._listed_places = array("L", by_name)  # by the place in the other order

    def __len__(self) -> int:
        """Return how many names there are."""
        return len(self._listed)

    def name(self, order: TraversalOrder, place: int) -> str:
        """Return the name at a place of an order, `0 <= place < len`."""
        names = self._by_name if order.is_by_name else self._listed
        return names[-1 - place] if order.is_backwards else names[place]

    def place(self, order: TraversalOrder, name: str) -> int | None:
        """Return where a name stands in an order, None where there is no such name."""
        place = bisect_left(self._by_name, name)
        if place == len(self) or self._by_name[place] != name:
            return None
        if not order.is_by_name:
            place = self._listed_places[place]
        return len(self) - 1 - place if order.is_backwards else place


def in_order(listing: CheckpointListing, order: TraversalOrder) -> list[Checkpoint]:
    """Return a run's checkpoints as somebody comes by them who goes through its folders."""
    groups = [(kind, [(c.name, c) for c in listing.of_kind(kind)]) for kind in listing.kinds]
    if order.is_by_name:
        groups = sorted((name, sorted(group, key=_name)) for name, group in groups)
    row = [checkpoint for _, group in groups for _, checkpoint in group]
    return row[::-1] if order.is_backwards else row


def _name(named: tuple[str, object]) -> str:
    return named[0]


class Traversal:
    """One walk: what it will ask for, in its order, and how much of that may be asked ahead.

    Args:
        order: how it goes through folders.
        run_id: the run where it is.
        runs: the runs that it goes through; none where it goes through the checkpoints of one.
        wants_infos: whether it asks for weights infos too.
        most: so many answers may be ahead of it, a quarter of them to begin with, twice as many
            each time that it comes to one.
    """

    def __init__(
        self, order: TraversalOrder, run_id: str, runs: OrderIndex, *, wants_infos: bool, most: int
    ) -> None:
        self.order = order
        self.run_id = run_id
        self.seen_at = 0.0
        #: What was asked ahead, and the walk has not come to.
        self.outstanding: set[Key] = set()
        self._runs = runs
        place = runs.place(order, run_id)
        self._place = 0 if place is None else place
        self._next = self._place + 1
        self._window = max(most // 4, 1)
        self._most = most
        self._wants_infos = wants_infos
        self._surprises = 0
        #: Runs from here on whose weights infos are yet to come, with the listing once it is known.
        self._pending: dict[str, CheckpointListing | None] = {} if place is None else {run_id: None}
        self._infos: deque[Checkpoint] = deque()

    def is_misprediction(self, key: Key) -> bool:
        """Tell whether it goes through one run, and in another order than it seemed, it seems."""
        is_hopeful = self._surprises < MAX_MISPREDICTIONS
        return not len(self._runs) and key not in self.outstanding and is_hopeful

    def is_at(self, run_id: str) -> bool:
        """Tell whether a run is the one where it is, or the very next."""
        if run_id == self.run_id:
            return True
        place = self._runs.place(self.order, run_id)
        return place is not None and place == self._place + 1

    def may_reach(self, run_id: str) -> bool:
        """Tell whether it may have come to a run: the one where it is, or one not far ahead."""
        place = self._runs.place(self.order, run_id)
        return place is not None and self._place <= place <= self._next + self._most

    def advance_to_run(self, run_id: str) -> None:
        """Take note that it looks into a run, which it leads to."""
        self._widen_window(run_id)
        place = self._runs.place(self.order, run_id)
        if place is None or place <= self._place:  # threads that walk together overtake each other
            return
        self.run_id, self._place = run_id, place
        if place >= self._next:
            self._pending[run_id] = None
            self._next = place + 1
        for passed in [each for each in self._pending if self._is_passed(each)]:
            del self._pending[passed]
        self._infos = deque(each for each in self._infos if not self._is_passed(each.run_id))
        self.outstanding = {key for key in self.outstanding if not self._is_passed(_run_of(key))}

    def advance_to_info(self, checkpoint: Checkpoint, siblings: CheckpointListing | None) -> None:
        """Take note that it asks for a weights info, of a checkpoint of the run where it is."""
        if checkpoint.key in self.outstanding:
            self._widen_window(checkpoint.key)
        elif self._wants_infos:  # in an order of its own: these will all be wanted, one by one
            self._window = min(self._window + MISPREDICTION_WINDOW_STEP, 2 * self._most)
            self._surprises += 1
        if self._infos and self._infos[0].key == checkpoint.key:
            self._infos.popleft()
        if siblings is None:
            return
        if self._wants_infos:
            self.listed(checkpoint.run_id, siblings)
            return
        self._wants_infos = True
        self._pending.pop(checkpoint.run_id, None)
        row = in_order(siblings, self.order)
        at = next((i for i, each in enumerate(row) if each.key == checkpoint.key), len(row))
        self._infos.extend(row[at + 1 :] + row[:at])

    def listed(self, run_id: str, listing: CheckpointListing) -> bool:
        """Take note of a listing that has come; tell whether it may go on with it."""
        if run_id not in self._pending:
            return False
        self._pending[run_id] = listing
        return self._wants_infos

    def next(self) -> PrefetchItem | None:
        """Return what is to be asked ahead now, which counts as asked; None for nothing."""
        while len(self.outstanding) < self._window:
            if self._next < len(self._runs) and self._is_short_of_listings():
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
        """Take note that a step took no call: it is not ahead of anything."""
        self.outstanding.discard(key)

    def _is_short_of_listings(self) -> bool:
        # Where weights infos are asked for too, they are most of it: some listings do.
        return not self._wants_infos or len(self._pending) < max(self._window // 4, 1)

    def _is_passed(self, run_id: str) -> bool:
        place = self._runs.place(self.order, run_id)
        return place is not None and place < self._place

    def _widen_window(self, came_to: Key) -> None:
        if came_to in self.outstanding:
            self.outstanding.discard(came_to)
            self._window = max(min(self._window * 2, self._most), self._window)


class TraversalPrefetcher:
    """The walks through one account.

    Args:
        most: how many answers may be ahead of one.
        clock: whose `monotonic` tells who walks no more.
    """

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        #: Whose walk asked ahead for what: looked into without the lock, changed under it.
        self._ahead: dict[Key, Traversal] = {}
        # Guarded by _lock.
        self._walks: list[Traversal] = []  # newest first
        self._recent_run_accesses: OrderedDict[str, float] = OrderedDict()
        self._recent_info_accesses: OrderedDict[str, tuple[Key, float]] = OrderedDict()
        self._runs: RunListing | None = None
        self._places = OrderIndex(())

    def is_ahead(self, key: Key) -> bool:
        """Tell whether a run's listing, or a checkpoint's weights info, was asked for ahead."""
        return key in self._ahead

    def on_run_access(self, run_id: str, runs: RunListing | None) -> Traversal | None:
        """Take note that somebody looks into a run; return the walk that this is part of, if any.

        Args:
            run_id: the run.
            runs: all of them, where they are known.
        """
        with self._lock:
            now = self._tick()
            walk = self._at(run_id, runs)
            _remember(self._recent_run_accesses, run_id, now)
            if walk is not None:
                walk.advance_to_run(run_id)
                walk.seen_at = now
            return walk

    def on_info_access(
        self, checkpoint: Checkpoint, siblings: CheckpointListing | None, runs: RunListing | None
    ) -> Traversal | None:
        """Take note that somebody asks for a weights info; return the walk, as `at_run`.

        Args:
            checkpoint: whose.
            siblings: all those of its run, where they are known.
            runs: as in `at_run`.
        """
        key, run_id = checkpoint.key, checkpoint.run_id
        with self._lock:
            now = self._tick()
            walk = self._at(key, runs)
            last, _ = self._recent_info_accesses.get(run_id, (key, now))
            if siblings is not None and (walk is None or walk.is_misprediction(key)):
                walk = self._among(siblings, last, key, walk)
            _remember(self._recent_info_accesses, run_id, (key, now))
            if walk is not None:
                walk.advance_to_run(run_id)
                walk.advance_to_info(checkpoint, siblings)
                walk.seen_at = now
            return walk

    def listed(self, run_id: str, listing: CheckpointListing) -> list[Traversal]:
        """Take note of a run's listing; return the walks that may go on with it."""
        with self._lock:
            return [walk for walk in self._walks if walk.listed(run_id, listing)]

    def next(self, walk: Traversal) -> PrefetchItem | None:
        """Return what is to be asked ahead of a walk now; None for nothing, or where it is over."""
        with self._lock:
            self._tick()
            step = walk.next() if walk in self._walks else None
            if step is not None:
                self._ahead[_key(step)] = walk
            return step

    def drop(self, walk: Traversal, step: PrefetchItem) -> None:
        """Take note that a step that `next` returned took no call."""
        with self._lock:
            walk.drop(_key(step))
            self._ahead.pop(_key(step), None)

    @contextmanager
    def stop_on_outage(self, key: Key, priority: Priority) -> Iterator[None]:
        """End a walk where what is asked ahead of it, in the body, cannot be had: it is an outage.

        Whoever walks asks for itself from then on, and is told what became of it.
        """
        try:
            yield
        except errors.UNAVAILABLE_ERRORS:
            with self._lock:
                walk = None if priority.is_demand else self._ahead.get(key)
                if walk is not None:
                    self._end(walk)
            raise

    def on_runs_reloaded(self) -> None:
        """Let go of the runs: others were listed."""
        with self._lock:
            self._runs, self._places = None, OrderIndex(())

    def clear(self) -> None:
        """Forget every walk."""
        with self._lock:
            for walk in list(self._walks):
                self._end(walk)
            self._recent_run_accesses.clear()
            self._recent_info_accesses.clear()
            self._runs, self._places = None, OrderIndex(())

    # All below with the lock held.

    def _tick(self) -> float:
        """Forget who walks no more; return the time."""
        now = self._clock.monotonic()
        for walk in [w for w in self._walks if now - w.seen_at > WALK_WINDOW_S]:
            self._end(walk)
        while (
            self._recent_run_accesses
            and now - next(iter(self._recent_run_accesses.values())) > WALK_WINDOW_S
        ):
            self._recent_run_accesses.popitem(last=False)
        while (
            self._recent_info_accesses
            and now - next(iter(self._recent_info_accesses.values()))[1] > WALK_WINDOW_S
        ):
            self._recent_info_accesses.popitem(last=False)
        return now

    def _at(self, key: Key, runs: RunListing | None) -> Traversal | None:
        """Return the walk that has come to a run, or to a checkpoint of one.

        Two orders may have the same two runs side by side: the walk that a run is the next of goes
        before all that may have come to it, and a new one in another order supersedes.
        """
        run_id = _run_of(key)
        owner = self._ahead.pop(key, None)
        walk = next((w for w in self._walks if w.is_at(run_id)), None)
        walk = walk or self._begun(key, runs) or owner
        walk = walk or next((w for w in self._walks if w.may_reach(run_id)), None)
        if owner is not None and owner is not walk:
            owner.drop(key)
        return walk

    def _among(
        self, siblings: CheckpointListing, last: Key, key: Key, walk: Traversal | None
    ) -> Traversal | None:
        """Return who asks for infos of one run: in another order than it seemed, or from now on."""
        order = next((o for o in TraversalOrder if _are_next(siblings, o, last, key)), None)
        if walk is not None:
            if order is None:
                return walk
            self._end(walk)
        order = order or TraversalOrder.BY_NAME
        begun = Traversal(order, _run_of(key), OrderIndex(()), wants_infos=False, most=self._most)
        self._add(begun)
        return begun

    def _begun(self, key: Key, runs: RunListing | None) -> Traversal | None:
        """Begin a walk where the run before this one is among the last that were seen."""
        run_id = _run_of(key)
        seen = self._recent_run_accesses if isinstance(key, str) else self._recent_info_accesses
        recent = [each for each in islice(reversed(seen), MAX_WALKS) if each != run_id]
        if runs is None or not recent:  # to know the places of 100,000 runs takes a moment
            return None
        places = self._places_of(runs)
        before = {
            places.name(order, place - 1): order
            for order in reversed(TraversalOrder)
            if (place := places.place(order, run_id))
        }
        last = next((each for each in recent if each in before), None)
        if last is None:
            return None
        for walk in [w for w in self._walks if w.run_id == last]:
            self._end(walk)
        infos = last in self._recent_info_accesses
        walk = Traversal(before[last], run_id, places, wants_infos=infos, most=self._most)
        self._add(walk)
        return walk

    def _add(self, walk: Traversal) -> None:
        walk.seen_at = self._clock.monotonic()
        self._walks.insert(0, walk)
        for oldest in self._walks[MAX_WALKS:]:
            self._end(oldest)

    def _end(self, walk: Traversal) -> None:
        self._walks.remove(walk)
        for key in [key for key, other in self._ahead.items() if other is walk]:
            del self._ahead[key]

    def _places_of(self, runs: RunListing) -> OrderIndex:
        if runs is not self._runs:
            self._runs, self._places = runs, OrderIndex(runs.by_id)
        return self._places


def _run_of(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _key(step: PrefetchItem) -> Key:
    return step if isinstance(step, str) else step.key


def _are_next(listing: CheckpointListing, order: TraversalOrder, first: Key, second: Key) -> bool:
    row = [checkpoint.key for checkpoint in in_order(listing, order)]
    return any(pair == (first, second) for pair in pairwise(row))


def _remember(looks: "OrderedDict[str, T]", run_id: str, look: T) -> None:
    looks[run_id] = look
    looks.move_to_end(run_id)
    if len(looks) > MAX_LOOKS:
        looks.popitem(last=False)
