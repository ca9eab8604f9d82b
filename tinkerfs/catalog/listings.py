"""Checkpoints and listings of them, as the tree sees them (pure).

Servers list bare ids, ids with a kind, or both; here every checkpoint has a run, a kind and a name.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from sys import intern
from typing import Self

import msgspec
from msgspec.structs import replace

from tinkerfs.api import models, raw_json
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.tinker_path import KIND_OF_TYPE, KINDS, TinkerPath


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """A checkpoint of a run, as a listing told of it.

    Attributes:
        run_id: its training run.
        kind: what the second part of its tinker path is on the official service.
        name: the rest of its id.
        record: the listing's record.
        shares_id: another checkpoint of the run is listed under the same bare id.
    """

    run_id: str
    kind: str
    name: str
    record: models.Checkpoint
    shares_id: bool = False

    @classmethod
    def from_record(cls, run_id: str, record: models.Checkpoint) -> Self:
        """Make a checkpoint of a listing's record."""
        return cls(run_id, *kind_and_name(record), record)

    @classmethod
    def unlisted(cls, path: TinkerPath) -> Self:
        """Make a checkpoint that no listing tells of: only its path is known."""
        record = models.Checkpoint.of(
            f"{path.kind}/{path.name}",
            tinker_path=str(path),
            raw=raw_json.with_fields(
                b"{}", checkpoint_id=f"{path.kind}/{path.name}", tinker_path=str(path)
            ),
        )
        return cls(path.run_id, path.kind, path.name, record)

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it in this account, whatever form the server lists."""
        return (self.run_id, self.kind, self.name)

    @property
    def tinker_path(self) -> str:
        """Its address, as the server wrote it where it did."""
        return self.record.tinker_path or str(TinkerPath(self.run_id, self.kind, self.name))

    @property
    def is_dated(self) -> bool:
        """Whether the record has a time, which another version of the checkpoint has not."""
        return self.record.time_ns is not None

    @property
    def version(self) -> str:
        """What changes when a checkpoint is saved again under its name.

        Where the record has no time it may stay the same: see `is_dated`.
        """
        if self.record.time_ns is not None:
            return str(self.record.time_ns)
        size_bytes = self.record.size_bytes
        return "undated" if size_bytes is None else f"undated-{size_bytes}"

    @property
    def fingerprint(self) -> tuple[str, int | None]:
        """All that the record shows of the version."""
        return (self.version, self.record.size_bytes)

    def may_be(self, other: "Checkpoint") -> bool:
        """Return whether two records of one name can be of the same version."""
        sizes = {self.record.size_bytes, other.record.size_bytes} - {None}
        return self.record.time_ns == other.record.time_ns and len(sizes) < 2

    @property
    def ref(self) -> CheckpointRef:
        """How the API is asked about it."""
        return CheckpointRef(
            run_id=self.run_id,
            path_id=f"{self.kind}/{self.name}",
            listed_id=self.record.checkpoint_id,
            exists=True,
            has_ambiguous_id=self.shares_id,
        )


#: Stands for the base model of a run that has none.
UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True, slots=True)
class RunListing:
    """The user's training runs, in the server's order.

    Attributes:
        by_id: every one of them.
        by_model: the same by the parts of their base model's name, the first and the rest, which is
            empty where the name has no slash.
        newest_ns: when any of them was last asked something; None where none tells.
    """

    by_id: dict[str, models.TrainingRun]
    by_model: dict[str, dict[str, dict[str, models.TrainingRun]]]
    newest_ns: int | None

    @classmethod
    def from_runs(cls, runs: Iterable[models.TrainingRun]) -> "RunListing":
        """Sort runs; of two with the same id the last counts."""
        by_id = {run.run_id: run for run in runs}
        by_model: dict[str, dict[str, dict[str, models.TrainingRun]]] = {}
        for run in by_id.values():
            # A server of one's own may name a model by its folder.
            first, _, rest = (run.base_model or UNKNOWN_MODEL).strip("/").partition("/")
            by_model.setdefault(first, {}).setdefault(rest, {})[run.run_id] = run
        return cls(by_id, by_model, _newest_ns(run.last_request_time_ns for run in by_id.values()))


@dataclass(frozen=True, slots=True)
class CheckpointListing:
    """The checkpoints of one run, in the server's order.

    Attributes:
        all: every one of them.
        bare: those whose id at the server is a bare name that no other one has, by that name.
        groups: every one of them by kind, by name; also the kinds whose last checkpoint is gone.
        newest_ns: when the newest of each group was saved; None where none of it tells.
    """

    all: tuple[Checkpoint, ...]
    bare: dict[str, Checkpoint] = field(default_factory=dict)
    groups: dict[str, dict[str, Checkpoint]] = field(default_factory=dict)
    newest_ns: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run_id: str,
        records: Iterable[models.Checkpoint],
        kinds: Iterable[str] = (),
        known: "AccountListing | None" = None,
    ) -> "CheckpointListing":
        """Sort the server's records; of two that are the same checkpoint the first counts.

        Args:
            run_id: whose they are.
            records: in the server's order.
            kinds: kinds that group nothing any more.
            known: another listing of them: a record that says the same in both is kept once.
        """
        by_name: dict[tuple[str, str], Checkpoint] = {}
        bare_names: dict[str, int] = {}
        for record in records:
            if known is not None:
                record = _same(record, known.by_key.get((run_id, *kind_and_name(record))))
            checkpoint = Checkpoint.from_record(run_id, record)
            first = by_name.setdefault((checkpoint.kind, checkpoint.name), checkpoint)
            if first is checkpoint and record.kind is None:
                bare_names[checkpoint.name] = bare_names.get(checkpoint.name, 0) + 1
        for key, checkpoint in by_name.items():
            if checkpoint.record.kind is None and bare_names[checkpoint.name] > 1:
                by_name[key] = replace(checkpoint, shares_id=True)
        bare = {
            name: checkpoint
            for (_, name), checkpoint in by_name.items()
            if checkpoint.record.kind is None and bare_names[name] == 1
        }
        groups: dict[str, dict[str, Checkpoint]] = {}
        for checkpoint in by_name.values():
            groups.setdefault(checkpoint.kind, {})[checkpoint.name] = checkpoint
        for kind in kinds:
            groups.setdefault(kind, {})
        newest_ns = {
            kind: _newest_ns(c.record.time_ns for c in group.values())
            for kind, group in groups.items()
        }
        return cls(tuple(by_name.values()), bare, groups, newest_ns)

    def get(self, kind: str, name: str) -> Checkpoint | None:
        """Return a checkpoint by its kind and name."""
        return self.groups.get(kind, {}).get(name)

    def of_path(self, kind: str) -> dict[str, Checkpoint]:
        """Return those whose tinker paths have another kind than they are listed under, by name."""
        return {
            checkpoint.name: checkpoint
            for checkpoint in self.bare.values()
            if checkpoint.kind != kind and _path_kind(checkpoint.record) == kind
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that group something, and those whose last checkpoint is gone by now."""
        return tuple(self.groups)

    def of_kind(self, kind: str) -> Collection[Checkpoint]:
        """Return those of a kind."""
        return self.groups.get(kind, {}).values()

    def without(self, left_out: Collection[Checkpoint]) -> "CheckpointListing":
        """Return the listing without some of its checkpoints; the others are shown as before."""
        if not left_out:
            return self
        keys = {checkpoint.key for checkpoint in left_out}
        groups = {
            kind: {name: c for name, c in group.items() if c.key not in keys}
            for kind, group in self.groups.items()
        }
        newest_ns = {
            kind: _newest_ns(c.record.time_ns for c in group.values())
            for kind, group in groups.items()
        }
        return CheckpointListing(
            tuple(c for c in self.all if c.key not in keys),
            {name: c for name, c in self.bare.items() if c.key not in keys},
            groups,
            newest_ns,
        )

    def with_record(
        self, expected: Checkpoint, record: models.Checkpoint | None
    ) -> "CheckpointListing":
        """Return the listing with another record for a checkpoint, or after its deletion."""
        records = (
            record if checkpoint.key == expected.key else checkpoint.record
            for checkpoint in self.all
        )
        present = (each for each in records if each is not None)
        return CheckpointListing.of(expected.run_id, present, self.kinds)


