"""Snapshots of listings, with which the next mount of the account starts warm.

The metadata cache serves a snapshot only if the server's response to the same request takes longer
than a moment. A snapshot is the compressed JSON of the records. Snapshots are stored per server and
API key (as a digest), so that accounts never share them. A background thread writes them. A mount
reads only snapshots that were written before it started.
"""

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeVar

from tinkerfs import errors
from tinkerfs.api import parsing
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.models import Page
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.listings import AccountListing, CheckpointListing, RunListing
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread

T = TypeVar("T")

#: Delay before a snapshot is written, seconds; later snapshots are written with it.
WRITE_BEHIND_S = 1.0
#: Maximum total size of a listing's records, bytes; larger listings are not stored.
MAX_LISTING_BYTES = 32 << 20
#: Maximum compressed size of the snapshots of all accounts, bytes; the oldest are evicted.
MAX_SNAPSHOT_BYTES = 64 << 20
#: Maximum time that an unmount waits for pending writes, seconds.
_FLUSH_TIMEOUT_S = 2.0
_RECORDS_PER_CHUNK = 256


class _Record(Protocol):
    """An API record with its JSON."""

    @property
    def raw(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Listing:
    """A listing to be written.

    Attributes:
        field: field of the API response that contains the records.
        fetched_at: time of the response, seconds since 1970.
    """

    field: str
    records: tuple[_Record, ...]
    fetched_at: float

    def compressed(self) -> bytes | None:
        """Return an API response with all records, compressed; None if too large."""
        compressor, remaining_bytes = zlib.compressobj(1), MAX_LISTING_BYTES
        output = [compressor.compress(b'{"%s":[' % self.field.encode())]
        for start in range(0, len(self.records), _RECORDS_PER_CHUNK):
            chunk = self.records[start : start + _RECORDS_PER_CHUNK]
            raw = b",".join(record.raw for record in chunk)
            remaining_bytes -= len(raw)
            if remaining_bytes < 0:
                return None
            output.append(compressor.compress((b"," if start else b"") + raw))
        output += [compressor.compress(b"]}"), compressor.flush()]
        return b"".join(output)


class ListingSnapshots:
    """Snapshots of one account's listings. Thread-safe.

    Use as a context manager, which writes pending snapshots on exit. Reading methods return None if
    there is no snapshot, if it is too old, or if the API key is invalid.

    Args:
        store: stores the snapshots.
        base_url: the server, which separates the snapshots.
        credentials: provide the API key, which separates the snapshots.
        clock: wall-clock time for the ages of snapshots.
        stale_s: maximum age of a snapshot, seconds.
    """

    def __init__(
        self,
        store: MetadataStore,
        base_url: str,
        credentials: Credentials,
        clock: Clock,
        *,
        stale_s: float,
    ) -> None:
        self._store = store
        self._base_url = base_url
        self._credentials = credentials
        self._clock = clock
        self._stale_s = stale_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._is_idle = threading.Event()
        self._is_idle.set()
        # Guarded by _lock.
        self._written_before = clock.now()
        self._pending: dict[tuple[str, str], _Listing | None] = {}
        self._dropped: set[str] = set()

    def __enter__(self) -> Self:
        """Return the snapshots themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write pending snapshots."""
        self._closing.set()
        self._is_idle.wait(_FLUSH_TIMEOUT_S)

    def runs(self) -> RunListing | None:
        """Return the snapshot of the user's training runs."""
        page = self._load("runs", parsing.parse_training_runs)
        return None if page is None else RunListing.from_runs(page.items)

    def checkpoints(self, run_id: str) -> CheckpointListing | None:
        """Return the snapshot of a run's checkpoints."""
        page = self._load(f"checkpoints {run_id}", parsing.parse_checkpoints)
        return None if page is None else CheckpointListing.from_records(run_id, page.items)

    def account(self) -> AccountListing | None:
        """Return the snapshot of the checkpoints of all the user's runs."""
        page = self._load("user", parsing.parse_checkpoints)
        return None if page is None else AccountListing.from_records(page.items)

    def save_runs(self, listing: RunListing) -> None:
        """Store a snapshot of the user's training runs for the next mount."""
        self._save("runs", "training_runs", listing.by_id.values())

    def save_checkpoints(self, run_id: str, listing: CheckpointListing) -> None:
        """Store a snapshot of a run's checkpoints for the next mount."""
        records = (checkpoint.record for checkpoint in listing.all)
        self._save(f"checkpoints {run_id}", "checkpoints", records)

    def save_account(self, listing: AccountListing) -> None:
        """Store a snapshot of the checkpoints of all runs for the next mount."""
        records = (checkpoint.record for checkpoint in listing.by_key.values())
        self._save("user", "checkpoints", records)

    def invalidate_run(self, run_id: str) -> None:
        """Delete every snapshot with checkpoints of a run, because one has changed."""
        account = self._account_digest()
        if account is not None:
            names = ("runs", f"checkpoints {run_id}", "user")
            self._schedule_write({(account, name): None for name in names})

    def clear(self) -> None:
        """Delete every snapshot of the account; this mount reads none from now on."""
        account = self._account_digest()
        with self._lock:
            self._written_before = float("-inf")
            self._pending.clear()
            if account is not None:
                self._dropped.add(account)
        self._schedule_write({})

    def _account_digest(self) -> str | None:
        digest = self._credentials.fingerprint()
        if digest is None:
            return None
        return hashlib.sha256(f"{self._base_url}\n{digest}".encode()).hexdigest()

    def _load(self, name: str, parse: Callable[[bytes], Page[T]]) -> Page[T] | None:
        account = self._account_digest()
        row = None if account is None else self._store.listing(account, name)
        if row is None:
            return None
        fetched_at, compressed = row
        if not self._clock.now() - self._stale_s <= fetched_at < self._written_before:
            return None
        try:
            return parse(zlib.decompress(compressed))
        except (zlib.error, errors.ApiError):  # written by another version of tinkerfs
            return None

    def _save(self, name: str, field: str, records: Iterable[_Record]) -> None:
        account = self._account_digest()
        if account is not None:
            listing = _Listing(field, tuple(records), self._clock.now())
            self._schedule_write({(account, name): listing})

    def _schedule_write(self, changes: Mapping[tuple[str, str], _Listing | None]) -> None:
        """Schedule changes to be written by a background thread."""
        with self._lock:
            self._pending.update(changes)
            if self._is_idle.is_set() and (self._pending or self._dropped):
                self._is_idle.clear()
                run_in_thread(self._write, "write listing snapshots")

    def _write(self) -> None:
        try:
            while True:
                self._closing.wait(WRITE_BEHIND_S)
                with self._lock:
                    pending, self._pending = self._pending, {}
                    dropped, self._dropped = self._dropped, set()
                    if not pending and not dropped:
                        self._is_idle.set()
                        return
                for account in dropped:
                    self._store.drop_listings(account)
                for (account, name), listing in pending.items():
                    compressed = None if listing is None else listing.compressed()
                    fetched_at = 0.0 if listing is None else listing.fetched_at
                    self._store.put_listing(account, name, fetched_at, compressed)
                self._store.evict_listings(MAX_SNAPSHOT_BYTES)
        finally:
            self._is_idle.set()
