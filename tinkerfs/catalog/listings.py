"""Immutable checkpoints, and listings of training runs and checkpoints.

Servers list bare checkpoint ids, ids with a kind, or both. Here every checkpoint has a run, a kind
and a name. All functions are pure.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from sys import intern
from typing import Self

import msgspec
from msgspec.structs import replace

from tinkerfs.api import models, raw_json
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.catalog.order_index import OrderIndex
from tinkerfs.tinker_path import KIND_OF_TYPE, KINDS, TinkerPath


class ListedCheckpoint(msgspec.Struct, frozen=True, gc=False):
    """A checkpoint of a training run, with its record from a listing.

    Attributes:
        kind: the second segment of its tinker path on the official service.
        name: the rest of its id.
        record: its API record.
        has_ambiguous_id: whether another checkpoint of the run is listed under the same bare id.
    """

    run_id: str
    kind: str
    name: str
    record: models.Checkpoint
    has_ambiguous_id: bool = False

    @classmethod
    def from_record(cls, run_id: str, record: models.Checkpoint) -> Self:
        """Return the checkpoint that an API record describes."""
        return cls(run_id, *kind_and_name(record), record)

    @classmethod
    def unlisted(cls, path: TinkerPath) -> Self:
        """Return a checkpoint that no listing contains, made from its path."""
        record = models.Checkpoint.from_fields(
            f"{path.kind}/{path.name}",
            tinker_path=str(path),
            raw=raw_json.with_fields(
                b"{}", checkpoint_id=f"{path.kind}/{path.name}", tinker_path=str(path)
            ),
        )
        return cls(path.run_id, path.kind, path.name, record)

    @property
    def key(self) -> tuple[str, str, str]:
        """Its run id, kind and name: unique in the account, whatever id the server lists."""
        return (self.run_id, self.kind, self.name)

    @property
    def tinker_path(self) -> str:
        """Its tinker path: from the record if present, otherwise built from the key."""
        return self.record.tinker_path or str(TinkerPath(self.run_id, self.kind, self.name))

    @property
    def has_time(self) -> bool:
        """Whether the record has a creation time, which identifies the version."""
        return self.record.time_ns is not None

    @property
    def version(self) -> str:
        """A text that changes when the checkpoint is saved again under its name.

        If the record has no time, the text may stay the same: see `has_time`.
        """
        if self.record.time_ns is not None:
            return str(self.record.time_ns)
        size_bytes = self.record.size_bytes
        return "undated" if size_bytes is None else f"undated-{size_bytes}"

    @property
    def fingerprint(self) -> tuple[str, int | None]:
        """Every field of the record that depends on the version."""
        return (self.version, self.record.size_bytes)

    def may_be(self, other: "ListedCheckpoint") -> bool:
        """Return whether another record of the name may be of the same version."""
        sizes = {self.record.size_bytes, other.record.size_bytes} - {None}
        return self.record.time_ns == other.record.time_ns and len(sizes) < 2

    @property
    def ref(self) -> CheckpointRef:
        """The reference by which API requests identify it."""
        return CheckpointRef(
            run_id=self.run_id,
            path_id=f"{self.kind}/{self.name}",
            listed_id=self.record.checkpoint_id,
            exists=True,
            has_ambiguous_id=self.has_ambiguous_id,
            version=self.version if self.has_time else "",
        )


_KIND_AND_NAME = attrgetter("kind", "name")

#: Replaces the base model of a run without one.
UNKNOWN_MODEL = "unknown"
#: Replaces the owner of a run without one.
UNKNOWN_OWNER = "unknown"


@dataclass(frozen=True)
class RunListing:
    """The user's training runs, in the server's order.

    Attributes:
        by_id: every run by its id.
        by_model: every run by the first segment of its base model's name, the rest of that name
            (empty if it has no slash), and its id.
        newest_ns: time of the latest request to any run, nanoseconds since 1970; None if unknown.
    """

    by_id: dict[str, models.TrainingRun]
    by_model: dict[str, dict[str, dict[str, models.TrainingRun]]]
    newest_ns: int | None

    @classmethod
    def from_runs(cls, runs: Iterable[models.TrainingRun]) -> "RunListing":
        """Index runs; the last of several runs with the same id wins."""
        by_id = {run.run_id: run for run in runs}
        by_model: dict[str, dict[str, dict[str, models.TrainingRun]]] = {}
        for run in by_id.values():
            # Self-hosted servers may report the path of the model's directory as its name.
            first, _, rest = (run.base_model or UNKNOWN_MODEL).strip("/").partition("/")
            by_model.setdefault(first, {}).setdefault(rest, {})[run.run_id] = run
        return cls(by_id, by_model, _newest_ns(run.last_request_time_ns for run in by_id.values()))

    def __iter__(self) -> Iterator[models.TrainingRun]:
        """Return an iterator over all runs."""
        return iter(self.by_id.values())

    @cached_property
    def order(self) -> OrderIndex[str]:
        """The run ids in the orders of traversals; slow to make for many runs."""
        return OrderIndex(self.by_id)


@dataclass(frozen=True)
class SharedRunListing:
    """The training runs of other users that the user may read, in the server's order.

    Attributes:
        by_id: every run by its id.
        by_owner: every run by its owner and its id.
    """

    by_id: dict[str, models.TrainingRun]
    by_owner: dict[str, dict[str, models.TrainingRun]]

    @classmethod
    def from_accessible(
        cls, runs: Iterable[models.TrainingRun], own: Mapping[str, models.TrainingRun]
    ) -> "SharedRunListing":
        """Index the runs that the user may read, without the own ones.

        `own` may be older than `runs`. So a run of the same owner as one of them is an own run.
        """
        own_owners = {_owner(run) for run in own.values()} - {UNKNOWN_OWNER}
        by_id: dict[str, models.TrainingRun] = {}
        by_owner: dict[str, dict[str, models.TrainingRun]] = {}
        for run in runs:
            owner = _owner(run)
            if run.run_id not in own and owner not in own_owners:
                by_id[run.run_id] = run
                by_owner.setdefault(owner, {})[run.run_id] = run
        return cls(by_id, by_owner)

    def __iter__(self) -> Iterator[models.TrainingRun]:
        """Return an iterator over all runs."""
        return iter(self.by_id.values())


def _owner(run: models.TrainingRun) -> str:
    owner = (raw_json.loads_object(run.raw) or {}).get("model_owner")
    return owner if isinstance(owner, str) and owner else UNKNOWN_OWNER


@dataclass(frozen=True)
class CheckpointListing:
    """The checkpoints of one run, in the server's order.

    Attributes:
        all: every checkpoint.
        bare: the checkpoints that the server lists under a bare and unique name, by that name.
        groups: every checkpoint by kind and name; a kind stays after its last checkpoint is gone.
    """

    all: tuple[ListedCheckpoint, ...]
    bare: dict[str, ListedCheckpoint] = field(default_factory=dict)
    groups: dict[str, dict[str, ListedCheckpoint]] = field(default_factory=dict)

    @classmethod
    def from_records(
        cls,
        run_id: str,
        records: Iterable[models.Checkpoint],
        kinds: Iterable[str] = (),
    ) -> "CheckpointListing":
        """Index the server's records; the first of several for the same checkpoint wins.

        Args:
            run_id: the run that every record belongs to.
            records: in the server's order.
            kinds: kinds to include even if they have no checkpoint.
        """
        by_name: dict[tuple[str, str], ListedCheckpoint] = {}
        bare_names: dict[str, int] = {}
        for record in records:
            checkpoint = ListedCheckpoint.from_record(run_id, record)
            first = by_name.setdefault((checkpoint.kind, checkpoint.name), checkpoint)
            if first is checkpoint and record.kind is None:
                bare_names[checkpoint.name] = bare_names.get(checkpoint.name, 0) + 1
        for key, checkpoint in by_name.items():
            if checkpoint.record.kind is None and bare_names[checkpoint.name] > 1:
                by_name[key] = replace(checkpoint, has_ambiguous_id=True)
        bare = {
            name: checkpoint
            for (_, name), checkpoint in by_name.items()
            if checkpoint.record.kind is None and bare_names[name] == 1
        }
        groups: dict[str, dict[str, ListedCheckpoint]] = {}
        for checkpoint in by_name.values():
            groups.setdefault(checkpoint.kind, {})[checkpoint.name] = checkpoint
        for kind in kinds:
            groups.setdefault(kind, {})
        return cls(tuple(by_name.values()), bare, groups)

    def __iter__(self) -> Iterator[ListedCheckpoint]:
        """Return an iterator over all checkpoints."""
        return iter(self.all)

    @cached_property
    def newest_ns(self) -> dict[str, int | None]:
        """Creation time of the newest checkpoint by kind, nanoseconds since 1970; None if unknown.

        It is unknown if no record of the kind has a time.
        """
        return {
            kind: _newest_ns(c.record.time_ns for c in group.values())
            for kind, group in self.groups.items()
        }

    @cached_property
    def order(self) -> OrderIndex[ListedCheckpoint]:
        """The checkpoints in the orders of traversals, by kind and name."""
        listed = (checkpoint for kind in self.kinds for checkpoint in self.of_kind(kind))
        return OrderIndex(listed, name=_KIND_AND_NAME)

    def get(self, kind: str, name: str) -> ListedCheckpoint | None:
        """Return the checkpoint of a kind and name."""
        return self.groups.get(kind, {}).get(name)

    def of_path(self, kind: str) -> dict[str, ListedCheckpoint]:
        """Return the checkpoints, by name, that only their tinker paths assign to a kind."""
        return {
            checkpoint.name: checkpoint
            for checkpoint in self.bare.values()
            if checkpoint.kind != kind and _path_kind(checkpoint.record) == kind
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of the listing, including kinds without remaining checkpoints."""
        return tuple(self.groups)

    def of_kind(self, kind: str) -> Collection[ListedCheckpoint]:
        """Return the checkpoints of a kind."""
        return self.groups.get(kind, {}).values()

    def without(self, excluded: Collection[ListedCheckpoint]) -> "CheckpointListing":
        """Return the listing without the given checkpoints, otherwise unchanged."""
        if not excluded:
            return self
        keys = {checkpoint.key for checkpoint in excluded}
        groups = {
            kind: {name: c for name, c in group.items() if c.key not in keys}
            for kind, group in self.groups.items()
        }
        return CheckpointListing(
            tuple(c for c in self.all if c.key not in keys),
            {name: c for name, c in self.bare.items() if c.key not in keys},
            groups,
        )

    def with_record(
        self, expected: ListedCheckpoint, record: models.Checkpoint | None
    ) -> "CheckpointListing":
        """Return the listing with a checkpoint's record replaced, or removed if None."""
        records = (
            record if checkpoint.key == expected.key else checkpoint.record
            for checkpoint in self.all
        )
        present = (each for each in records if each is not None)
        return CheckpointListing.from_records(expected.run_id, present, self.kinds)


