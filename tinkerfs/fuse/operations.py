"""The file system as the operations that libfuse calls; nothing is decided here.

Those of looking and reading are called through `callbacks`, by handle or path; the others as the
bindings call them. Both bindings find operations by their name: a method that is misspelt is never
called, without a word (`tests/unit/fuse/test_operations.py` compares the names with the
bindings' own). xattr operations stand apart: where they exist, `ls -l` of 10,000 makes 30,000 calls
of them. There is no flush: the kernel then never sends one, and an error of it would be lost in
most programs.

Thread-safe: libfuse calls from many threads at once.
"""

import functools
import itertools
import logging
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.context import Caller, RequestContext, Validity
from tinkerfs.fuse.callers import Callers
from tinkerfs.fuse.stat_callers import StatCallers
from tinkerfs.vfs.node import DOT_ENTRY_COUNT, Attr, Entry, Handle, dot_entries

if TYPE_CHECKING:
    from tinkerfs.vfs.directory_cache import CachedDirectory
    from tinkerfs.vfs.directory_stream import DirectoryStream
    from tinkerfs.vfs.filesystem import FileSystem

log = logging.getLogger(__name__)

#: A name that is looked up holds up the other new names of its directory (the kernel's rule).
LOOKUP_TIMEOUT_S: Final = 5.0
#: So does a name that is removed.
REMOVAL_TIMEOUT_S: Final = 10.0
#: So may a listing that is being read, once its first part has come.
PAGE_TIMEOUT_S: Final = 10.0

#: So many entries are handed out at a time at the most; one reply takes some 20 to 1,000.
_MOST_ENTRIES: Final = 256

#: The kernel keeps attributes for 1 s (`binding.mount_options`); and a little for its clock.
_FORGOTTEN_S: Final = 1.05
#: That second begins when the process that asked takes the answer: so much later at most, on a busy
#: machine, and before it opens what it asked about.
_REPLY_DELAY_S: Final = 1.0

_BLOCK_BYTES: Final = 4096
_NAME_MAX: Final = 255

P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self", bound="Operations")


class RequestInfo(Protocol):
    """What a binding tells of the request that this thread serves."""

    def interrupted(self) -> bool:
        """Tell whether its caller was interrupted."""
        ...

    def context(self) -> tuple[int, int, int]:
        """Return (uid, gid, pid) of its caller."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Return what is entered while it waits, so that others are served meanwhile."""
        ...


class OpenFile(NamedTuple):
    """A file that was opened, and what libfuse is told of that."""

    path: str
    handle: Handle
    direct_io: bool
    keep_cache: bool


class OpenDirectory(NamedTuple):
    """A folder that was opened: what comes of it, and how many changes there had been."""

    path: str
    scan: "DirectoryStream"
    changes: int


