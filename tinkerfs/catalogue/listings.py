"""Checkpoints and listings of them, as the tree sees them (pure).

Servers list bare ids, ids with a kind, or both; here every checkpoint has a run, a kind and a name.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from tinkerfs.api import models
from tinkerfs.api.refs import CheckpointRef
from tinkerfs.tinker_path import KIND_OF_TYPE, KINDS, TinkerPath

__all__ = ["Checkpoint", "CheckpointListing", "RunListing", "kind_and_name"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
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
    def of(cls, run_id: str, record: models.Checkpoint) -> Self:
        """Make a checkpoint of a listing's record."""
        return cls(run_id, *kind_and_name(record), record)

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it in this account, whatever form the server lists."""
        return (self.run_id, self.kind, self.name)

    @property
    def tinker_path(self) -> str:
        """Its address, as the server wrote it where it did."""
        return self.record.tinker_path or str(TinkerPath(self.run_id, self.kind, self.name))

    @property
    def version(self) -> str:
        """What changes when a checkpoint is saved again under its name."""
        return "undated" if self.record.time_ns is None else str(self.record.time_ns)

    @property
    def ref(self) -> CheckpointRef:
        """How the API is asked about it."""
        return CheckpointRef(
            run_id=self.run_id,
            path_id=f"{self.kind}/{self.name}",
            listed_id=self.record.checkpoint_id,
            is_known=True,
            is_shared=self.shares_id,
        )


@dataclass(frozen=True, slots=True)
class RunListing:
    """The user's training runs, in the server's order."""

    by_id: dict[str, models.TrainingRun]


@dataclass(frozen=True, slots=True)
class CheckpointListing:
    """The checkpoints of one run, in the server's order.

    Attributes:
        by_name: kind and name to checkpoint; every one of them.
        bare: those that are shown by a bare name: the server's id is one, and is unambiguous.
        kinds: the kinds that group the others, also those whose last checkpoint is gone by now.
    """

    by_name: dict[tuple[str, str], Checkpoint]
    bare: dict[str, Checkpoint] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, run_id: str, records: Iterable[models.Checkpoint], kinds: Iterable[str] = ()
    ) -> "CheckpointListing":
        """Sort the server's records; of two that are the same checkpoint the first counts."""
        by_name: dict[tuple[str, str], Checkpoint] = {}
        bare_names: dict[str, int] = {}
        for record in records:
            checkpoint = Checkpoint.of(run_id, record)
            first = by_name.setdefault((checkpoint.kind, checkpoint.name), checkpoint)
            if first is checkpoint and "/" not in record.checkpoint_id:
                bare_names[checkpoint.name] = bare_names.get(checkpoint.name, 0) + 1
        for key, checkpoint in by_name.items():
            if bare_names.get(checkpoint.record.checkpoint_id, 0) > 1:
                by_name[key] = dataclasses.replace(checkpoint, shares_id=True)
        taken = {kind for kind, _ in by_name} | set(KINDS)
        bare = {
            name: checkpoint
            for (_, name), checkpoint in by_name.items()
            if bare_names.get(name) == 1
            and name not in taken
            and "/" not in checkpoint.record.checkpoint_id
        }
        grouped = [c.kind for c in by_name.values() if bare.get(c.name) is not c]
        return cls(by_name, bare, tuple(dict.fromkeys([*grouped, *kinds])))

    def of_kind(self, kind: str) -> list[Checkpoint]:
        """Return those that are shown in the folder of a kind."""
        return [
            checkpoint
            for checkpoint in self.by_name.values()
            if checkpoint.kind == kind and self.bare.get(checkpoint.name) is not checkpoint
        ]

    def without(self, gone: Checkpoint) -> "CheckpointListing":
        """Return the listing after a deletion."""
        records = (c.record for c in self.by_name.values() if c.key != gone.key)
        return CheckpointListing.of(gone.run_id, records, self.kinds)

    def with_record(self, changed: Checkpoint, record: models.Checkpoint) -> "CheckpointListing":
        """Return the listing with another record for a checkpoint."""
        records = (record if c.key == changed.key else c.record for c in self.by_name.values())
        return CheckpointListing.of(changed.run_id, records, self.kinds)


def kind_and_name(record: models.Checkpoint) -> tuple[str, str]:
    """Return what the official service's id of this checkpoint would be made of."""
    kind, slash, name = record.checkpoint_id.partition("/")
    if slash:
        return kind, name
    try:
        path = TinkerPath.parse(record.tinker_path or "")
    except ValueError:
        path = None
    if path is not None and path.kind in KINDS:
        return path.kind, record.checkpoint_id
    type_ = record.checkpoint_type or "training"
    return KIND_OF_TYPE.get(type_, type_), record.checkpoint_id
