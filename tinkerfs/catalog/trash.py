"""Persistent records of the checkpoints that were removed with `--trash`.

Servers have no trash: a removal only sets an expiry. A record in the store therefore states which
version of a checkpoint was removed, and which expiry it had before. The record alone hides nothing.
A checkpoint is in the trash if its record exists and the server lists the expiry that the removal
set, or an earlier one. A checkpoint leaves the trash if another client clears or postpones its
expiry.

A crash at any time is therefore harmless. The record is written before the request. If the request
never arrived, the listed expiry is still the former one, and the checkpoint is visible. If it
arrived, the next listing shows the new expiry, and the checkpoint is in the trash. For the same
reason, a restoration deletes the record after the request.

Records are stored per server. Each contains a digest of the API key that removed the checkpoint,
never the key. As keys are rotated, a record of another key counts for runs that the account owns.

Other processes on the host write to the same store; a thread polls for their changes.
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
from typing import Self, TypeVar

import msgspec
from msgspec.structs import replace

from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.account_listing import AccountListing
from tinkerfs.catalog.listings import CheckpointListing, ListedCheckpoint
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.config import TTL_RANGE_S

log = logging.getLogger(__name__)

#: Interval at which the store is polled for changes by other processes, seconds.
WATCH_INTERVAL_S = 0.5
#: Maximum lead of a listed expiry over the recorded one, because servers round to seconds.
_ROUNDING_NS = 2_000_000_000
#: Maximum difference of the clocks of host and server. A removal leaves an expiry in place that is
#: at most this much later than its own: the server could compute the same one.
_MAX_SKEW_NS = 600_000_000_000
#: Minimum age of a record before it is discarded, seconds: its request may still be in flight.
SETTLED_S = 600
#: A record of a checkpoint that is not listed is discarded this long after the expiry, seconds.
_GONE_S = 86_400

_NS = 1_000_000_000

L = TypeVar("L", CheckpointListing, AccountListing)


class TrashState(Enum):
    """Progress of a removal."""

    #: The request is about to be sent, or its response was lost.
    PLANNED = "planned"
    #: The server confirmed the expiry; `expires_at_ns` is by the clock of this host.
    SET = "set"
    #: A listing has shown the expiry; `expires_at_ns` is the listed one.
    LISTED = "listed"


class TrashRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Removal of one version of a checkpoint.

    Attributes:
        account: digest of server and API key.
        removed_at_s: seconds since 1970.
        expires_at_ns: expiry that the removal set, nanoseconds since 1970.
        former_expires_at_ns: expiry before the removal; None for never.
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
        """Kind, name and version: unique within a run."""
        return (self.kind, self.name, self.version)

    def is_in_effect(self, expires_at_ns: int | None) -> bool:
        """Return whether the checkpoint is in the trash, given its listed expiry.

        Args:
            expires_at_ns: nanoseconds since 1970; None for never.
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

        The API accepts no TTL below an hour, so an earlier expiry becomes an hour.
        """
        if self.former_expires_at_ns is None:
            return None
        min_s, max_s = TTL_RANGE_S
        remaining_s = math.ceil(self.former_expires_at_ns / _NS - now_s)
        return min(max(remaining_s, min_s), max_s)


class _VisibleListing(msgspec.Struct, frozen=True):
    """Cached result of filtering a listing at a generation of the trash."""

    listing: CheckpointListing | AccountListing
    generation: int
    visible: CheckpointListing | AccountListing


class Trash:
    """Trash records of one server, and filters for its listings. Thread-safe.

    Use as a context manager, which polls the store for changes by other processes.

    Args:
        store: stores the records.
        base_url: the server, which separates the records.
        key_digest: returns a digest of the current API key; None before it is known.
        clock: wall-clock time for the ages of records.

    Attributes:
        generation: a number that changes whenever a record does.
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
        self._namespace = f"trash {base_url}"
        self._key_digest = key_digest
        self._clock = clock
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # Replaced as a whole under _lock; read without it.
        self.generation = 0
        self._changed_at: dict[str, float] = {}
        self._changed_elsewhere: set[str] = set()
        self._visible: dict[str | None, _VisibleListing] = {}
        self._stored_version: int | None = None
        self._by_run: Mapping[str, Mapping[tuple[str, str, str], TrashRecord]] = {}
        # Single operations on a set are atomic.
        self._accounts: set[str] = set()
        self._own_runs: set[str] = set()

    def __enter__(self) -> Self:
        """Read the records, and start to poll for changes by other processes."""
        self.refresh()
        with self._lock:  # the first reading is not a change
            self._changed_elsewhere, self._changed_at = set(), {}
        run_in_thread(self._watch, "watch the trash")
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop polling for changes by other processes."""
        self._closing.set()

    # Queries.

    def changed_at_ns(self, run_id: str | None = None) -> int | None:
        """Return when records were last added or removed, or None for never.

        Args:
            run_id: the run to consider; None for all runs.

        Returns:
            Nanoseconds since 1970.
        """
        times = self._changed_at
        changed_at = max(times.values(), default=None) if run_id is None else times.get(run_id)
        return None if changed_at is None else int(changed_at * _NS)

    def run_ids(self) -> list[str]:
        """Return the runs with records of this account, sorted."""
        return sorted(run_id for run_id in self._by_run if any(self._of_run(run_id)))

    def unknown_run_ids(self) -> set[str]:
        """Return the runs with records of other keys only; their owner is unknown."""
        return {run_id for run_id in self._by_run if not any(self._of_run(run_id))}

    def add_own_runs(self, run_ids: Iterable[str]) -> None:
        """Record runs of the account; trash records of other keys then count for them."""
        unknown = self.unknown_run_ids() if self._by_run else set()
        if unknown and (own := unknown.intersection(run_ids)):
            with self._lock:
                self._own_runs |= own
                self._on_change()

    def has_run(self, run_id: str) -> bool:
        """Return whether a run has a record, of this account or another."""
        return run_id in self._by_run

    def record(self, checkpoint: ListedCheckpoint) -> TrashRecord | None:
        """Return the record of this version of a checkpoint, or None."""
        key = (checkpoint.kind, checkpoint.name, checkpoint.version)
        found = self._by_run.get(checkpoint.run_id, {}).get(key)
        return found if found is not None and self._is_ours(found) else None

    def is_trashed(self, checkpoint: ListedCheckpoint) -> bool:
        """Return whether a checkpoint with its listed expiry is in the trash."""
        if checkpoint.run_id not in self._by_run:
            return False
        record = self.record(checkpoint)
        return record is not None and record.is_in_effect(checkpoint.record.expires_at_ns)

    def of_run(self, run_id: str, listing: CheckpointListing) -> Collection[ListedCheckpoint]:
        """Return the checkpoints of a run's listing in the trash, in no particular order."""
        names = {(record.kind, record.name) for record in self._of_run(run_id)}
        found = (listing.get(*each) for each in names)
        return [c for c in found if c is not None and self.is_trashed(c)]

    # Filters. A filtered listing is cached until the listing or the trash changes.

    def visible(self, run_id: str, listing: CheckpointListing) -> CheckpointListing:
        """Return a run's listing without the checkpoints in the trash."""
        if run_id not in self._by_run:
            return listing
        return self._filtered(run_id, listing, lambda: self.of_run(run_id, listing))

    def visible_in_account(self, listing: AccountListing) -> AccountListing:
        """Return the account's listing without the checkpoints in the trash."""
        if not self._by_run:
            return listing
        return self._filtered(None, listing, lambda: self._in_account(listing))

    def _in_account(self, listing: AccountListing) -> Collection[ListedCheckpoint]:
        keys = {
            (record.run_id, record.kind, record.name)
            for run_id in self._by_run
            for record in self._of_run(run_id)
        }
        found = map(listing.get, keys)
        return [c for c in found if c is not None and self.is_trashed(c)]

    def _filtered(
        self, run_id: str | None, listing: L, find: Callable[[], Collection[ListedCheckpoint]]
    ) -> L:
        # Threads that filter the same listing concurrently get equal results.
        generation, cached = self.generation, self._visible.get(run_id)
        if cached is not None and cached.listing is listing and cached.generation == generation:
            return cached.visible  # type: ignore[return-value]
        visible = listing.without(find())
        self._visible[run_id] = _VisibleListing(listing, generation, visible)
        return visible

    def _of_run(self, run_id: str) -> Iterable[TrashRecord]:
        records = self._by_run.get(run_id, {}).values()
        return (record for record in records if self._is_ours(record))

    def _is_ours(self, record: TrashRecord) -> bool:
        is_known = record.account in self._accounts or record.run_id in self._own_runs
        return is_known or record.account == self._current_account()

    def _current_account(self) -> str:
        """Return the digest of the current key, and record it: all keys have the same account."""
        digest = self._key_digest() or ""
        account = hashlib.sha256(f"{self._base_url}\n{digest}".encode()).hexdigest()
        self._accounts.add(account)
        return account

    # Changes of records.

    def plan(self, checkpoint: ListedCheckpoint, ttl_s: float) -> TrashRecord:
        """Write the record of a removal before its request is sent.

        If the checkpoint expires earlier than that, its expiry stays. The state of the record is
        then LISTED, and the removal needs no request.

        Args:
            checkpoint: the checkpoint as the server lists it now.
            ttl_s: how long it stays in the trash.

        Raises:
            OSError: EIO if the record could not be written to disk.
        """
        former_ns, now_s = checkpoint.record.expires_at_ns, self._clock.now()
        trash_ns = math.floor(now_s + ttl_s) * _NS
        expiry_stays = former_ns is not None and former_ns <= trash_ns + _MAX_SKEW_NS
        record = TrashRecord(
            run_id=checkpoint.run_id,
            kind=checkpoint.kind,
            name=checkpoint.name,
            version=checkpoint.version,
            account=self._current_account(),
            state=TrashState.LISTED if expiry_stays else TrashState.PLANNED,
            removed_at_s=now_s,
            expires_at_ns=former_ns if expiry_stays and former_ns is not None else trash_ns,
            former_expires_at_ns=former_ns,
        )
        self._write(record)
        return record

    def mark_set(self, record: TrashRecord) -> None:
        """Record that the server confirmed the expiry of a planned removal.

        A write error is only logged, because the next listing shows the expiry anyway.
        """
        self.refresh()
        if self._find(record) == record:
            self._try(lambda: self._write(replace(record, state=TrashState.SET)))

    def discard(self, record: TrashRecord) -> None:
        """Delete a record, so that its checkpoint leaves the trash.

        A write error is only logged, because the listed expiry has the same effect.
        """
        with self._lock:
            self._try(lambda: self._store.delete_durable(self._namespace, _name(record)))
            self._replace(record, None)

    def reconcile(self, run_id: str, listing: CheckpointListing) -> None:
        """Update the records of a run from a new listing that includes the trash."""
        self.refresh()
        now_s = self._clock.now()
        for record in list(self._of_run(run_id)):
            checkpoint = listing.get(record.kind, record.name)
            if checkpoint is None or checkpoint.version != record.version:
                if now_s > record.expires_at_ns / _NS + _GONE_S:
                    self.discard(record)
                continue
            expires_at_ns = checkpoint.record.expires_at_ns
            if not record.is_in_effect(expires_at_ns):
                if now_s - record.removed_at_s > SETTLED_S:
                    self.discard(record)
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
            for value in self._store.durable(self._namespace).values():
                record = _parsed(value)
                if record is not None:
                    by_run[record.run_id][record.key] = record
            for run_id in by_run.keys() | self._by_run.keys():
                self._compare(run_id, self._by_run.get(run_id, {}), by_run.get(run_id, {}))
            if by_run != self._by_run:
                self._by_run = dict(by_run)
                self._on_change()

    def take_changed_runs(self) -> set[str]:
        """Return, once, the runs with records that other processes have changed.

        Older listings of these runs may contain former expiries.
        """
        if not self._changed_elsewhere:
            return set()
        with self._lock:
            changed, self._changed_elsewhere = self._changed_elsewhere, set()
        return changed

    def _compare(
        self,
        run_id: str,
        previous: Mapping[tuple[str, str, str], TrashRecord],
        current: Mapping[tuple[str, str, str], TrashRecord],
    ) -> None:
        """Record changes of a run between two readings; the caller holds the lock."""
        if previous.keys() != current.keys():
            self._changed_at[run_id] = self._clock.now()
        elif not any(
            record.state is TrashState.PLANNED and current[key].state is not TrashState.PLANNED
            for key, record in previous.items()
        ):
            return
        self._changed_elsewhere.add(run_id)

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_INTERVAL_S):
            self.refresh()

    def _try(self, change: Callable[[], None]) -> None:
        """Change the store and log errors, for changes that a listing can replace."""
        try:
            change()
        except OSError as error:
            log.warning("trash: %s", error.strerror)

    def _find(self, record: TrashRecord) -> TrashRecord | None:
        return self._by_run.get(record.run_id, {}).get(record.key)

    def _write(self, record: TrashRecord) -> None:
        value = json.dumps(msgspec.to_builtins(record)).encode()
        with self._lock:
            self._store.put_durable(self._namespace, _name(record), value)
            self._replace(record, record)

    def _replace(self, record: TrashRecord, current: TrashRecord | None) -> None:
        """Replace or remove a record in memory; the caller holds the lock."""
        previous = self._by_run.get(record.run_id, {})
        of_run = {key: each for key, each in previous.items() if key != record.key}
        if current is not None:
            of_run[record.key] = current
        if of_run.keys() != previous.keys():
            self._changed_at[record.run_id] = self._clock.now()
        by_run = {**self._by_run, record.run_id: of_run}
        self._by_run = {run_id: records for run_id, records in by_run.items() if records}
        self._on_change()

    def _on_change(self) -> None:
        """Invalidate the filtered listings; the caller holds the lock."""
        self.generation += 1
        self._visible = {}


def _name(record: TrashRecord) -> str:
    return json.dumps((record.run_id, *record.key))


def _parsed(value: bytes) -> TrashRecord | None:
    try:
        return msgspec.convert(json.loads(value), TrashRecord)
    except (ValueError, RecursionError, msgspec.ValidationError):
        return None  # written by another version of tinkerfs