@dataclass(frozen=True, slots=True)
class AccountListing:
    """The checkpoints of all the user's runs, newest first, by run, kind and name.

    Attributes:
        by_key: every one of them.
        nameless: how many records told no run, so that there is no name for them.
    """

    by_key: dict[tuple[str, str, str], Checkpoint]
    without_run_count: int = 0

    @classmethod
    def of(cls, checkpoints: Iterable[Checkpoint], nameless: int = 0) -> "AccountListing":
        """Sort checkpoints; of two that are the same the first counts."""
        newest_first = sorted(checkpoints, key=lambda c: c.record.time_ns or 0, reverse=True)
        by_key: dict[tuple[str, str, str], Checkpoint] = {}
        for checkpoint in newest_first:
            by_key.setdefault(checkpoint.key, checkpoint)
        return cls(by_key, nameless)

    @classmethod
    def of_records(cls, records: Iterable[models.Checkpoint]) -> "AccountListing":
        """Find out of which run each record is: its tinker path tells."""
        checkpoints = list(checkpoints_of(records))
        return cls.of((c for c in checkpoints if c is not None), checkpoints.count(None))

    def without(self, left_out: Collection[Checkpoint]) -> "AccountListing":
        """Return the listing without some of its checkpoints."""
        if not left_out:
            return self
        by_key = self.by_key.copy()
        for checkpoint in left_out:
            by_key.pop(checkpoint.key, None)
        return AccountListing(by_key, self.without_run_count)

    def with_record(
        self, expected: Checkpoint, record: models.Checkpoint | None
    ) -> "AccountListing":
        """Return the listing with another record for a checkpoint, or after its deletion."""
        by_key = self.by_key.copy()  # a record that was changed stands where it stood
        if expected.key in by_key:
            if record is None:
                del by_key[expected.key]
            else:
                by_key[expected.key] = replace(by_key[expected.key], record=record)
        return AccountListing(by_key, self.without_run_count)


