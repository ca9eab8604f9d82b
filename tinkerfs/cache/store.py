"""SQLite store: what is immutable, and listings for a warm start, kept across mounts.

A table of bytes by (space, key), and one of listings by (account, name) with the time they came.
Thread-safe; shared by every mount and process that uses the same folder (WAL, busy time-out). It
saves calls, so it may fail: whatever SQLite says, the caller gets "nothing kept" and the mount goes
on, told once. Nothing in it is unpickled or executed.
"""

import logging
import os
import secrets
import sqlite3
import stat
import threading
import weakref
from pathlib import Path

from tinkerfs import errors
from tinkerfs.safe_open import is_regular, open_regular

__all__ = ["Store", "default_cache_dir", "prepare_cache_dir"]

log = logging.getLogger(__name__)

#: Bumped when the tables change; an older or newer file is made anew.
SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 2.0
_FILE_NAME = "metadata.sqlite3"

#: File systems of other machines: SQLite's locks are not to be trusted there
#: (https://www.sqlite.org/howtocorrupt.html, section 2.1).
_NETWORK_FILE_SYSTEMS = frozenset(
    """
    nfs nfs4 cifs smb3 smbfs afs lustre gpfs beegfs ceph glusterfs 9p panfs orangefs wekafs
    fuse.sshfs fuse.glusterfs fuse.juicefs fuse.s3fs fuse.gcsfuse
    """.split()  # noqa: SIM905  (one to a line would be a page)
)


class _Forks:
    """Keeps every thread out of SQLite while the process forks. Thread-safe.

    SQLite has mutexes of the whole process. A child that inherits one that is locked waits for
    ever when it opens a database of its own (https://www.sqlite.org/howtocorrupt.html, 2.6).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: weakref.WeakSet[Store] = weakref.WeakSet()  # guarded by _lock
        self._held: list[Store] = []
        os.register_at_fork(
            before=self._acquire, after_in_parent=self._release, after_in_child=self._release
        )

    def add(self, store: "Store") -> None:
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


class Store:
    """Bytes by space and key, on disk. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE_NAME
        self.lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None  # guarded by lock
        self._has_told = False
        _forks.add(self)

    def __enter__(self) -> "Store":
        with self.lock:
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

    def get(self, space: str, key: str) -> bytes | None:
        """Return what is kept, None where nothing is or it cannot be read."""
        with self.lock:
            if self._connection is None:
                return None
            try:
                row = self._connection.execute(
                    "SELECT value FROM records WHERE space = ? AND key = ?", (space, _blob(key))
                ).fetchone()
            except sqlite3.Error as error:
                self._tell(error)
                return None
        return bytes(row[0]) if row is not None else None

    def put(self, space: str, key: str, value: bytes) -> None:
        """Keep `value`; a failure is told in the log once and costs only a later call."""
        sql = "INSERT OR REPLACE INTO records (space, key, value) VALUES (?, ?, ?)"
        self._change(sql, (space, _blob(key), value))

    def delete(self, space: str, key: str) -> None:
        """Keep nothing under a key any more; a failure is told in the log once."""
        self._change("DELETE FROM records WHERE space = ? AND key = ?", (space, _blob(key)))

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

    def trim_listings(self, limit_bytes: int) -> None:
        """Let the oldest listings go, so that `limit_bytes` are left; a failure is told once."""
        self._change(
            "DELETE FROM listings WHERE rowid IN (SELECT rowid FROM (SELECT rowid,"
            " SUM(LENGTH(value)) OVER (ORDER BY came_at DESC, rowid) AS sum FROM listings)"
            " WHERE sum > ?)",
            (limit_bytes,),
        )

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
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.commit()
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _remove_files(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [Path(f"{self._path}{suffix}") for suffix in ("", "-wal", "-shm", "-journal")]

    def _tell(self, error: Exception) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning("%s: %s; the mount goes on without what it keeps", self._path, error)


def default_cache_dir() -> Path:
    """Return where the cache lies unless told otherwise.

    The user's own cache folder; `/var/tmp/tinkerfs-<uid>` where that is on a network file system.
    """
    import platformdirs

    own = Path(platformdirs.user_cache_dir("tinkerfs", appauthor=False))
    if _file_system_of(own) in _NETWORK_FILE_SYSTEMS:
        return Path(f"/var/tmp/tinkerfs-{os.getuid()}")  # noqa: S108  (checked when prepared)
    return own


def prepare_cache_dir(folder: Path) -> Path:
    """Make the cache folder, 0700 if it is new, and make sure that only we can write there.

    Raises:
        SetupError: it is a link, somebody else's, open to others, or cannot be written.
    """
    cure = "choose another with --cache-dir"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
            raise errors.SetupError(f"the cache folder {folder} is a link or no folder: {cure}")
        if status.st_uid != os.getuid():
            raise errors.SetupError(f"the cache folder {folder} belongs to somebody else: {cure}")
        if status.st_mode & 0o022:
            raise errors.SetupError(f"the cache folder {folder} can be written by others: {cure}")
        probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        os.close(open_regular(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except OSError as error:
        raise errors.SetupError(
            f"the cache folder {folder} cannot be written ({error.strerror}): {cure}"
        ) from None
    return folder


def _file_system_of(path: Path) -> str:
    """Return the type of the file system that holds `path` or its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except OSError:
        pass
    return ""


def _blob(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")
