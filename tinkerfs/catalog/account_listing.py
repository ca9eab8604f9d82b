"""The checkpoints of all the user's runs, packed, because there may be a million."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from msgspec.structs import replace

from tinkerfs.api import models
from tinkerfs.catalog.checkpoint_table import CheckpointTable
from tinkerfs.catalog.listings import ListedCheckpoint, run_id_of


class AccountRecords:
    """The records of the account's checkpoints, each once, in the order of arrival.

    Attributes:
        table: the checkpoint of each record that names a run; the first of several with the same
            key counts.
        without_run_count: number of records that are left out because they name no run.
    """

    def __init__(self, records: Iterable[models.Checkpoint] = ()) -> None:
        self.table = CheckpointTable()
        self.without_run_count = 0
        #: Identities of the records that are not in the table.
        self._left_out: set[Hashable] = set()
        for record in records:
            self.add(record)

    def add(self, record: models.Checkpoint) -> None:
        """Add a record, unless one with its identity is there."""
        run_id = run_id_of(record)
        if run_id is None:
            if record.identity not in self._left_out:
                self._left_out.add(record.identity)
                self.without_run_count += 1
            return
        checkpoint = ListedCheckpoint.from_record(run_id, record)
        if not self.table.add(checkpoint):
            first = self.table.get(checkpoint.key)
            if first is not None and first.record.identity != record.identity:
                self._left_out.add(record.identity)

    def __len__(self) -> int:
        return len(self.table) + len(self._left_out)

    def __iter__(self) -> Iterator[models.Checkpoint]:
        return (checkpoint.record for checkpoint in self.table)


@dataclass(frozen=True)
class AccountListing:
    """The checkpoints of all the user's runs, newest first. Its iterator creates each checkpoint.

    Attributes:
        table: the checkpoints as the server listed them.
        changes: the checkpoints that have changed since, by key; None if removed.
        without_run_count: as in `AccountRecords`.
    """

    table: CheckpointTable
    changes: Mapping[tuple[str, str, str], ListedCheckpoint | None] = field(default_factory=dict)
    without_run_count: int = 0
    _newest_ns: dict[Callable[[ListedCheckpoint], bool], int | None] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def from_checkpoints(cls, checkpoints: Iterable[ListedCheckpoint]) -> "AccountListing":
        """Sort and index checkpoints; the first of several with the same key counts."""
        table = CheckpointTable()
        for checkpoint in checkpoints:
            table.add(checkpoint)
        return cls(table.newest_first())

    @classmethod
    def from_records(cls, records: AccountRecords) -> "AccountListing":
        """Sort records."""
        return cls(records.table.newest_first(), without_run_count=records.without_run_count)

    def __iter__(self) -> Iterator[ListedCheckpoint]:
        if not self.changes:
            return iter(self.table)
        current = (self.changes.get(each.key, each) for each in self.table)
        return (each for each in current if each is not None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccountListing):
            return NotImplemented
        if self.without_run_count != other.without_run_count:
            return False
        if not self.changes and not other.changes:
            return self.table == other.table
        return all(a == b for a, b in zip_longest(self, other))

    __hash__ = None  # type: ignore[assignment]

    def get(self, key: tuple[str, str, str]) -> ListedCheckpoint | None:
        """Return the checkpoint with a `ListedCheckpoint.key`, or None."""
        return self.changes[key] if key in self.changes else self.table.get(key)

    def newest_ns(self, shows: Callable[[ListedCheckpoint], bool]) -> int | None:
        """Return the time of the newest checkpoint that matches, nanoseconds since 1970.

        Returns None if all matches are without a time. A view needs it for each stat of its
        directory, and the search may read all checkpoints. So the result is remembered.
        """
        if shows not in self._newest_ns:
            times_ns = (each.record.time_ns for each in self if shows(each))
            self._newest_ns[shows] = next((t for t in times_ns if t is not None), None)
        return self._newest_ns[shows]

    def without(self, excluded: Collection[ListedCheckpoint]) -> "AccountListing":
        """Return the listing without the given checkpoints, otherwise unchanged."""
        return self._changed({checkpoint.key: None for checkpoint in excluded})

    def with_record(
        self, expected: ListedCheckpoint, record: models.Checkpoint | None
    ) -> "AccountListing":
        """Return the listing with a checkpoint's record replaced, or removed if None."""
        current = self.get(expected.key)
        if current is None:
            return self
        changed = None if record is None else replace(current, record=record)
        return self._changed({expected.key: changed})  # it keeps its position

    def _changed(
        self, changes: Mapping[tuple[str, str, str], ListedCheckpoint | None]
    ) -> "AccountListing":
        if not changes:
            return self
        return AccountListing(self.table, {**self.changes, **changes}, self.without_run_count)