def _newest_ns(times_ns: Iterable[int | None]) -> int | None:
    return max((time_ns for time_ns in times_ns if time_ns is not None), default=None)


def checkpoints_of(records: Iterable[models.Checkpoint]) -> "Iterator[Checkpoint | None]":
    """Make checkpoints of the records of all runs; None of one that does not tell its run."""
    for record in records:
        run_id = _run_id(record)
        yield None if run_id is None else Checkpoint.from_record(run_id, record)


def _run_id(record: models.Checkpoint) -> str | None:
    try:
        return intern(TinkerPath.parse(record.tinker_path or "").run_id)
    except ValueError:
        return None


def reuse_known_record(
    record: models.Checkpoint, known: Callable[[str], CheckpointListing | None]
) -> models.Checkpoint:
    """Return the record that a listing of the run has already, where it says the same.

    Args:
        record: of a listing of all runs.
        known: returns the listing of a run, if there is one.
    """
    listing = known(_run_id(record) or "")
    return record if listing is None else _same(record, listing.get(*kind_and_name(record)))


def _same(record: models.Checkpoint, known: Checkpoint | None) -> models.Checkpoint:
    return known.record if known is not None and known.record == record else record


def kind_and_name(record: models.Checkpoint) -> tuple[str, str]:
    """Return what the official service's id of this checkpoint would be made of."""
    if record.kind is not None:
        return record.kind, record.name
    path_kind = _path_kind(record)
    if path_kind in KINDS:
        return intern(path_kind), record.name
    type_ = record.checkpoint_type or "training"
    return KIND_OF_TYPE.get(type_, type_), record.name


def _path_kind(record: models.Checkpoint) -> str:
    """Return the second part of a record's tinker path, empty where it has none."""
    try:
        return TinkerPath.parse(record.tinker_path or "").kind
    except ValueError:
        return ""
