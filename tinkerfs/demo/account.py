"""The account that a demo server serves: a catalogue, and what became of it.

Records are made when they are asked for, and one that was changed is kept from then on, so whoever
changes one changes what is served; of those that are as they were made, only the last ones looked
at are kept. Every method is thread-safe; a caller that reads and then changes holds `lock`
(reentrant). Whatever is asked here answers in a few milliseconds, of a million checkpoints too: no
lock of this module spans a wait.
"""

import bisect
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from tinkerfs.demo.sample_data import BASE_MODELS, Catalogue, Checkpoint, Run, Session

_RUNS_PER_SESSION = 2

_KEPT_RUNS = 4096
"""So many runs that nobody changed are kept as made."""


class Account:
    """Runs, checkpoints, sessions and samplers, listed newest first.

    Args:
        catalogue: What is there at the beginning.
        clock: Returns Unix time; what is added or touched is dated by it.
        foreign_runs: Number of runs of somebody else, which resolve by id and are not listed.
        building_polls: How often each archive is "being built" before it is there.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        clock: Callable[[], float] = time.time,
        *,
        foreign_runs: int = 2,
        building_polls: int = 0,
    ) -> None:
        self.lock = threading.RLock()
        self.catalogue = catalogue
        self._clock = clock
        self._building_polls = building_polls
        # All below guarded by lock.
        self._order = catalogue.run_ids()
        self._indices = {run_id: index for index, run_id in enumerate(self._order)}
        self._changed_runs: dict[str, Run] = {}
        self._made_runs: OrderedDict[str, Run] = OrderedDict()  # the last one looked at last
        self._removed: list[int] = []  # indices of the catalogue's runs
        # Own runs with checkpoints that the catalogue has not, and where among all they stand.
        self._strayed: dict[str, None] = {}
        self._version = 0
        self._placed: tuple[tuple[int, int], list[tuple[int, Run, Checkpoint]]] | None = None
        self._foreign = {run.id: run for run in map(catalogue.foreign_run, range(foreign_runs))}
        self._sessions: dict[str, Session] = {}
        self._session_numbers = {
            catalogue.session_id(number): number
            for number in range(-(-catalogue.runs // _RUNS_PER_SESSION))
        }
        self._added_names = itertools.count(1)

    # Runs

    @property
    def run_ids(self) -> list[str]:
        """The ids of the account's own runs, newest first."""
        with self.lock:
            return list(self._order)

    @property
    def foreign_run_ids(self) -> list[str]:
        """The ids of somebody else's runs, each with a public checkpoint or more."""
        return list(self._foreign)

    @property
    def run_count(self) -> int:
        """How many runs the account owns."""
        return len(self._order)

    def runs(self, offset: int = 0, limit: int | None = None) -> list[Run]:
        """Return one page of the account's own runs."""
        with self.lock:
            stop = None if limit is None else offset + limit
            return [self._own(run_id) for run_id in self._order[offset:stop]]

    def run(self, run_id: str) -> Run | None:
        """Return an own run, or one of somebody else."""
        with self.lock:
            if run_id in self._indices:
                return self._own(run_id)
            return self._foreign.get(run_id)

    def owns(self, run_id: str) -> bool:
        """Tell whether a run exists and is the account's own."""
        with self.lock:
            return run_id in self._indices

    def add_run(self, run_id: str | None = None, **fields: Any) -> Run:
        """Add a run of the account, as the newest.

        Args:
            run_id: Its id; made up when None.
            **fields: Attributes of `Run`, for others than the defaults.
        """
        with self.lock:
            run_id = run_id or f"added-{next(self._added_names)}:train:0"
            values: dict[str, Any] = {
                "base_model": BASE_MODELS[0],
                "owner": "demo-user",
                "lora_rank": 32,
                "last_request_time_s": self._now(),
                "checkpoints": [],
            }
            run = Run(id=run_id, **(values | fields))
            self._changed_runs[run_id] = run
            self._indices[run_id] = -1
            self._order.insert(0, run_id)
            self._stray(run_id)
            return run

    def remove_run(self, run_id: str) -> None:
        """Remove a run with all its checkpoints (the API has no way to; a lapse of time has)."""
        with self.lock:
            self._order.remove(run_id)
            index = self._indices.pop(run_id)
            if index >= 0:
                self._removed.append(index)
            for kept in (self._changed_runs, self._made_runs):
                kept.pop(run_id, None)
            self._strayed.pop(run_id, None)
            self._version += 1

    def touch(self, run_id: str) -> None:
        """Make a run the one that was used last, as training does: listings shift by one."""
        with self.lock:
            self._own(run_id).last_request_time_s = self._now()
            self._order.remove(run_id)
            self._order.insert(0, run_id)

    # Checkpoints

    @property
    def checkpoint_count(self) -> int:
        """How many checkpoints the account's own runs have."""
        with self.lock:
            strayed = sum(len(self._own(run_id).checkpoints) for run_id in self._strayed)
            return self._before(self.catalogue.runs, self._lengths()) + strayed

    def checkpoints(
        self, offset: int = 0, limit: int | None = None
    ) -> list[tuple[Run, Checkpoint]]:
        """Return one page of the checkpoints of all own runs, newest first."""
        with self.lock:
            count = self.checkpoint_count
            strays = self._strays(count)
            at = bisect.bisect_left(strays, offset, key=lambda stray: stray[0])
            in_order = self._in_order(offset - at)
            page: list[tuple[Run, Checkpoint]] = []
            for place in range(offset, count if limit is None else min(offset + limit, count)):
                if at < len(strays) and strays[at][0] == place:
                    page.append(strays[at][1:])
                    at += 1
                else:
                    page.append(next(in_order))
            return page

    def checkpoint(self, run_id: str, checkpoint_id: str) -> Checkpoint | None:
        """Return the checkpoint of an id `<kind>/<name>`."""
        with self.lock:
            run = self.run(run_id)
            found = run.checkpoints if run else []
            return next((c for c in found if c.id == checkpoint_id), None)

    def find(self, run_id: str, checkpoint_id: str) -> tuple[Run, Checkpoint]:
        """Return a checkpoint with its run.

        Raises:
            KeyError: There is no such checkpoint.
        """
        with self.lock:
            run, checkpoint = self.run(run_id), self.checkpoint(run_id, checkpoint_id)
            if run is None or checkpoint is None:
                raise KeyError(run_id, checkpoint_id)
            return run, checkpoint

    def add_checkpoint(self, run_id: str, checkpoint_id: str, **fields: Any) -> Checkpoint:
        """Save a checkpoint now, as the newest of its run; it takes the place of one of that id.

        Args:
            run_id: A run that exists.
            checkpoint_id: `<kind>/<name>`.
            **fields: Attributes of `Checkpoint`, for others than the defaults.

        Raises:
            KeyError: There is no such run.
        """
        with self.lock:
            run = self._runs_or_foreign(run_id)
            kind, _, name = checkpoint_id.partition("/")
            values: dict[str, Any] = {
                "time_s": self._now(),
                "size_bytes": 64 * 1024,
                "building_polls": self._building_polls,
            }
            checkpoint = Checkpoint(kind=kind, name=name, **(values | fields))
            former = self.checkpoint(run_id, checkpoint_id)
            if former is not None:
                run.checkpoints.remove(former)
                checkpoint.generation = former.generation + 1
            run.checkpoints.append(checkpoint)
            if self.owns(run_id):
                self._stray(run_id)
            return checkpoint

    def delete_checkpoint(self, run_id: str, checkpoint_id: str) -> bool:
        """Delete a checkpoint; return whether it was there."""
        with self.lock:
            run, checkpoint = self.run(run_id), self.checkpoint(run_id, checkpoint_id)
            if run is None or checkpoint is None:
                return False
            run.checkpoints.remove(checkpoint)
            self._version += 1
            return True

    # Sessions and samplers

    def session_ids(self, offset: int = 0, limit: int | None = None) -> list[str]:
        """Return one page of the session ids, newest first."""
        with self.lock:
            stop = None if limit is None else offset + limit
            return list(itertools.islice(self._session_numbers, offset, stop))

    def session(self, session_id: str) -> Session | None:
        """Return a session."""
        with self.lock:
            number = self._session_numbers.get(session_id)
            if number is None:
                return None
            if session_id not in self._sessions:
                first = number * _RUNS_PER_SESSION
                last = min(first + _RUNS_PER_SESSION, self.catalogue.runs)
                made = [self.catalogue.run(index) for index in range(first, last)]
                self._sessions[session_id] = self.catalogue.session(number, made)
            return self._sessions[session_id]

    def add_session(self, session: Session) -> None:
        """Add a session, as the newest."""
        with self.lock:
            self._sessions[session.id] = session
            self._session_numbers = {session.id: -1} | self._session_numbers

    def sampler(self, sampler_id: str) -> tuple[str, str | None] | None:
        """Return the base model of a sampler, and the tinker path that it serves, or None."""
        session = self.session(sampler_id.partition(":sample:")[0])
        return session.samplers.get(sampler_id) if session else None

    def _now(self) -> float:
        return round(self._clock(), 6)

    def _stray(self, run_id: str) -> None:
        self._strayed[run_id] = None
        self._version += 1

    def _own(self, run_id: str) -> Run:
        run = self._changed_runs.get(run_id) or self._made_runs.get(run_id)
        if run is None:
            run = self._made_runs[run_id] = self._made(run_id)
            if len(self._made_runs) > _KEPT_RUNS:
                oldest_id, oldest = self._made_runs.popitem(last=False)
                if oldest != self._made(oldest_id):
                    self._changed_runs[oldest_id] = oldest
        elif run_id in self._made_runs:
            self._made_runs.move_to_end(run_id)
        return run

    def _made(self, run_id: str) -> Run:
        run = self.catalogue.run(self._indices[run_id])
        for checkpoint in run.checkpoints:
            checkpoint.building_polls = self._building_polls
        return run

    def _runs_or_foreign(self, run_id: str) -> Run:
        run = self.run(run_id)
        if run is None:
            raise KeyError(run_id)
        return run

    # The checkpoints newest first. The catalogue's lie in the order of its runs, so a page of them
    # is found by counting; those of runs that strayed from it stand between them by their times.

    def _lengths(self) -> dict[int, int]:
        """Return how many each of the catalogue's runs has in its order, where not as made."""
        lengths = dict.fromkeys(self._removed, 0)
        for run_id, run in (*self._changed_runs.items(), *self._made_runs.items()):
            length = 0 if run_id in self._strayed else len(run.checkpoints)
            if length != self.catalogue.checkpoints:
                lengths[self._indices[run_id]] = length
        for run_id in self._strayed:  # also one that is back to what it was, and not kept
            lengths[self._indices[run_id]] = 0
        lengths.pop(-1, None)
        return lengths

    def _before(self, index: int, lengths: dict[int, int]) -> int:
        """Return how many checkpoints the catalogue's runs before one have in its order."""
        usual = self.catalogue.checkpoints
        return index * usual + sum(n - usual for i, n in lengths.items() if i < index)

    def _in_order(self, offset: int) -> Iterator[tuple[Run, Checkpoint]]:
        lengths, indices = self._lengths(), range(self.catalogue.runs)
        first = bisect.bisect_right(indices, offset, key=lambda i: self._before(i, lengths)) - 1
        skipped = offset - self._before(first, lengths)
        for index in indices[max(first, 0) :]:
            if lengths.get(index) != 0:
                run = self._own(self.catalogue.run_id(index))
                yield from ((run, checkpoint) for checkpoint in run.checkpoints[::-1][skipped:])
            skipped = 0

    def _strays(self, count: int) -> list[tuple[int, Run, Checkpoint]]:
        """Return the checkpoints of strayed runs, each with its place among all, newest first."""
        state = (self._version, count)
        if self._placed is None or self._placed[0] != state:
            lengths = self._lengths()
            runs = map(self._own, reversed(self._strayed))
            found = [(run, checkpoint) for run in runs for checkpoint in run.checkpoints]
            found.sort(key=lambda pair: pair[1].time_s or 0.0, reverse=True)
            places = (self._newer_in_order(c.time_s or 0.0, lengths) for _, c in found)
            placed = [(p + n, *pair) for n, (p, pair) in enumerate(zip(places, found, strict=True))]
            self._placed = (state, placed)
        return self._placed[1]

    def _newer_in_order(self, time_s: float, lengths: dict[int, int]) -> int:
        index = self.catalogue.index_at(time_s)
        newer = self._before(index, lengths)
        if index < self.catalogue.runs and lengths.get(index) != 0:
            run = self._own(self.catalogue.run_id(index))
            newer += sum((checkpoint.time_s or 0.0) > time_s for checkpoint in run.checkpoints)
        return newer
