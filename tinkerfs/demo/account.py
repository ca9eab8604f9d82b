"""The mutable account of a demo server: sample data and changes to it.

Records are generated on access. Changed records are stored permanently, so that changing a record
changes the server's responses. Unchanged records are cached only while recently used. Every method
is thread-safe; callers that read and then change hold the reentrant `lock`. Every method takes only
milliseconds, even with a million checkpoints, and never waits while it holds the lock.
"""

import bisect
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from tinkerfs.demo.sample_data import BASE_MODELS, Checkpoint, Run, SampleData, Session

_RUNS_PER_SESSION = 2

_MAX_CACHED_RUNS = 4096
"""Maximum number of unchanged runs in the cache."""


class Account:
    """Runs, checkpoints, sessions and samplers, listed newest first.

    Args:
        sample: The initial records.
        clock: Returns Unix time, for the times of added and touched records.
        foreign_runs: Number of runs of other users, which are found by id but not listed.
        building_polls: Number of requests for each archive during which it is "being built".
    """

    def __init__(
        self,
        sample: SampleData,
        clock: Callable[[], float] = time.time,
        *,
        foreign_runs: int = 2,
        building_polls: int = 0,
    ) -> None:
        self.lock = threading.RLock()
        self.sample = sample
        self._clock = clock
        self._building_polls = building_polls
        # All below guarded by lock.
        self._order = sample.run_ids()
        self._indices = {run_id: index for index, run_id in enumerate(self._order)}
        self._changed_runs: dict[str, Run] = {}
        self._cached_runs: OrderedDict[str, Run] = OrderedDict()  # most recently used last
        self._removed: list[int] = []  # indices of runs of the sample
        # Own runs with added checkpoints, and the positions of those among all checkpoints.
        self._extended: dict[str, None] = {}
        self._version = 0
        self._positions: tuple[tuple[int, int], list[tuple[int, Run, Checkpoint]]] | None = None
        self._foreign = {run.id: run for run in map(sample.foreign_run, range(foreign_runs))}
        self._sessions: dict[str, Session] = {}
        self._session_numbers = {
            sample.session_id(number): number
            for number in range(-(-sample.runs // _RUNS_PER_SESSION))
        }
        self._added_names = itertools.count(1)
        self._expiring: dict[tuple[str, str], Checkpoint] = {}  # those with an expiry that was set

    # Runs

    @property
    def run_ids(self) -> list[str]:
        """The ids of the account's own runs, newest first."""
        with self.lock:
            return list(self._order)

    @property
    def foreign_run_ids(self) -> list[str]:
        """The ids of other users' runs, each of which has a public checkpoint."""
        return list(self._foreign)

    @property
    def run_count(self) -> int:
        """The number of the account's own runs."""
        return len(self._order)

    def runs(self, offset: int = 0, limit: int | None = None) -> list[Run]:
        """Return one page of the account's own runs."""
        with self.lock:
            stop = None if limit is None else offset + limit
            return [self._own(run_id) for run_id in self._order[offset:stop]]

    def run(self, run_id: str) -> Run | None:
        """Return a run of the account or of another user, or None."""
        with self.lock:
            if run_id in self._indices:
                return self._own(run_id)
            return self._foreign.get(run_id)

    def owns(self, run_id: str) -> bool:
        """Return whether a run exists and belongs to the account."""
        with self.lock:
            return run_id in self._indices

    def add_run(self, run_id: str | None = None, **fields: Any) -> Run:
        """Add a run of the account, as the newest.

        Args:
            run_id: Its id; generated if None.
            **fields: Attributes of `Run` that replace the defaults.
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
            self._mark_extended(run_id)
            return run

    def remove_run(self, run_id: str) -> None:
        """Remove a run with all its checkpoints, which no API request can do."""
        with self.lock:
            self._order.remove(run_id)
            index = self._indices.pop(run_id)
            if index >= 0:
                self._removed.append(index)
            for runs in (self._changed_runs, self._cached_runs):
                runs.pop(run_id, None)
            self._extended.pop(run_id, None)
            self._version += 1

    def touch(self, run_id: str) -> None:
        """Make a run the most recently used one, as training does; listings shift."""
        with self.lock:
            self._own(run_id).last_request_time_s = self._now()
            self._order.remove(run_id)
            self._order.insert(0, run_id)

    # Checkpoints

    @property
    def checkpoint_count(self) -> int:
        """The number of checkpoints of the account's own runs."""
        with self.lock:
            in_extended = sum(len(self._own(run_id).checkpoints) for run_id in self._extended)
            return self._before(self.sample.runs, self._lengths()) + in_extended

    def checkpoints(
        self, offset: int = 0, limit: int | None = None
    ) -> list[tuple[Run, Checkpoint]]:
        """Return one page of the checkpoints of all own runs, newest first."""
        with self.lock:
            count = self.checkpoint_count
            extra = self._extra_checkpoints(count)
            index = bisect.bisect_left(extra, offset, key=lambda each: each[0])
            in_order = self._in_order(offset - index)
            page: list[tuple[Run, Checkpoint]] = []
            for position in range(offset, count if limit is None else min(offset + limit, count)):
                if index < len(extra) and extra[index][0] == position:
                    page.append(extra[index][1:])
                    index += 1
                else:
                    page.append(next(in_order))
            return page

    def checkpoint(self, run_id: str, checkpoint_id: str) -> Checkpoint | None:
        """Return the checkpoint with an id `<kind>/<name>`, or None."""
        with self.lock:
            run = self.run(run_id)
            found = run.checkpoints if run else []
            return next((c for c in found if c.id == checkpoint_id), None)

    def find(self, run_id: str, checkpoint_id: str) -> tuple[Run, Checkpoint]:
        """Return a checkpoint with its run.

        Raises:
            KeyError: The checkpoint does not exist.
        """
        with self.lock:
            run, checkpoint = self.run(run_id), self.checkpoint(run_id, checkpoint_id)
            if run is None or checkpoint is None:
                raise KeyError(run_id, checkpoint_id)
            return run, checkpoint

    def add_checkpoint(self, run_id: str, checkpoint_id: str, **fields: Any) -> Checkpoint:
        """Save a checkpoint as the newest of its run; replace one with the same id.

        Args:
            run_id: An existing run.
            checkpoint_id: `<kind>/<name>`.
            **fields: Attributes of `Checkpoint` that replace the defaults.

        Raises:
            KeyError: The run does not exist.
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
                self._mark_extended(run_id)
            return checkpoint

    def delete_checkpoint(self, run_id: str, checkpoint_id: str) -> bool:
        """Delete a checkpoint; return whether it existed."""
        with self.lock:
            run, checkpoint = self.run(run_id), self.checkpoint(run_id, checkpoint_id)
            if run is None or checkpoint is None:
                return False
            run.checkpoints.remove(checkpoint)
            self._version += 1
            return True

    def set_expiry(self, run_id: str, checkpoint: Checkpoint, expires_at_s: float | None) -> None:
        """Set the expiry of a checkpoint (Unix time), None for never."""
        with self.lock:
            checkpoint.expires_at_s = expires_at_s
            self._expiring[run_id, checkpoint.id] = checkpoint

    def delete_expired(self) -> None:
        """Delete the checkpoints with an expiry that was set and has passed."""
        with self.lock:
            for (run_id, checkpoint_id), checkpoint in list(self._expiring.items()):
                if self.checkpoint(run_id, checkpoint_id) is not checkpoint:
                    del self._expiring[run_id, checkpoint_id]
                elif (checkpoint.expires_at_s or math.inf) <= self._clock():
                    self.delete_checkpoint(run_id, checkpoint_id)

    # Sessions and samplers

    def session_ids(self, offset: int = 0, limit: int | None = None) -> list[str]:
        """Return one page of the session ids, newest first."""
        with self.lock:
            stop = None if limit is None else offset + limit
            return list(itertools.islice(self._session_numbers, offset, stop))

    def session(self, session_id: str) -> Session | None:
        """Return a session, or None."""
        with self.lock:
            number = self._session_numbers.get(session_id)
            if number is None:
                return None
            if session_id not in self._sessions:
                first = number * _RUNS_PER_SESSION
                last = min(first + _RUNS_PER_SESSION, self.sample.runs)
                runs = [self.sample.run(index) for index in range(first, last)]
                session = self.sample.session(number, runs)
                session.trace_polls = self._building_polls
                self._sessions[session_id] = session
            return self._sessions[session_id]

    def add_session(self, session: Session) -> None:
        """Add a session, as the newest."""
        with self.lock:
            self._sessions[session.id] = session
            self._session_numbers = {session.id: -1} | self._session_numbers

    def sampler(self, sampler_id: str) -> tuple[str, str | None] | None:
        """Return a sampler's base model and optional tinker path, or None."""
        session = self.session(sampler_id.partition(":sample:")[0])
        return session.samplers.get(sampler_id) if session else None

    def _now(self) -> float:
        return round(self._clock(), 6)

    def _mark_extended(self, run_id: str) -> None:
        self._extended[run_id] = None
        self._version += 1

    def _own(self, run_id: str) -> Run:
        run = self._changed_runs.get(run_id) or self._cached_runs.get(run_id)
        if run is None:
            run = self._cached_runs[run_id] = self._generate(run_id)
            if len(self._cached_runs) > _MAX_CACHED_RUNS:
                oldest_id, oldest = self._cached_runs.popitem(last=False)
                if oldest != self._generate(oldest_id):
                    self._changed_runs[oldest_id] = oldest
        elif run_id in self._cached_runs:
            self._cached_runs.move_to_end(run_id)
        return run

    def _generate(self, run_id: str) -> Run:
        run = self.sample.run(self._indices[run_id])
        for checkpoint in run.checkpoints:
            checkpoint.building_polls = self._building_polls
        return run

    def _runs_or_foreign(self, run_id: str) -> Run:
        run = self.run(run_id)
        if run is None:
            raise KeyError(run_id)
        return run

    # All checkpoints, newest first. Those of the sample follow the order of its runs, so a page is
    # found by counting. Those of extended runs are inserted by their times.

    def _lengths(self) -> dict[int, int]:
        """Return the checkpoint counts, by index, of runs that differ from the sample."""
        lengths = dict.fromkeys(self._removed, 0)
        for run_id, run in (*self._changed_runs.items(), *self._cached_runs.items()):
            length = 0 if run_id in self._extended else len(run.checkpoints)
            if length != self.sample.checkpoints:
                lengths[self._indices[run_id]] = length
        for run_id in self._extended:  # even if its record is no longer cached
            lengths[self._indices[run_id]] = 0
        lengths.pop(-1, None)
        return lengths

    def _before(self, index: int, lengths: dict[int, int]) -> int:
        """Return the number of checkpoints of the sample's runs before an index."""
        default = self.sample.checkpoints
        return index * default + sum(n - default for i, n in lengths.items() if i < index)

    def _in_order(self, offset: int) -> Iterator[tuple[Run, Checkpoint]]:
        lengths, indices = self._lengths(), range(self.sample.runs)
        first = bisect.bisect_right(indices, offset, key=lambda i: self._before(i, lengths)) - 1
        skipped = offset - self._before(first, lengths)
        for index in indices[max(first, 0) :]:
            if lengths.get(index) != 0:
                run = self._own(self.sample.run_id(index))
                yield from ((run, checkpoint) for checkpoint in run.checkpoints[::-1][skipped:])
            skipped = 0

    def _extra_checkpoints(self, count: int) -> list[tuple[int, Run, Checkpoint]]:
        """Return the checkpoints of extended runs with their positions, newest first."""
        state = (self._version, count)
        if self._positions is None or self._positions[0] != state:
            lengths = self._lengths()
            runs = map(self._own, reversed(self._extended))
            found = [(run, checkpoint) for run in runs for checkpoint in run.checkpoints]
            found.sort(key=lambda pair: pair[1].time_s or 0.0, reverse=True)
            newer = (self._newer_in_order(c.time_s or 0.0, lengths) for _, c in found)
            extra = [(k + n, *pair) for n, (k, pair) in enumerate(zip(newer, found, strict=True))]
            self._positions = (state, extra)
        return self._positions[1]

    def _newer_in_order(self, time_s: float, lengths: dict[int, int]) -> int:
        index = self.sample.index_at(time_s)
        newer = self._before(index, lengths)
        if index < self.sample.runs and lengths.get(index) != 0:
            run = self._own(self.sample.run_id(index))
            newer += sum((checkpoint.time_s or 0.0) > time_s for checkpoint in run.checkpoints)
        return newer
