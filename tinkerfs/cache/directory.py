"""Location of the cache directory, and checks of its ownership and permissions.

The content of the cache is trusted, so no other user may write to it: its directory belongs to the
user and has mode 0700. If the given directory belongs to another user or is writable by others,
like a volume of a pod, a private subdirectory is used. Thread-safe and stateless.

On a network file system the blocks have the form that many hosts may share, and the databases are
in the default directory of this host.
"""

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinkerfs import operating_system
from tinkerfs.concurrency import run_in_thread
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

#: Network file systems, which other hosts may use too. SQLite's locks are unreliable on them
#: (https://www.sqlite.org/howtocorrupt.html, section 2.1).
_NETWORK_FILE_SYSTEMS = frozenset(
    """
    nfs nfs4 cifs smb3 smbfs afs lustre gpfs beegfs ceph glusterfs 9p panfs orangefs wekafs
    fuse.sshfs fuse.glusterfs fuse.juicefs fuse.s3fs fuse.gcsfuse fuse.ceph fuse.ceph-fuse
    fuse.seaweedfs fuse.mfs fuse.moosefs
    """.split()  # noqa: SIM905  (one to a line would be a page)
)

_HINT = "(hint: choose another with --cache-dir)"


#: Names of the directories with the blocks of one host, and with those that many hosts share.
_BLOCKS, _SHARED = "blocks", "shared"


@dataclass(frozen=True, slots=True)
class CachePaths:
    """Where the parts of a cache are.

    Attributes:
        root: the cache directory.
        metadata: the directory of the databases, which one host uses alone.
        is_shared: whether many hosts may use the blocks at the same time.
    """

    root: Path
    metadata: Path
    is_shared: bool

    @property
    def blocks(self) -> Path:
        """The directory of the blocks."""
        return self.root / (_SHARED if self.is_shared else _BLOCKS)


class UnusableCacheError(StartupError):
    """The cache directory cannot be created or written; a mount works without it."""


def default_cache_dir() -> Path:
    """Return the default cache directory.

    It is in the user's cache directory. If that is on a network file system or cannot be written,
    e.g. because HOME is read-only or `/`, it is `/var/tmp/tinkerfs-<uid>`. The same if there is no
    home, as for a user id of a pod without HOME and without an entry in /etc/passwd.
    """
    import platformdirs

    try:
        own = Path(platformdirs.user_cache_dir("tinkerfs", appauthor=False))
    except RuntimeError:
        return _fallback()
    if not own.is_absolute():  # as older versions return it
        return _fallback()
    if file_system_of(own) in _NETWORK_FILE_SYSTEMS or not _may_be_written(own):
        return _fallback()
    return own


def locate_cache(directory: Path | None) -> CachePaths:
    """Return where the parts of a cache are; None stands for the default directory.

    A cache is shared on a network file system, and if its directory `shared` exists, as on the
    server of that file system. Nothing is created.
    """
    root = locate_cache_dir(directory or default_cache_dir())
    is_shared = file_system_of(root) in _NETWORK_FILE_SYSTEMS or (root / _SHARED).is_dir()
    metadata = root if directory is None or not is_shared else locate_cache_dir(default_cache_dir())
    return CachePaths(root, metadata, is_shared)


def prepare_cache(directory: Path | None, timeout_s: float) -> CachePaths:
    """Create the directories of a cache, see `prepare_cache_dir`, and return where they are.

    Args:
        directory: of the cache; None for the default.
        timeout_s: how long the file system may take to respond, seconds.

    Raises:
        UnusableCacheError: as `prepare_cache_dir`, or the file system does not respond.
        StartupError: as `prepare_cache_dir`.
    """

    def prepare() -> CachePaths:
        prepare_cache_dir(directory or default_cache_dir())
        paths = locate_cache(directory)
        prepare_cache_dir(paths.metadata)
        return paths

    future = run_in_thread(prepare, "preparation of the cache")
    try:
        return future.result(timeout_s)
    except TimeoutError:
        raise UnusableCacheError(
            f"the cache directory {directory} does not respond {_HINT}"
        ) from None


def locate_cache_dir(directory: Path) -> Path:
    """Return the directory to use: `directory`, or a private subdirectory of it.

    Neither is created. Users with write permission for `directory` can remove the private
    subdirectory, but cannot write to it.
    """
    try:
        status = directory.stat()
    except OSError:
        return directory
    if directory == _fallback():  # in a world-writable directory: ours, or planted by another user
        return directory
    is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    if is_private or not stat.S_ISDIR(status.st_mode):
        return directory
    return directory / f"tinkerfs-{os.getuid()}"


def prepare_cache_dir(directory: Path) -> Path:
    """Create the directory to use with mode 0700 unless it exists, and return it.

    Raises:
        UnusableCacheError: it cannot be created or written, or belongs to another user.
        StartupError: the path is a symbolic link, or not a directory.
    """
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = locate_cache_dir(directory)  # NFS may have made another user the owner
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = own.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise StartupError(f"the cache directory {own} is a symbolic link {_HINT}")
        probe = own / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        fd = open_regular(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        owner = os.fstat(fd).st_uid  # on NFS with root_squash what root creates is not root's
        os.close(fd)
        probe.unlink()
        if status.st_uid != owner:
            raise UnusableCacheError(
                f"the cache directory {own} belongs to another user (uid {status.st_uid}) {_HINT}"
            )
        if status.st_mode & 0o022:
            own.chmod(0o700)  # the parent directory has a default ACL
    except (NotADirectoryError, FileExistsError):
        raise StartupError(f"the cache directory {own} is not a directory {_HINT}") from None
    except OSError as error:
        raise UnusableCacheError(
            f"the cache directory {own} cannot be written: {error.strerror} {_HINT}"
        ) from None
    return own


def can_lock_files(directory: Path) -> bool:
    """Return whether open file description locks are reliable in a directory.

    They are the locks of fcntl(2). On FUSE and virtiofs the kernel may forward each lock, but not
    the close of the description. A lock would outlive its process, and the blocks under it would
    never be evicted. Other systems than Linux have no such locks.

    Without locks, processes may download a block twice, and evict one that another process uses,
    which then downloads it again.
    """
    if not operating_system.HAS_BYTE_LOCKS:
        return False
    fstype = file_system_of(directory)
    return fstype != "virtiofs" and not fstype.startswith("fuse")


def file_system_of(path: Path) -> str:
    """Return the file system type of `path`, or of its nearest parent; "" if it is unknown."""
    return operating_system.file_system_type(os.stat(_nearest(path)).st_dev)


def _fallback() -> Path:
    return Path(f"/var/tmp/tinkerfs-{os.getuid()}")  # noqa: S108  (checked when prepared)


def _may_be_written(directory: Path) -> bool:
    return os.access(_nearest(directory), os.W_OK | os.X_OK)


def _nearest(path: Path) -> Path:
    """Return the path itself, or its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
