"""SQLite store: what is immutable, and listings for a warm start, kept across mounts.

A table of bytes by (space, key), and one of listings by (account, name) with the time they came.
Thread-safe; shared by every mount and process that uses the same folder (WAL, busy time-out). It
saves calls, so it may fail: whatever SQLite says, the caller gets "nothing kept" and the mount goes
on, told once. Nothing in it is unpickled or executed.

A third table has durable records, which no API call can restore: a new schema version leaves them
in place, each is synced to disk when it is written, and a failed write raises.
"""

import logging
import os
import sqlite3
import threading
import weakref
from pathlib import Path

from tinkerfs import errors
from tinkerfs.safe_open import is_regular, open_regular

log = logging.getLogger(__name__)

#: Bumped when the tables change; an older or newer file is made anew.
SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 2.0
_FILE_NAME = "metadata.sqlite3"


class _Forks:
    """Keeps every thread out of SQLite while the process forks. Thread-safe.

    SQLite has mutexes of the whole process. A child that inherits one that is locked waits for
    ever when it opens a database of its own (https://www.sqlite.org/howtocorrupt.html, 2.6).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: weakref.WeakSet[MetadataStore] = weakref.WeakSet()  # guarded by _lock
        self._held: list[MetadataStore] = []
        os.register_at_fork(
            before=self._acquire, after_in_parent=self._release, after_in_child=self._release
        )

    def add(self, store: "MetadataStore") -> None:
        """Hold a store during forks from now on."""
        with self._lock:
            self._stores.add(store)

    def _acquire(self) -> None:
        self._lock.acquire()
        self._held = list(self._stores)
        for store in self._held:
            store.lock.acquire()

    def _release(self) -> None:
        for store in self._held:
            store.lock.release()
        self._held = []
        self._lock.release()


_forks = _Forks()


class MetadataStore:
    """Bytes by space and key, on disk. Use as a context manager.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._is_on = folder is not None
        self._path = (folder or Path()) / _FILE_NAME
        self.lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None  # guarded by lock
        self._identity: tuple[int, int] | None = None  # of the open file; guarded by lock
        self._has_told = False
        _forks.add(self)

    def __enter__(self) -> "MetadataStore":
        with self.lock:
            if not self._is_on:
                return self
            try:
                try:
                    self._open()
                except sqlite3.OperationalError:  # locked, full, read-only: the file may be sound
                    raise
                except sqlite3.DatabaseError as error:
                    log.warning("%s is not readable and is made anew: %s", self._path, error)
                    self._remove_files()
                    self._open()
            except (sqlite3.Error, OSError) as error:
                self._tell(error)
        return self

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def get(self, namespace: str, key: str) -> bytes | None:
        """Return what is kept, None where nothing is or it cannot be read."""
        with self.lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(
                    "SELECT value FROM records WHERE space = ? AND key = ?", (namespace, _blob(key))
                ).fetchone()
            except sqlite3.Error as error:
                self._tell(error)
                return None
        return bytes(row[0]) if row is not None else None

    def put(self, namespace: str, key: str, value: bytes) -> None:
        """Keep `value`; a failure is told in the log once and costs only a later call."""
        sql = "INSERT OR REPLACE INTO records (space, key, value) VALUES (?, ?, ?)"
        self._change(sql, (namespace, _blob(key), value))

    def delete(self, namespace: str, key: str) -> None:
        """Keep nothing under a key any more; a failure is told in the log once."""
        self._change("DELETE FROM records WHERE space = ? AND key = ?", (namespace, _blob(key)))

    def listing(self, account: str, name: str) -> tuple[float, bytes] | None:
        """Return when a listing came, seconds since 1970, and its bytes; None for no such."""
        sql = "SELECT came_at, value FROM listings WHERE account = ? AND name = ?"
        with self.lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(sql, (account, _blob(name))).fetchone()
            except sqlite3.Error as error:
                self._tell(error)
                return None
        return (float(row[0]), bytes(row[1])) if row is not None else None

    def put_listing(self, account: str, name: str, came_at: float, value: bytes | None) -> None:
        """Keep a listing in the place of an older one, or none; a failure is told once."""
        if value is None:
            sql = "DELETE FROM listings WHERE account = ? AND name = ?"
            self._change(sql, (account, _blob(name)))
        else:
            sql = "INSERT OR REPLACE INTO listings VALUES (?, ?, ?, ?)"
            self._change(sql, (account, _blob(name), came_at, value))

    def drop_listings(self, account: str) -> None:
        """Keep no listing of an account any more; a failure is told once."""
        self._change("DELETE FROM listings WHERE account = ?", (account,))

    def evict_listings(self, max_bytes: int) -> None:
        """Let the oldest listings go, so that `limit_bytes` are left; a failure is told once."""
        self._change(
            "DELETE FROM listings WHERE rowid IN (SELECT rowid FROM (SELECT rowid,"
            " SUM(LENGTH(value)) OVER (ORDER BY came_at DESC, rowid) AS sum FROM listings)"
            " WHERE sum > ?)",
            (max_bytes,),
        )

    # Durable records.

    def durable(self, namespace: str) -> dict[str, bytes]:
        """Return the durable records of a space by key; none where they cannot be read."""
        with self.lock:
            if self._connection is None:
                return {}
            try:
                rows = self._connection.execute(
                    "SELECT key, value FROM durable WHERE space = ?", (namespace,)
                ).fetchall()
            except sqlite3.Error as error:
                self._tell(error)
                return {}
        return {_text(key): bytes(value) for key, value in rows}

    def put_durable(self, namespace: str, key: str, value: bytes) -> None:
        """Write a durable record and sync it to disk.

        Raises:
            OSError: EIO if it is not on disk, or would not be found there by the next mount.
        """
        sql = "INSERT OR REPLACE INTO durable (space, key, value) VALUES (?, ?, ?)"
        self._change_durably(sql, (namespace, _blob(key), value))

    def delete_durable(self, namespace: str, key: str) -> None:
        """Delete a durable record, if there is one.

        Raises:
            OSError: as `put_durable`.
        """
        sql = "DELETE FROM durable WHERE space = ? AND key = ?"
        self._change_durably(sql, (namespace, _blob(key)))

    def data_version(self) -> int | None:
        """Return a number that changes when another connection commits; None if unknown.

        Reads shared memory, no file (https://www.sqlite.org/pragma.html#pragma_data_version).
        """
        with self.lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute("PRAGMA data_version").fetchone()
            except sqlite3.Error as error:
                self._tell(error)
                return None
        return int(row[0])

    def _change_durably(self, sql: str, values: tuple[object, ...]) -> None:
        with self.lock:
            if not self._is_on:
                raise errors.not_stored("the cache is in memory (hint: set --cache-dir)")
            if self._connection is None:
                raise errors.not_stored(f"{self._path} is not open")
            if self._identity is None or self._identity != _identity_of(self._path):
                # SQLite would write to the file that it has open, which no other process finds.
                raise errors.not_stored(f"{self._path} was removed or replaced (hint: mount again)")
            try:
                self._connection.execute("PRAGMA synchronous=FULL")
                with self._connection:
                    self._connection.execute(sql, values)
                self._connection.execute("PRAGMA synchronous=NORMAL")
            except sqlite3.Error as error:
                raise errors.not_stored(f"{self._path}: {error}") from error

    def _change(self, sql: str, values: tuple[object, ...]) -> None:
        with self.lock:
            if self._connection is None:
                return
            try:
                with self._connection:
                    self._connection.execute(sql, values)
            except sqlite3.Error as error:
                self._tell(error)

    def _open(self) -> None:
        # SQLite would wait for the other end of a FIFO, with the lock of this store held.
        for path in self._files():
            if os.path.lexists(path) and not os.path.islink(path) and not is_regular(path):
                raise sqlite3.DatabaseError(f"{path} is not a regular file")
        os.close(open_regular(self._path, os.O_RDWR | os.O_CREAT))
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False, cached_statements=16
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                connection.execute("DROP TABLE IF EXISTS records")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS records (space TEXT NOT NULL, key BLOB NOT NULL,"
                " value BLOB NOT NULL, PRIMARY KEY (space, key)) WITHOUT ROWID"
            )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS listings (account TEXT NOT NULL, name BLOB NOT NULL,"
                " came_at REAL NOT NULL, value BLOB NOT NULL, PRIMARY KEY (account, name))"
            )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS durable (space TEXT NOT NULL, key BLOB NOT NULL,"
                " value BLOB NOT NULL, PRIMARY KEY (space, key)) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.commit()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._identity = _identity_of(self._path)

    def _remove_files(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [Path(f"{self._path}{suffix}") for suffix in ("", "-wal", "-shm", "-journal")]

    def _tell(self, error: Exception) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning("%s: %s; the mount goes on without what it keeps", self._path, error)


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _blob(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _text(blob: bytes) -> str:
    return bytes(blob).decode("utf-8", "surrogatepass")