def _operation(
    method: Callable[Concatenate[Self, P], R],
) -> Callable[Concatenate[Self, P], R]:
    """Log an operation in one line, and let out nothing but an OSError with an errno.

    A decorator on each method: mfusepy calls the methods, not `Operations.__call__`.
    """
    name = method.__name__

    @functools.wraps(method)
    def wrapped(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        path = args[0]
        try:
            result = method(self, *args, **kwargs)
        except OSError as error:
            if not error.errno:
                log.exception("%s %s: an error without an errno", name, path)
                raise errors.internal_error(error, str(path)) from error
            log.debug("%s %s: %s", name, path, errors.errno_name(error))
            if errors.is_interruption(error) and self.is_stopping:
                # To EINTR without a signal, cat and Python answer with the same read again.
                raise errors.disconnected(str(path)) from error
            raise
        except Exception as error:
            log.exception("%s %s failed", name, path)
            raise errors.internal_error(error, str(path)) from error
        if self.is_debug_logging:
            log.debug("%s %s", name, path)
        return result

    return wrapped


class Operations:
    """FUSE operations over a `FileSystem`, for `callbacks` and a binding with `raw_fi=True`.

    Args:
        filesystem: what is served.
        requests: the binding, for who asks and whether they still wait.
        timeout_s: bound on every wait that has no bound of its own.
        lookup_timeout_s: bound on the wait for a name, where no row of the table has its own.
        stopping: set when the mount goes down: whoever waits then gets ENOTCONN.
        ready: called once the kernel has been answered for the first time.
    """

    use_ns = True
    #: Without it, libfuse 2 answers ENOENT itself to reads of an open file that was unlinked.
    flag_nullpath_ok = 1

    def __init__(
        self,
        filesystem: "FileSystem",
        requests: RequestInfo,
        *,
        timeout_s: float,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        stopping: threading.Event,
        ready: Callable[[], None],
    ) -> None:
        self._filesystem = filesystem
        self._requests = requests
        self._stopping = stopping
        self._ready = ready
        #: Whether each operation is logged: asked once, and not at each of them.
        self.is_debug_logging = log.isEnabledFor(logging.DEBUG)
        # What a call says of its caller is asked for in the thread that serves it, where somebody
        # wants to know: so one of each kind does for all.
        self._open_ctx = RequestContext(
            None, self._interrupted, self._caller, blocking=requests.waiting
        )
        self._lookup = self._open_ctx.with_timeout(lookup_timeout_s)
        self._removal = self._open_ctx.with_timeout(REMOVAL_TIMEOUT_S)
        self._wait = self._open_ctx.with_timeout(timeout_s)
        self._listing = replace(self._wait, page_timeout_s=PAGE_TIMEOUT_S)
        self._numbers = itertools.count(1)
        # Single operations on a dict are atomic, and a number is used by one file alone.
        self._files: dict[int, OpenFile] = {}
        self._folders: dict[int, OpenDirectory] = {}
        self._lookers = StatCallers()
        self._callers = Callers()

    @property
    def is_stopping(self) -> bool:
        """Whether the mount is going down."""
        return self._stopping.is_set()

    def _interrupted(self) -> bool:
        return self._stopping.is_set() or self._requests.interrupted()

    def _caller(self) -> Caller:
        uid, _gid, pid = self._requests.context()
        return self._callers.get(pid, uid)

    def _file(self, fh: int) -> OpenFile:
        try:
            return self._files[fh]
        except KeyError:
            raise errors.bad_handle("", "no such open file") from None

    # The mount itself

    def init(self, _path: str) -> None:
        """Take note that the kernel's first request has come: the mount answers."""
        self._ready()

    @_operation
    def statfs(self, _path: str) -> dict[str, int]:
        """Answer df."""
        space = self._filesystem.statfs()
        free = space.free_bytes // _BLOCK_BYTES
        return {
            "f_bsize": _BLOCK_BYTES,
            "f_frsize": _BLOCK_BYTES,
            "f_blocks": space.total_bytes // _BLOCK_BYTES,
            "f_bfree": free,
            "f_bavail": free,
            "f_namemax": _NAME_MAX,
        }

    # Names and attributes

    @property
    def epoch(self) -> int:
        """As `FileSystem.epoch`."""
        return self._filesystem.epoch

    def holds(self, lease: Validity, epoch: int) -> bool:
        """As `FileSystem.holds`; never where each operation is to be logged."""
        return not self.is_debug_logging and self._filesystem.is_valid(lease, epoch)

    @_operation
    def getattr(
        self, path: str | None, fh: int | None = None, lease: Validity | None = None
    ) -> Attr:
        """Answer stat and fstat; the latter with the exact size of what was opened.

        A lease is told how long the answer holds, of a path without a handle.
        """
        # A file that was unlinked while it was open comes without a path: its handle knows.
        file = None if fh is None else self._files.get(fh)
        if file is not None:
            return self._filesystem.fstat(file.path, file.handle, self._lookup)
        ctx = self._lookup if lease is None else self._lookup.tracking(lease)
        attr = self._filesystem.stat(_require_path(path), ctx)
        if not stat.S_ISDIR(attr.mode):
            self.note_file_stat()
        return attr

    def note_file_stat(self) -> None:
        """Take note that who asks now asks for attributes of a file, as `ls -l` does."""
        self._lookers.add(self._requests.context()[2])

    def wants_attributes(self) -> bool:
        """Tell whether who asks now has asked for attributes of a file before."""
        return self._requests.context()[2] in self._lookers

    @_operation
    def readlink(self, path: str) -> str:
        """Answer readlink."""
        return self._filesystem.readlink(path, self._lookup)

    def on_readlink(self, path: str) -> None:
        """Record that a link is read without `readlink`."""
        self._filesystem.guard.on_readlink(path, self._caller)

    def on_open(self, path: str) -> None:
        """Record that a file is opened to be read without `open`."""
        self._filesystem.guard.on_open(path, 0, self._caller)

    def known(self, path: str) -> "CachedDirectory | None":
        """As `FileSystem.known`; never where each operation is to be logged."""
        return None if self.is_debug_logging else self._filesystem.cached_directory(path)

    @_operation
    def opendir(self, path: str) -> int:
        """Fetch the listing, or its beginning: here, where a wait holds up nobody else."""
        changes = self._filesystem.local_mutations
        scan = self._filesystem.scandir(path, self._listing)
        number = next(self._numbers)
        self._folders[number] = OpenDirectory(path, scan, changes)
        return number

    def open_directory(self, fh: int) -> OpenDirectory:
        """Return an open folder.

        Raises:
            OSError: EBADF, there is none.
        """
        try:
            return self._folders[fh]
        except KeyError:
            raise errors.bad_handle("", "no such open folder") from None

    @_operation
    def readdir(self, fh: int, index: int) -> Sequence[Entry]:
        """Return entries of an open folder from `index` on; none only at its end."""
        folder = self.open_directory(fh)
        entries = folder.scan.read(max(index - DOT_ENTRY_COUNT, 0), _MOST_ENTRIES)
        return (*dot_entries(folder.path)[index:], *entries) if index < DOT_ENTRY_COUNT else entries

    def is_unmodified(self, folder: OpenDirectory) -> bool:
        """Tell whether nothing was changed through this mount since a folder was opened."""
        return folder.changes == self._filesystem.local_mutations

    @_operation
    def releasedir(self, fh: int) -> None:
        """Forget a listing."""
        self._folders.pop(fh, None)

    @_operation
    def fsyncdir(self, _path: str | None, _datasync: int, _fh: int) -> int:
        """Do nothing, well: every change was made when it was asked for."""
        return 0

    # Files

    @_operation
    def open(self, path: str, flags: int, lease: Validity | None = None) -> OpenFile:
        """Open; the file system itself bounds the wait, longer where an archive is built.

        A lease is told how long the same may be handed to whoever opens it to read.
        """
        asked_at = time.monotonic()
        ctx = self._open_ctx if lease is None else self._open_ctx.tracking(lease)
        handle = self._filesystem.open(path, flags, ctx)
        try:
            _wait_for_attr_expiry(handle, asked_at, self._open_ctx)
        except OSError:
            handle.close()
            raise
        return OpenFile(path, handle, handle.direct_io, handle.keep_cache)

    def register_handle(self, file: OpenFile) -> int:
        """Return a number for an open file, good until `release`."""
        number = next(self._numbers)
        self._files[number] = file
        return number

    @_operation
    def read(self, fh: int, buffer: memoryview, offset: int) -> int:
        """Read positionally: requests come from several threads and out of order."""
        return self._file(fh).handle.read_into(buffer, offset, self._wait)

    @_operation
    def write(self, _path: str | None, data: bytes, _offset: int, fi: Any) -> int:
        """Hand over one whole value. `>>` writes at the old size, so the offset says nothing."""
        return self._file(fi.fh).handle.write(data, self._wait)

    @_operation
    def truncate(self, path: str | None, length: int, fi: Any = None) -> int:
        """Truncate by path or by handle."""
        if fi is not None and fi.fh in self._files:
            path = self._files[fi.fh].path
        self._filesystem.truncate(_require_path(path), length, self._wait)
        return 0

    @_operation
    def fsync(self, _path: str | None, _datasync: int, _fi: Any) -> int:
        """Do nothing, well: every change was made when it was written."""
        return 0

    @_operation
    def release(self, fh: int) -> None:
        """Forget an open file."""
        file = self._files.pop(fh, None)
        if file is not None:
            file.handle.close()

    # Changes

    @_operation
    def unlink(self, path: str) -> int:
        """Remove a file."""
        self._filesystem.unlink(path, self._removal)
        return 0

    @_operation
    def rmdir(self, path: str) -> int:
        """Remove a folder."""
        self._filesystem.rmdir(path, self._removal)
        return 0

    def _set_attributes(self, path: str | None) -> int:
        self._filesystem.setattr(_require_path(path), self._lookup)
        return 0

    @_operation
    def chmod(self, path: str | None, _mode: int) -> int:
        """Change no mode: succeeds where that may be said."""
        return self._set_attributes(path)

    @_operation
    def chown(self, path: str | None, _uid: int, _gid: int) -> int:
        """Change no owner: succeeds where that may be said."""
        return self._set_attributes(path)

    @_operation
    def utimens(self, path: str | None, _times: tuple[int, int] | None = None) -> int:
        """Change no time: succeeds where that may be said."""
        return self._set_attributes(path)

    def _create(self, path: str) -> int:
        self._filesystem.create(path, self._lookup)
        return 0

    @_operation
    def create(self, path: str, _mode: int, _fi: Any = None) -> int:
        """Refuse a new file."""
        return self._create(path)

    @_operation
    def mknod(self, path: str, _mode: int, _dev: int) -> int:
        """Refuse a new node."""
        return self._create(path)

    @_operation
    def mkdir(self, path: str, _mode: int) -> int:
        """Refuse a new folder."""
        return self._create(path)

    @_operation
    def symlink(self, path: str, _target: str) -> int:
        """Refuse a new symbolic link."""
        return self._create(path)

    @_operation
    def link(self, path: str, _existing: str) -> int:
        """Refuse a new hard link."""
        return self._create(path)

    @_operation
    def rename(self, old: str, _new: str) -> int:
        """Refuse another name."""
        return self._create(old)


class XattrOperations(Operations):
    """The operations and those of extended attributes."""

    @_operation
    def getxattr(self, path: str, name: str, _position: int = 0) -> bytes:
        """Answer getxattr."""
        return self._filesystem.getxattr(path, name, self._lookup)

    @_operation
    def listxattr(self, path: str) -> list[str]:
        """Answer listxattr."""
        return self._filesystem.listxattr(path, self._lookup)

    @_operation
    def setxattr(
        self, path: str, name: str, _value: bytes, _options: int, _position: int = 0
    ) -> int:
        """Refuse to set an attribute."""
        self._filesystem.setxattr(path, name)
        return 0

    @_operation
    def removexattr(self, path: str, name: str) -> int:
        """Refuse to remove an attribute."""
        self._filesystem.setxattr(path, name)
        return 0


def _wait_for_attr_expiry(handle: Handle, asked_at: float, ctx: RequestContext) -> None:
    """Return once the kernel has forgotten a size that was a mere bound.

    So the next fstat asks again, and cp, tar, rsync and the like copy every byte and no more. The
    kernel's second begins when a process takes its answer, which may be late: of 40 tars at once on
    2 busy cores two were, by 0.05 s.
    """
    if handle.size_hint_reported_at is not None:
        # While this open waited another process may have been told a bound.
        taken_at = min(
            handle.size_hint_reported_at + _REPLY_DELAY_S,
            max(handle.size_hint_reported_at, asked_at),
        )
        ctx.sleep(taken_at + _FORGOTTEN_S - time.monotonic())


def _require_path(path: str | None) -> str:
    """Return the path, or say ENOENT where its file has been unlinked."""
    if path is None:
        raise errors.not_found("")
    return path