def _newest_ns(times_ns: Iterable[int | None]) -> int | None:
    return max((time_ns for time_ns in times_ns if time_ns is not None), default=None)


def run_id_of(record: models.Checkpoint) -> str | None:
    """Return the run that the tinker path of a record names, or None."""
    try:
        return TinkerPath.parse(record.tinker_path or "").run_id
    except ValueError:
        return None


def kind_and_name(record: models.Checkpoint) -> tuple[str, str]:
    """Return the kind and name that the official service's id of a record would have."""
    if record.kind is not None:
        return record.kind, record.name
    path_kind = _path_kind(record)
    if path_kind in KINDS:
        return intern(path_kind), record.name
    type_ = record.checkpoint_type or "training"
    return KIND_OF_TYPE.get(type_, type_), record.name


def _path_kind(record: models.Checkpoint) -> str:
    """Return the second segment of a record's tinker path, or an empty string."""
    try:
        return TinkerPath.parse(record.tinker_path or "").kind
    except ValueError:
        return ""


def with_listed_last(run: models.TrainingRun, listing: CheckpointListing) -> models.TrainingRun:
    """Return a run with its last checkpoints replaced if a listing lacks them."""
    lasts = [each for each in (run.last_checkpoint, run.last_sampler_checkpoint) if each]
    is_listed = all(listing.get(*kind_and_name(each)) for each in lasts)
    return run if is_listed else apply_to_run(run, listing)


