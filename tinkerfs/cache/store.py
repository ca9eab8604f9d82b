"""SQLite store of the cache: immutable records, and durable records.

One table has bytes by (namespace, key). The store is thread-safe, and shared by every mount and
process that uses the same directory (WAL mode, busy timeout). It only saves requests, so it may
fail: after an SQLite error the caller gets "not stored", the error is logged once, and the mount
continues. Nothing in the store is unpickled or executed.

Another table has durable records, which cannot be restored from the API. A new schema version
leaves them in place, each write is synced to disk, and a failed write raises.
"""

import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from tinkerfs import errors
from tinkerfs.safe_open import is_regular, open_regular

log = logging.getLogger(__name__)

#: Incremented when the tables change; the records of another version are dropped.
SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 2.0
#: Name of the database in the cache directory.
FILE_NAME = "metadata.sqlite3"


class _ForkGuard:
    """Keeps every thread out of SQLite while the process forks. Thread-safe.

    SQLite has process-wide mutexes. A child that inherits a locked one hangs when it opens a
    database (https://www.sqlite.org/howtocorrupt.html, 2.6).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: weakref.WeakSet[MetadataStore] = weakref.WeakSet()  # guarded by _lock
        self._locked: list[MetadataStore] = []
        os.register_at_fork(
            before=self._acquire, after_in_parent=self._release, after_in_child=self._release
        )

    def add(self, store: "MetadataStore") -> None:
        """Lock a store during every later fork."""
        with self._lock:
            self._stores.add(store)

    def _acquire(self) -> None:
        self._lock.acquire()
        self._locked = list(self._stores)
        for store in self._locked:
            store.lock.acquire()

    def _release(self) -> None:
        for store in self._locked:
            store.lock.release()
        self._locked = []
        self._lock.release()


_fork_guard = _ForkGuard()


class MetadataStore:
    """Stores bytes by namespace and key on disk. Use it as a context manager.

    Args:
        directory: directory of the database; None stores nothing.

    Attributes:
        directory: see above.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._is_on = directory is not None
        self._path = (directory or Path()) / FILE_NAME
        self.lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None  # guarded by lock
        self._identity: tuple[int, int] | None = None  # of the open file; guarded by lock
        self._has_reported = False
        _fork_guard.add(self)

    def __enter__(self) -> "MetadataStore":
        with self.lock:
            if not self._is_on:
                return self
            try:
                try:
                    self._open()
                except sqlite3.OperationalError:  # locked, full or read-only: may be intact
                    raise
                except sqlite3.DatabaseError as error:
                    log.warning("%s is not readable and is created again: %s", self._path, error)
                    self._remove_files()
                    self._open()
            except (sqlite3.Error, OSError) as error:
                self._report_once(error)
        return self

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def get(self, namespace: str, key: str) -> bytes | None:
        """Return a stored value, None if there is none or it cannot be read."""
        with self.lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(
                    "SELECT value FROM records WHERE space = ? AND key = ?", (namespace, _blob(key))
                ).fetchone()
            except sqlite3.Error as error:
                self._report_once(error)
                return None
        return bytes(row[0]) if row is not None else None

    def put(self, namespace: str, key: str, value: bytes) -> None:
        """Store a value; a failure is logged once and costs only a later request."""
        sql = "INSERT OR REPLACE INTO records (space, key, value) VALUES (?, ?, ?)"
        self._change(sql, (namespace, _blob(key), value))

    def delete(self, namespace: str, key: str) -> None:
        """Delete a value if there is one; a failure is logged once."""
        self._change("DELETE FROM records WHERE space = ? AND key = ?", (namespace, _blob(key)))

    def delete_matching(self, namespace_prefix: str, matches: Callable[[str], bool]) -> None:
        """Delete the values with a matching key, in all namespaces with a prefix.

        A failure is logged once.
        """
        with self.lock:
            if self._connection is None:
                return
            try:
                rows = self._connection.execute(
                    "SELECT space, key FROM records WHERE substr(space, 1, ?) = ?",
                    (len(namespace_prefix), namespace_prefix),
                ).fetchall()
                with self._connection:
                    self._connection.executemany(
                        "DELETE FROM records WHERE space = ? AND key = ?",
                        [(space, key) for space, key in rows if matches(_text(key))],
                    )
            except sqlite3.Error as error:
                self._report_once(error)

    # Durable records.

    def durable(self, namespace: str) -> dict[str, bytes]:
        """Return the durable records of a namespace by key; empty if they cannot be read."""
        with self.lock:
            if self._connection is None:
                return {}
            try:
                rows = self._connection.execute(
                    "SELECT key, value FROM durable WHERE space = ?", (namespace,)
                ).fetchall()
            except sqlite3.Error as error:
                self._report_once(error)
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
            OSError: the same as for `put_durable`.
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
                self._report_once(error)
                return None
        return int(row[0])

    def _change_durably(self, sql: str, values: tuple[object, ...]) -> None:
        with self.lock:
            if not self._is_on:
                raise errors.not_stored("the cache is in memory (hint: set --cache-dir)")
            if self._connection is None:
                raise errors.not_stored(f"{self._path} is not open")
            if self._identity is None or self._identity != _identity_of(self._path):
                # SQLite would write to its open file, which no other process can find.
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
                self._report_once(error)

    def _open(self) -> None:
        # Opening a FIFO would block in SQLite while the lock of this store is held.
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

    def _report_once(self, error: Exception) -> None:
        if not self._has_reported:
            self._has_reported = True
            log.warning("%s: %s; the mount goes on without this store", self._path, error)


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
