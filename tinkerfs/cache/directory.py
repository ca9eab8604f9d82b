"""Where the cache lies, and whether that place may be used.

What is cached is served as true bytes, so no other user may write it: it lies in a directory that
is the user's own and 0700. Where the directory that was given is another user's or open to others,
as a volume of a pod is, it lies in a directory of our own within. Thread-safe; keeps no state.
"""

import os
import secrets
import stat
from pathlib import Path

from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

#: File systems of other machines: SQLite's locks are not to be trusted there
#: (https://www.sqlite.org/howtocorrupt.html, section 2.1).
_NETWORK_FILE_SYSTEMS = frozenset(
    """
    nfs nfs4 cifs smb3 smbfs afs lustre gpfs beegfs ceph glusterfs 9p panfs orangefs wekafs
    fuse.sshfs fuse.glusterfs fuse.juicefs fuse.s3fs fuse.gcsfuse
    """.split()  # noqa: SIM905  (one to a line would be a page)
)

_HINT = "(hint: choose another with --cache-dir)"


class UnusableCacheError(StartupError):
    """The cache directory cannot be made or written; a mount can do without it."""


def default_cache_dir() -> Path:
    """Return where the cache lies unless a user says otherwise.

    The user's own cache directory. Where that lies on a network file system or cannot be written,
    as under a HOME that is read-only or `/`, it is `/var/tmp/tinkerfs-<uid>`.
    """
    import platformdirs

    own = Path(platformdirs.user_cache_dir("tinkerfs", appauthor=False))
    if file_system_of(own) in _NETWORK_FILE_SYSTEMS or not _may_be_written(own):
        return _fallback()
    return own


def locate_cache_dir(directory: Path) -> Path:
    """Return the directory that is used for `directory`: that itself, or our own within.

    Neither is made here. Whoever may write in `directory` can remove ours, but not write in it.
    """
    try:
        status = directory.stat()
    except OSError:
        return directory
    if directory == _fallback():  # in a directory of everybody's: it is ours, or another's trap
        return directory
    is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    if is_private or not stat.S_ISDIR(status.st_mode):
        return directory
    return directory / f"tinkerfs-{os.getuid()}"


def prepare_cache_dir(directory: Path) -> Path:
    """Make the directory that is used for `directory`, 0700 if it is new, and return it.

    Raises:
        UnusableCacheError: it cannot be made or written, or is another user's.
        SetupError: the path names a link, or something else than a directory.
    """
    own = locate_cache_dir(directory)
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = own.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise StartupError(f"the cache directory {own} is a link {_HINT}")
        if status.st_uid != os.getuid():
            raise UnusableCacheError(
                f"the cache directory {own} belongs to another user (uid {status.st_uid}) {_HINT}"
            )
        if status.st_mode & 0o022:
            own.chmod(0o700)  # within a directory that has a default ACL
        probe = own / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        os.close(open_regular(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except (NotADirectoryError, FileExistsError):
        raise StartupError(f"the cache directory {own} is not a directory {_HINT}") from None
    except OSError as error:
        raise UnusableCacheError(
            f"the cache directory {own} cannot be written: {error.strerror} {_HINT}"
        ) from None
    return own


def can_lock_files(directory: Path) -> bool:
    """Tell whether locks of open file descriptions (fcntl(2)) come and go with them there.

    On FUSE and virtiofs they may not: the kernel passes each lock on, but not that the description
    was closed. A lock would then outlive its process, and what it protects would stay for ever.
    """
    fstype = file_system_of(directory)
    return fstype != "virtiofs" and not fstype.startswith("fuse")


def file_system_of(path: Path) -> str:
    """Return the type of the file system that holds `path` or its nearest parent that exists."""
    device = os.stat(_nearest(path)).st_dev
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


def _fallback() -> Path:
    return Path(f"/var/tmp/tinkerfs-{os.getuid()}")  # noqa: S108  (checked when prepared)


def _may_be_written(directory: Path) -> bool:
    return os.access(_nearest(directory), os.W_OK | os.X_OK)


def _nearest(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
