"""The account that a demo server serves: a catalogue, and what became of it.

Records are made when first asked for and kept from then on, so whoever changes one changes what is
served. Every method is thread-safe; a caller that reads and then changes holds `lock` (reentrant).
Whatever is asked here answers in microseconds: no lock of this module spans a wait.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from tinkerfs.demo.catalogue import BASE_MODELS, Catalogue, Checkpoint, Run, Session

__all__ = ["Account"]

_RUNS_PER_SESSION = 2


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
        self._runs: dict[str, Run] = {}
        self._foreign = {run.id: run for run in map(catalogue.foreign_run, range(foreign_runs))}
        self._sessions: dict[str, Session] = {}
        self._session_numbers = {
            catalogue.session_id(number): number
            for number in range(-(-catalogue.runs // _RUNS_PER_SESSION))
        }
        self._added_names = itertools.count(1)
        self._version = 0
        self._is_in_order = True
        self._sorted: tuple[tuple[int, int], list[tuple[Run, Checkpoint]]] | None = None

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
            self._runs[run_id] = run
            self._indices[run_id] = -1
            self._order.insert(0, run_id)
            self._changed()
            return run

    def remove_run(self, run_id: str) -> None:
        """Remove a run with all its checkpoints (the API has no way to; a lapse of time has)."""
        with self.lock:
            self._order.remove(run_id)
            del self._indices[run_id]
            self._runs.pop(run_id, None)
            self._changed()

    def touch(self, run_id: str) -> None:
        """Make a run the one that was used last, as training does: listings shift by one."""
        with self.lock:
            self._own(run_id).last_request_time_s = self._now()
            self._order.remove(run_id)
            self._order.insert(0, run_id)
            self._changed()

    # Checkpoints

    @property
    def checkpoint_count(self) -> int:
        """How many checkpoints the account's own runs have."""
        with self.lock:
            return sum(self._count(run_id) for run_id in self._order)

    def checkpoints(
        self, offset: int = 0, limit: int | None = None
    ) -> list[tuple[Run, Checkpoint]]:
        """Return one page of the checkpoints of all own runs, newest first."""
        with self.lock:
            stop = self.checkpoint_count if limit is None else offset + limit
            if not self._is_in_order:
                return self._sorted_checkpoints()[offset:stop]
            page: list[tuple[Run, Checkpoint]] = []
            begin = 0
            for run_id in self._order:
                count = self._count(run_id)
                if begin + count > offset:
                    run = self._own(run_id)
                    newest_first = run.checkpoints[::-1]
                    part = newest_first[max(0, offset - begin) : max(0, stop - begin)]
                    page += [(run, checkpoint) for checkpoint in part]
                begin += count
                if begin >= stop:
                    break
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
            self._changed()
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

    def _changed(self) -> None:
        self._version += 1
        self._is_in_order = False

    def _count(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        return self.catalogue.checkpoints if run is None else len(run.checkpoints)

    def _own(self, run_id: str) -> Run:
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = self.catalogue.run(self._indices[run_id])
            for checkpoint in run.checkpoints:
                checkpoint.building_polls = self._building_polls
        return run

    def _runs_or_foreign(self, run_id: str) -> Run:
        run = self.run(run_id)
        if run is None:
            raise KeyError(run_id)
        return run

    def _sorted_checkpoints(self) -> list[tuple[Run, Checkpoint]]:
        state = (self._version, self.checkpoint_count)
        if self._sorted is None or self._sorted[0] != state:
            pairs = [(run, checkpoint) for run in self.runs() for checkpoint in run.checkpoints]
            pairs.sort(key=lambda pair: pair[1].time_s or 0.0, reverse=True)
            self._sorted = (state, pairs)
        return self._sorted[1]
