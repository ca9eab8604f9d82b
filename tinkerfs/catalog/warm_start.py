"""Warm start: the listings as an earlier mount of the account saw them, until a better one comes.

Used by the catalogue, which shows them only while the server's own answer to the same question is
on its way and has not come within a moment. They lie in the store as the records' own JSON, packed,
under the server and a digest of the key, so that nobody sees another account's; they are written
behind. What this mount wrote it never reads: only what was kept before it began. Thread-safe.
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

#: What is kept is written this long after it came, seconds, with all that comes meanwhile.
WRITE_BEHIND_S = 1.0
#: A listing whose records are longer than this in all is not kept, bytes.
MAX_LISTING_BYTES = 32 << 20
#: All that is kept, packed, of all accounts, bytes; the oldest go.
MAX_KEPT_BYTES = 64 << 20
#: How long an unmount waits for what is still to be written, seconds.
_FLUSH_TIMEOUT_S = 2.0
_RECORDS_AT_ONCE = 256


class _Record(Protocol):
    """A record of a listing."""

    @property
    def raw(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Listing:
    """A listing to be written: its name in an answer of the API, its records, when it came."""

    field: str
    records: tuple[_Record, ...]
    came_at: float

    def compressed(self) -> bytes | None:
        """Return an answer with all the records, packed; None where it is too long."""
        packer, left_bytes = zlib.compressobj(1), MAX_LISTING_BYTES
        parts = [packer.compress(b'{"%s":[' % self.field.encode())]
        for start in range(0, len(self.records), _RECORDS_AT_ONCE):
            some = self.records[start : start + _RECORDS_AT_ONCE]
            raw = b",".join(record.raw for record in some)
            left_bytes -= len(raw)
            if left_bytes < 0:
                return None
            parts.append(packer.compress((b"," if start else b"") + raw))
        parts += [packer.compress(b"]}"), packer.flush()]
        return b"".join(parts)


class ListingSnapshots:
    """What earlier mounts of one account kept of its listings. Use as a context manager.

    Args:
        store: where it lies.
        base_url: the server.
        credentials: whose key tells the account.
        clock: whose `now` tells ages.
        stale_s: what is older, seconds, is not shown.
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
        self._before = clock.now()
        self._pending: dict[tuple[str, str], _Listing | None] = {}
        self._dropped: set[str] = set()

    def __enter__(self) -> Self:
        """Return it itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what is still to be written."""
        self._closing.set()
        self._is_idle.wait(_FLUSH_TIMEOUT_S)

    # What was kept; None where nothing is, it is too old, or the key is no good.

    def runs(self) -> RunListing | None:
        """Return the user's training runs as they were."""
        page = self._kept("runs", parsing.parse_training_runs)
        return None if page is None else RunListing.from_runs(page.items)

    def checkpoints(self, run_id: str) -> CheckpointListing | None:
        """Return the checkpoints of a run as they were."""
        page = self._kept(f"checkpoints {run_id}", parsing.parse_checkpoints)
        return None if page is None else CheckpointListing.of(run_id, page.items)

    def user(self) -> AccountListing | None:
        """Return the checkpoints of all the user's runs as they were."""
        page = self._kept("user", parsing.parse_checkpoints)
        return None if page is None else AccountListing.of_records(page.items)

    # What the server told now.

    def save_runs(self, listing: RunListing) -> None:
        """Keep the user's training runs for the next mount."""
        self._keep("runs", "training_runs", listing.by_id.values())

    def save_checkpoints(self, run_id: str, listing: CheckpointListing) -> None:
        """Keep the checkpoints of a run for the next mount."""
        records = (checkpoint.record for checkpoint in listing.all)
        self._keep(f"checkpoints {run_id}", "checkpoints", records)

    def save_account(self, listing: AccountListing) -> None:
        """Keep the checkpoints of all runs for the next mount."""
        records = (checkpoint.record for checkpoint in listing.by_key.values())
        self._keep("user", "checkpoints", records)

    def invalidate_run(self, run_id: str) -> None:
        """Forget what tells of a run's checkpoints: one of them was changed."""
        account = self._account()
        if account is not None:
            names = ("runs", f"checkpoints {run_id}", "user")
            self._schedule_write({(account, name): None for name in names})

    def clear(self) -> None:
        """Forget everything of this account, and show nothing of it in this mount any more."""
        account = self._account()
        with self._lock:
            self._before = float("-inf")
            self._pending.clear()
            if account is not None:
                self._dropped.add(account)
        self._schedule_write({})

    def _account(self) -> str | None:
        digest = self._credentials.fingerprint()
        if digest is None:
            return None
        return hashlib.sha256(f"{self._base_url}\n{digest}".encode()).hexdigest()

    def _kept(self, name: str, parse: Callable[[bytes], Page[T]]) -> Page[T] | None:
        account = self._account()
        row = None if account is None else self._store.listing(account, name)
        if row is None:
            return None
        kept_at, packed = row
        if not self._clock.now() - self._stale_s <= kept_at < self._before:
            return None
        try:
            return parse(zlib.decompress(packed))
        except (zlib.error, errors.ApiError):  # of another version of tinkerfs
            return None

    def _keep(self, name: str, field: str, records: Iterable[_Record]) -> None:
        account = self._account()
        if account is not None:
            listing = _Listing(field, tuple(records), self._clock.now())
            self._schedule_write({(account, name): listing})

    def _schedule_write(self, changes: Mapping[tuple[str, str], _Listing | None]) -> None:
        """Have changes written behind."""
        with self._lock:
            self._pending.update(changes)
            if self._is_idle.is_set() and (self._pending or self._dropped):
                self._is_idle.clear()
                run_in_thread(self._write, "keep listings")

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
                    packed = None if listing is None else listing.compressed()
                    came_at = 0.0 if listing is None else listing.came_at
                    self._store.put_listing(account, name, came_at, packed)
                self._store.evict_listings(MAX_KEPT_BYTES)
        finally:
            self._is_idle.set()
