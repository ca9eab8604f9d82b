"""Records of exports: which export belongs to which version of a checkpoint.

All processes that use a cache directory share the records and the locks. A process holds the lock
of an export while it starts, changes or recovers it. The kernel releases the lock when the process
ends, so a record of an export that began, without a lock, is that of a killed process. Unlike a
process id, a lock means the same in every PID namespace. Thread-safe.
"""

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from enum import Enum
from typing import Final, Self

import msgspec

from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.cache.store import MetadataStore
from tinkerfs.clock import Clock
from tinkerfs.safe_open import open_regular
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.validity import Expiry

#: An export is not used within this time of its expiry, seconds: a URL may take some to be used.
EXPIRY_MARGIN_S: Final = 60.0
#: Name of every export.
EXPORT_NAME: Final = "tinkerfs"

_NAMESPACE: Final = "exports 1"
_LOCK_FILE: Final = "exports.lock"
_LOCK_POLL_S: Final = 0.05
_NS: Final = 1_000_000_000


class ExportState(Enum):
    """Progress of an export."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The export of one version of a checkpoint.

    Attributes:
        process: the process that exports: its id, a colon, and what distinguishes it from others.
        began_at_s: seconds since 1970.
        run_id: the run that the export creates; empty before its session exists.
        path: tinker path of the external weights, once they are saved.
        expires_at_s: when the server deletes them, seconds since 1970; None for never.
        ttl_s: duration that is set again while the export is read, seconds; 0 if the expiry is not
            to be set again.
        size_bytes: total size of the files, None if the server does not tell.
        failure: the server's message.
    """

    state: ExportState
    process: str
    began_at_s: float
    run_id: str = ""
    path: str = ""
    expires_at_s: float | None = 0.0
    ttl_s: int = 0
    size_bytes: int | None = None
    failure: str = ""

    @property
    def pid(self) -> str:
        """The id of the process that exports, which may be in another PID namespace."""
        return self.process.partition(":")[0]

    @property
    def ref(self) -> CheckpointRef:
        """The external weights, for requests."""
        path = TinkerPath.parse(self.path)
        checkpoint_id = f"{path.kind}/{path.name}"
        return CheckpointRef(path.run_id, checkpoint_id, checkpoint_id)

    def left_s(self, now_s: float) -> float:
        """Return the time until the export expires, seconds; infinite if it does not."""
        return math.inf if self.expires_at_s is None else self.expires_at_s - now_s

    def is_usable(self, now_s: float) -> bool:
        """Return whether the files can be read."""
        return self.state is ExportState.DONE and self.left_s(now_s) > EXPIRY_MARGIN_S

    def saved_as(self, path: str, expires_at_s: float, size_bytes: int | None = None) -> Self:
        """Return the record of the same export when it is done."""
        return msgspec.structs.replace(
            self,
            state=ExportState.DONE,
            path=path,
            expires_at_s=expires_at_s,
            size_bytes=size_bytes,
        )


def find_saved(client: Client, record: ExportRecord) -> ExportRecord | None:
    """Request what an export has saved; return its record, None if the server has nothing.

    A server may save the weights of a process that was killed before it learned of that.

    Raises:
        ApiError: the request failed.
    """
    path = record.path or f"tinker://{record.run_id}/external_weights/{EXPORT_NAME}"
    try:
        listed = client.list_checkpoints(TinkerPath.parse(path).run_id)
    except errors.NotFound:
        return None
    for each in listed:
        if each.tinker_path == path:
            found = record.saved_as(path, 0.0, each.size_bytes)
            expires_at_s = None if each.expires_at_ns is None else each.expires_at_ns / _NS
            return msgspec.structs.replace(found, expires_at_s=expires_at_s)
    return None


class ExportLock:
    """The lock of one export. Use it as a context manager, which releases it."""

    def __init__(self, locks: ByteRangeLocks | None, release: Callable[[], None]) -> None:
        self._locks = locks
        self._release = release

    def __enter__(self) -> Self:
        """Return the lock itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Release the lock."""
        if self._locks is not None:
            self._locks.close()
        self._release()