def apply_to_run(run: models.TrainingRun, listing: CheckpointListing) -> models.TrainingRun:
    """Return a run with its last checkpoints updated from its current listing."""
    lasts = {
        "last_checkpoint": run.last_checkpoint,
        "last_sampler_checkpoint": run.last_sampler_checkpoint,
    }
    current = {name: _newest(listing, last) for name, last in lasts.items() if last is not None}
    fields = (
        b'"%s":%s' % (name.encode(), b"null" if last is None else last.raw)
        for name, last in current.items()
    )
    raw = raw_json.merge_objects(run.raw, b"{" + b",".join(fields) + b"}")
    return replace(run, raw=raw, **current)


def apply_to_runs(runs: RunListing, run_id: str, listing: CheckpointListing) -> RunListing:
    """Return the runs with the last checkpoints of one updated from its listing."""
    run = runs.by_id.get(run_id)
    if run is None:
        return runs
    return RunListing.from_runs({**runs.by_id, run_id: apply_to_run(run, listing)}.values())


def _newest(listing: CheckpointListing, last: models.Checkpoint) -> models.Checkpoint | None:
    """Return the current record of a checkpoint, else the newest one of its kind."""
    kind, name = kind_and_name(last)
    current = listing.get(kind, name)
    if current is not None:
        return current.record
    of_kind = [c.record for c in listing.all if c.kind == kind]
    return max(of_kind, key=lambda record: record.time_ns or 0, default=None)
