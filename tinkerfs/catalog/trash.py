"""Trash: which checkpoints were removed with `--trash`, and what brings them back.

The server knows no trash: a removal only sets an expiry. So a record in the store says which
version of a checkpoint was removed, and which expiry it had before. The record alone hides nothing.
A checkpoint is in the trash if its record exists and the server lists the expiry that the removal
set, or an earlier one. An expiry that was cleared or put off elsewhere ends it.

Therefore a crash loses nothing, whatever the process was doing. The record is written before the
request. If the request never arrived, the listed expiry is still the former one, and the checkpoint
is shown. If it did, the next listing shows the new expiry, and the checkpoint is in the trash.
Restoring sends the request first and deletes the record second, for the same reason.

Records are stored by server. Each has a digest of the key that removed the checkpoint, never the
key. Under another key a record counts only for a run that the account owns: keys are rotated.

Other processes on the host write to the same store; a thread looks for their changes. Thread-safe.
"""

import hashlib
import json
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import msgspec
from msgspec.structs import replace

from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.listings import AccountListing, Checkpoint, CheckpointListing
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.config import TTL_RANGE_S

log = logging.getLogger(__name__)

#: How often the store is checked for changes by other processes, seconds.
WATCH_INTERVAL_S = 0.5
#: An expiry up to this much later than that of the trash counts as nearer and stays, seconds.
NEARER_S = 60
#: How much later than recorded an expiry may be listed: servers round to seconds.
_ROUNDING_NS = 2_000_000_000
#: How far the clocks of host and server may differ for a request whose response was lost.
_MAX_SKEW_NS = 600_000_000_000
#: A record is not dropped before this time, seconds: the request may still be on its way.
SETTLED_S = 600
#: A record of what the server no longer lists is dropped this long after the expiry, seconds.
_GONE_S = 86_400

_NS = 1_000_000_000

L = TypeVar("L", CheckpointListing, AccountListing)


class TrashState(Enum):
    """How far a removal came."""

    #: The request is about to be sent, or was sent and its response was lost.
    PLANNED = "planned"
    #: The server confirmed the expiry; `expires_at_ns` is by the clock of this host.
    SET = "set"
    #: A listing has shown the expiry; `expires_at_ns` is what it said.
    LISTED = "listed"


class TrashRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One removal of one version of a checkpoint.

    Attributes:
        run_id: its training run.
        kind: as `Checkpoint.kind`.
        name: as `Checkpoint.name`.
        version: as `Checkpoint.version`.
        account: digest of server and key.
        state: how far the removal came.
        removed_at_s: seconds since 1970.
        expires_at_ns: when the server deletes it, nanoseconds since 1970.
        former_expires_at_ns: its expiry before the removal; None for never.
    """

    run_id: str
    kind: str
    name: str
    version: str
    account: str
    state: TrashState
    removed_at_s: float
    expires_at_ns: int
    former_expires_at_ns: int | None

    @property
    def key(self) -> tuple[str, str, str]:
        """Kind, name and version."""
        return (self.kind, self.name, self.version)

    def is_in_effect(self, expires_at_ns: int | None) -> bool:
        """Return whether a checkpoint with this expiry is in the trash.

        Args:
            expires_at_ns: as listed, nanoseconds since 1970; None for never.
        """
        if expires_at_ns is None:
            return False
        if self.state is TrashState.LISTED:
            return expires_at_ns <= self.expires_at_ns + _ROUNDING_NS
        if expires_at_ns == self.former_expires_at_ns:
            return False
        return (
            self.state is TrashState.SET or abs(expires_at_ns - self.expires_at_ns) <= _MAX_SKEW_NS
        )

    def former_ttl_s(self, now_s: float) -> int | None:
        """Return the TTL in seconds that restores the former expiry; None for never.

        The API takes no TTL below an hour: what would expire sooner gets an hour.
        """
        if self.former_expires_at_ns is None:
            return None
        shortest_s, longest_s = TTL_RANGE_S
        left_s = math.ceil(self.former_expires_at_ns / _NS - now_s)
        return min(max(left_s, shortest_s), longest_s)


class _Visible(msgspec.Struct, frozen=True):
    """A listing without what was in the trash, and at which epoch."""

    listing: CheckpointListing | AccountListing
    epoch: int
    visible: CheckpointListing | AccountListing


class Trash:
    """The records of one server in the store. Use as a context manager.

    Args:
        store: has the records.
        base_url: of the server.
        key_digest: returns a digest of the key in use, None before it is known.
        clock: `now` for ages.

    Attributes:
        epoch: changes whenever a record does.
    """

    def __init__(
        self,
        store: MetadataStore,
        base_url: str,
        key_digest: Callable[[], str | None],
        clock: Clock,
    ) -> None:
        self._store = store
        self._base_url = base_url
        self._space = f"trash {base_url}"
        self._key_digest = key_digest
        self._clock = clock
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # Changed under _lock, and replaced as a whole; read without it.
        self.epoch = 0
        self._changed_at: dict[str, float] = {}
        self._changed_elsewhere: set[str] = set()
        self._visible: dict[str | None, _Visible] = {}
        self._stored_version: int | None = None
        self._by_run: Mapping[str, Mapping[tuple[str, str, str], TrashRecord]] = {}
        # Single operations on a set are atomic.
        self._accounts: set[str] = set()
        self._own_runs: set[str] = set()

    def __enter__(self) -> Self:
        """Read the records, and begin to look for changes by other processes."""
        self.refresh()
        with self._lock:  # nothing was listed before
            self._changed_elsewhere, self._changed_at = set(), {}
        run_in_thread(self._watch, "watch the trash")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._closing.set()

    # What is in it.

    def changed_at_ns(self, run_id: str | None = None) -> int | None:
        """Return when records were seen to come or go, nanoseconds since 1970; None for never.

        Args:
            run_id: those of one run; None for those of any.
        """
        times = self._changed_at
        changed_at = max(times.values(), default=None) if run_id is None else times.get(run_id)
        return None if changed_at is None else int(changed_at * _NS)

    def run_ids(self) -> list[str]:
        """Return the runs of this account that have a record, sorted."""
        return sorted(run_id for run_id in self._by_run if any(self._of_run(run_id)))

    def unknown_run_ids(self) -> set[str]:
        """Return the runs with records under other keys only, which may be another account's."""
        return {run_id for run_id in self._by_run if not any(self._of_run(run_id))}

    def add_own_runs(self, run_ids: Iterable[str]) -> None:
        """Record that the account owns runs, whichever key removed their checkpoints."""
        unknown = self.unknown_run_ids() if self._by_run else set()
        if unknown and (own := unknown.intersection(run_ids)):
            with self._lock:
                self._own_runs |= own
                self._on_change()

    @property
    def has_any(self) -> bool:
        """Whether there is a record, of this account or not."""
        return bool(self._by_run)

    def has_run(self, run_id: str) -> bool:
        """Return whether a run has a record, of this account or not."""
        return run_id in self._by_run

    def record(self, checkpoint: Checkpoint) -> TrashRecord | None:
        """Return the record of this version of a checkpoint, None for no such."""
        key = (checkpoint.kind, checkpoint.name, checkpoint.version)
        found = self._by_run.get(checkpoint.run_id, {}).get(key)
        return found if found is not None and self._is_ours(found) else None

    def is_trashed(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint, as the server lists it, is in the trash."""
        if checkpoint.run_id not in self._by_run:
            return False
        record = self.record(checkpoint)
        return record is not None and record.is_in_effect(checkpoint.record.expires_at_ns)

    def of_run(self, run_id: str, listing: CheckpointListing) -> Collection[Checkpoint]:
        """Return what of a run's listing is in the trash, in no particular order."""
        named = {(record.kind, record.name) for record in self._of_run(run_id)}
        found = (listing.get(*each) for each in named)
        return [c for c in found if c is not None and self.is_trashed(c)]

    # What is left: each listing is filtered here, once for each change of either.

    def visible(self, run_id: str, listing: CheckpointListing) -> CheckpointListing:
        """Return a run's listing without what is in the trash."""
        if run_id not in self._by_run:
            return listing
        return self._filtered(run_id, listing, lambda: self.of_run(run_id, listing))

    def visible_of_user(self, listing: AccountListing) -> AccountListing:
        """Return the listing of all runs without what is in the trash."""
        if not self._by_run:
            return listing
        return self._filtered(None, listing, lambda: self._of_user(listing))

    def _of_user(self, listing: AccountListing) -> Collection[Checkpoint]:
        named = {
            (record.run_id, record.kind, record.name)
            for run_id in self._by_run
            for record in self._of_run(run_id)
        }
        found = (listing.by_key.get(each) for each in named)
        return [c for c in found if c is not None and self.is_trashed(c)]

    def _filtered(
        self, name: str | None, listing: L, find: Callable[[], Collection[Checkpoint]]
    ) -> L:
        # Two threads that filter one listing at once make the same of it.
        epoch, before = self.epoch, self._visible.get(name)
        if before is not None and before.listing is listing and before.epoch == epoch:
            return before.visible  # type: ignore[return-value]
        visible = listing.without(find())
        self._visible[name] = _Visible(listing, epoch, visible)
        return visible

    def _of_run(self, run_id: str) -> Iterable[TrashRecord]:
        records = self._by_run.get(run_id, {}).values()
        return (record for record in records if self._is_ours(record))

    def _is_ours(self, record: TrashRecord) -> bool:
        if record.account in self._accounts or record.run_id in self._own_runs:
            return True
        # One mount is of one account, whatever keys it has had.
        self._accounts.add(self._account())
        return record.account in self._accounts

    def _account(self) -> str:
        digest = self._key_digest() or ""
        return hashlib.sha256(f"{self._base_url}\n{digest}".encode()).hexdigest()

    # Changes.

    def plan(self, checkpoint: Checkpoint, ttl_s: float) -> TrashRecord:
        """Write the record of a removal that is about to be made.

        Args:
            checkpoint: as the server lists it now.
            ttl_s: how long it stays in the trash. A nearer expiry stays as it is: then the record
                is LISTED, and the removal is made.

        Raises:
            OSError: EIO if the record is not on disk.
        """
        former_ns, now_s = checkpoint.record.expires_at_ns, self._clock.now()
        wanted_ns = math.floor(now_s + ttl_s) * _NS
        stays = former_ns is not None and former_ns <= wanted_ns + NEARER_S * _NS
        record = TrashRecord(
            run_id=checkpoint.run_id,
            kind=checkpoint.kind,
            name=checkpoint.name,
            version=checkpoint.version,
            account=self._account(),
            state=TrashState.LISTED if stays else TrashState.PLANNED,
            removed_at_s=now_s,
            expires_at_ns=former_ns if stays and former_ns is not None else wanted_ns,
            former_expires_at_ns=former_ns,
        )
        self._write(record)
        return record

    def mark_set(self, record: TrashRecord) -> None:
        """Record that the server confirmed the expiry of a planned removal.

        A failure to write it is not raised: the next listing shows the expiry all the same.
        """
        self.refresh()
        if self._find(record) == record:
            self._try(lambda: self._write(replace(record, state=TrashState.SET)))

    def forget(self, record: TrashRecord) -> None:
        """Delete a record, which does not hide its checkpoint any more.

        A failure to delete it is not raised, because the listed expiry shows the same.
        """
        with self._lock:
            self._try(lambda: self._store.delete_durable(self._space, _name(record)))
            self._put(record, None)

    def reconcile(self, run_id: str, listing: CheckpointListing) -> None:
        """Bring the records of a run up to date with what the server lists now.

        Args:
            run_id: the run.
            listing: its checkpoints, with what is in the trash.
        """
        self.refresh()
        now_s = self._clock.now()
        for record in list(self._of_run(run_id)):
            checkpoint = listing.get(record.kind, record.name)
            if checkpoint is None or checkpoint.version != record.version:
                if now_s > record.expires_at_ns / _NS + _GONE_S:
                    self.forget(record)
                continue
            expires_at_ns = checkpoint.record.expires_at_ns
            if not record.is_in_effect(expires_at_ns):
                if now_s - record.removed_at_s > SETTLED_S:
                    self.forget(record)
            elif record.state is not TrashState.LISTED and expires_at_ns is not None:
                listed = replace(record, state=TrashState.LISTED, expires_at_ns=expires_at_ns)
                self._try(partial(self._write, listed))

    def refresh(self) -> None:
        """Read the records again if another process has changed the store."""
        with self._lock:
            version = self._store.data_version()
            if version is None or version == self._stored_version:
                return
            self._stored_version = version
            by_run: dict[str, dict[tuple[str, str, str], TrashRecord]] = defaultdict(dict)
            for value in self._store.durable(self._space).values():
                record = _parsed(value)
                if record is not None:
                    by_run[record.run_id][record.key] = record
            for run_id in by_run.keys() | self._by_run.keys():
                self._compare(run_id, self._by_run.get(run_id, {}), by_run.get(run_id, {}))
            if by_run != self._by_run:
                self._by_run = dict(by_run)
                self._on_change()

    def take_changed_runs(self) -> set[str]:
        """Return the runs whose checkpoints other processes have moved since the last call.

        What was listed before that may have their former expiry.
        """
        if not self._changed_elsewhere:
            return set()
        with self._lock:
            changed, self._changed_elsewhere = self._changed_elsewhere, set()
        return changed

    def _compare(
        self,
        run_id: str,
        before: Mapping[tuple[str, str, str], TrashRecord],
        now: Mapping[tuple[str, str, str], TrashRecord],
    ) -> None:
        """Record what changed between two readings of a run; the caller holds the lock."""
        if before.keys() != now.keys():
            self._changed_at[run_id] = self._clock.now()
        elif not any(
            each.state is TrashState.PLANNED and now[key].state is not TrashState.PLANNED
            for key, each in before.items()
        ):
            return
        self._changed_elsewhere.add(run_id)

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_INTERVAL_S):
            self.refresh()

    def _try(self, change: Callable[[], None]) -> None:
        """Change the store where the change only repeats what the server says."""
        try:
            change()
        except OSError as error:
            log.warning("trash: %s", error.strerror)

    def _find(self, record: TrashRecord) -> TrashRecord | None:
        return self._by_run.get(record.run_id, {}).get(record.key)

    def _write(self, record: TrashRecord) -> None:
        value = json.dumps(msgspec.to_builtins(record)).encode()
        with self._lock:
            self._store.put_durable(self._space, _name(record), value)
            self._put(record, record)

    def _put(self, record: TrashRecord, now: TrashRecord | None) -> None:
        """Replace a record in memory; the caller holds the lock."""
        before = self._by_run.get(record.run_id, {})
        of_run = {key: each for key, each in before.items() if key != record.key}
        if now is not None:
            of_run[record.key] = now
        if of_run.keys() != before.keys():
            self._changed_at[record.run_id] = self._clock.now()
        by_run = {**self._by_run, record.run_id: of_run}
        self._by_run = {run_id: records for run_id, records in by_run.items() if records}
        self._on_change()

    def _on_change(self) -> None:
        """Invalidate what was filtered; the caller holds the lock."""
        self.epoch += 1
        self._visible = {}


def _name(record: TrashRecord) -> str:
    return json.dumps((record.run_id, *record.key))


def _parsed(value: bytes) -> TrashRecord | None:
    try:
        return msgspec.convert(json.loads(value), TrashRecord)
    except (ValueError, RecursionError, msgspec.ValidationError):
        return None  # of another version of tinkerfs