class ExportRecords:
    """The records and locks by `CheckpointVersion.cache_key`.

    Args:
        store: keeps the records across mounts. Without a directory they are those of this process.
    """

    def __init__(self, store: MetadataStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._records: dict[str, ExportRecord] = {}
        self._locked: set[str] = set()
        self._data_version: int | None = None
        self._checked_at = -math.inf
        #: Of everything that is derived from the records; replaced when one changes.
        self.expiry = Expiry(math.inf)

    def get(self, key: str, max_age_s: float = 0.0) -> ExportRecord | None:
        """Return a record, at most `max_age_s` after another process has changed it."""
        self._reload(max_age_s)
        return self._records.get(key)

    def count(self, state: ExportState) -> int:
        """Return the number of records in a state, as last read."""
        with self._lock:
            return sum(record.state is state for record in self._records.values())

    def is_empty(self, max_age_s: float = 0.0) -> bool:
        """Return whether there are no records."""
        self._reload(max_age_s)
        return not self._records

    def put(self, key: str, record: ExportRecord) -> None:
        """Store a record; without a cache directory it is known to this process alone."""
        with self._lock:
            self._records[key] = record
            self._expire()
        with suppress(OSError):
            self._store.put_durable(_NAMESPACE, key, msgspec.json.encode(record))

    def delete(self, key: str) -> None:
        """Delete a record if there is one."""
        with self._lock:
            self._records.pop(key, None)
            self._expire()
        with suppress(OSError):
            self._store.delete_durable(_NAMESPACE, key)

    def lock(self, key: str, timeout_s: float = 0.0) -> ExportLock | None:
        """Lock an export; return None if it is locked for longer than `timeout_s` seconds.

        On a file system without locks, it is locked within this process alone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            lock = self._try_lock(key)
            if lock is not None or time.monotonic() >= deadline:
                return lock
            time.sleep(_LOCK_POLL_S)

    def is_locked(self, key: str) -> bool:
        """Return whether a process starts, changes or recovers an export."""
        with self._lock:
            if key in self._locked:
                return True
        try:
            locks = self._open_locks()
            if locks is None:
                return False
            with closing(locks):
                return locks.is_locked(_byte_of(key))
        except OSError:
            return False

    def _try_lock(self, key: str) -> ExportLock | None:
        with self._lock:
            if key in self._locked:
                return None
            self._locked.add(key)
        locks = None
        try:
            locks = self._open_locks()
            is_locked = locks is None or locks.acquire(_byte_of(key))
        except OSError:
            is_locked = True
        lock = ExportLock(locks, lambda: self._unlock(key))
        if is_locked:
            return lock
        with lock:
            return None

    def _open_locks(self) -> ByteRangeLocks | None:
        """Open the file of the locks; None without a directory.

        Each lock has an open file of its own, because those of one open file do not conflict.
        """
        directory = self._store.directory
        if directory is None:
            return None
        return ByteRangeLocks(open_regular(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT))

    def _unlock(self, key: str) -> None:
        with self._lock:
            self._locked.discard(key)

    def _reload(self, max_age_s: float) -> None:
        """Read the store if another process has changed it."""
        now = self._clock.monotonic()
        if now < self._checked_at + max_age_s:
            return
        version = self._store.data_version()
        with self._lock:
            self._checked_at = now
            if version is not None and version != self._data_version:
                self._data_version = version
                records = _decode(self._store.durable(_NAMESPACE))
                if records != self._records:
                    self._records = records
                    self._expire()

    def _expire(self) -> None:
        """Invalidate all that was derived from the records; the caller holds the lock."""
        self.expiry.fresh_until = -math.inf
        self.expiry = Expiry(math.inf)


def _byte_of(key: str) -> int:
    """Return the offset that is locked for a key: 56 bits of its hash, a valid `off_t`."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return int.from_bytes(digest)


def _decode(values: dict[str, bytes]) -> dict[str, ExportRecord]:
    """Return the records that can be read; a damaged one is worth no more than none."""
    records: dict[str, ExportRecord] = {}
    for key, value in values.items():
        with suppress(msgspec.MsgspecError):
            records[key] = msgspec.json.decode(value, type=ExportRecord)
    return records
