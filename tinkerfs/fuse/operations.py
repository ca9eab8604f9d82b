"""FUSE operations: translate libfuse's requests into `FileSystem` calls.

The C callbacks of `callbacks` call the operations, with decoded arguments.

The xattr operations are in a subclass: while they exist, `ls -l` sends three requests per entry.
There is no `flush`: without it the kernel sends no FLUSH, and most programs ignore its errors.

Thread-safe: libfuse calls from several threads at once.
"""

import functools
import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.access_log import ACCESS_LOG_PATH
from tinkerfs.context import Caller, RequestContext
from tinkerfs.fuse.callers import Callers
from tinkerfs.fuse.passthrough import Passthrough
from tinkerfs.fuse.stat_callers import StatCallers
from tinkerfs.fuse.worker_pool import SessionWorkers
from tinkerfs.operation_log import ActiveOperation, OperationLog
from tinkerfs.validity import Validity
from tinkerfs.vfs.kernel_cache import ATTR_EXPIRY_S, REPLY_DELAY_S
from tinkerfs.vfs.node import DOT_ENTRY_COUNT, Attr, Entry, Handle, dot_entries

if TYPE_CHECKING:
    from tinkerfs.vfs.directory_cache import CachedDirectory
    from tinkerfs.vfs.directory_stream import DirectoryStream
    from tinkerfs.vfs.filesystem import FileSystem

log = logging.getLogger(__name__)

#: Deadline of a lookup: the kernel blocks other lookups in the same directory meanwhile.
LOOKUP_TIMEOUT_S: Final = 5.0
#: Deadline of a removal, which blocks the directory too.
REMOVAL_TIMEOUT_S: Final = 10.0
#: Deadline of each further page of a listing, once its first page has arrived.
PAGE_TIMEOUT_S: Final = 10.0

#: Maximum number of entries per `readdir` call; one reply of libfuse holds 20 to 1,000 entries.
_MAX_ENTRIES: Final = 256

#: A read of the access log counts as a wait if it takes longer.
_WAIT_S: Final = 0.01

_BLOCK_BYTES: Final = 4096
_NAME_MAX: Final = 255

P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self", bound="Operations")


def _operation(
    method: Callable[Concatenate[Self, P], R],
) -> Callable[Concatenate[Self, P], R]:
    """Record a FUSE operation, and raise only `OSError`s that have an errno."""
    return _named_operation(method.__name__, method)


def _named_operation(
    name: str, method: Callable[Concatenate[Self, P], R]
) -> Callable[Concatenate[Self, P], R]:
    """Wrap a method as `_operation` does; `name` is that of the FUSE operation."""
    is_read, is_write = name == "read", name == "write"

    @functools.wraps(method)
    def wrapped(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        operation_log = self.operation_log
        active = self._begin(name, args) if operation_log.is_observed else None
        started, number, result = perf_counter(), 0, None
        try:
            result = method(self, *args, **kwargs)
            return result
        except Exception as error:
            failure = self._failure(error, name, args[0])
            number = failure.errno or 0
            if failure is error:
                raise
            raise failure from error
        finally:
            read_bytes = result if is_read and isinstance(result, int) else 0
            written_bytes = result if is_write and isinstance(result, int) else 0
            duration_s = perf_counter() - started
            # A read of the access log waits for the operations of others.
            is_wait = is_read and duration_s > _WAIT_S and self._path_of(args) == ACCESS_LOG_PATH
            if not is_wait:
                operation_log.counts.record(
                    name,
                    duration_s,
                    number,
                    read_bytes=read_bytes,
                    written_bytes=written_bytes,
                )
            if active is not None:
                operation_log.end(
                    active,
                    number,
                    offset=args[-1] if is_read and isinstance(args[-1], int) else 0,
                    read_bytes=read_bytes,
                    written_bytes=written_bytes,
                )

    return wrapped


class OpenDirectory(NamedTuple):
    """An open directory.

    Attributes:
        mutation_count: `FileSystem.local_mutation_count` when the directory was opened.
    """

    path: str
    stream: "DirectoryStream"
    mutation_count: int


class Operations:
    """FUSE operations over a `FileSystem`.

    Args:
        workers: the threads that serve the requests.
        passthrough: lets the kernel read cached files.
        timeout_s: deadline of every operation without a deadline of its own.
        lookup_timeout_s: deadline of a lookup; one that needs an archive waits for it.
        stopping: set when the mount is going down; blocked requests then fail with ENOTCONN.
        ready: called when the kernel's first request has arrived.
        operation_log: receives the record of each operation while it has subscribers.
    """

    def __init__(
        self,
        filesystem: "FileSystem",
        workers: SessionWorkers,
        passthrough: Passthrough,
        *,
        timeout_s: float,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
        stopping: threading.Event,
        ready: Callable[[], None],
        operation_log: OperationLog,
    ) -> None:
        self._filesystem = filesystem
        self._workers = workers
        self.passthrough = passthrough
        self._stopping = stopping
        self._ready = ready
        self.operation_log = operation_log
        # All requests share these contexts: the caller is determined on demand, in the thread that
        # serves the request.
        self._open_ctx = RequestContext(
            None, self._is_cancelled, self._caller, blocking=workers.blocking
        )
        self._lookup_ctx = self._open_ctx.with_timeout(lookup_timeout_s)
        self._removal_ctx = self._open_ctx.with_timeout(REMOVAL_TIMEOUT_S)
        self._io_ctx = self._open_ctx.with_timeout(timeout_s)
        self._listing_ctx = replace(self._io_ctx, page_timeout_s=PAGE_TIMEOUT_S)
        self._numbers = itertools.count(1)
        # Single operations on a dict are atomic, and each number belongs to one file.
        self._files: dict[int, Handle] = {}
        self._directories: dict[int, OpenDirectory] = {}
        self._stat_callers = StatCallers()
        self._callers = Callers()

    @property
    def is_stopping(self) -> bool:
        """Whether the mount is going down."""
        return self._stopping.is_set()

    def _is_cancelled(self) -> bool:
        return self._stopping.is_set() or self._workers.is_interrupted()

    def _caller(self) -> Caller:
        uid, _gid, pid = self._workers.context()
        return self._callers.get(pid, uid)

    def _file(self, fh: int) -> Handle:
        try:
            return self._files[fh]
        except KeyError:
            raise errors.bad_handle("", "no such open file") from None

    def _begin(self, name: str, args: tuple[object, ...]) -> ActiveOperation:
        """Begin the record of an operation, before its handle may be closed."""
        return self.operation_log.begin(name, self._path_of(args), self._caller())

    def _path_of(self, args: tuple[object, ...]) -> str:
        """Return the path for the arguments of an operation; empty for an unknown handle."""
        path = args[0]
        if not isinstance(path, str):
            # A handle number, or None instead of an unlinked file's path, and the number is last.
            ints = [arg for arg in args if isinstance(arg, int)]
            fh = ints[0 if path is not None else -1] if ints else 0
            file = self._files.get(fh) or self._directories.get(fh)
            return "" if file is None else file.path
        return path

    def _failure(self, error: Exception, name: str, subject: object) -> OSError:
        """Return the error for the caller of an operation, `error` itself if it has an errno."""
        if not isinstance(error, OSError):
            log.error("%s %s failed", name, subject, exc_info=error)
            return errors.internal_error(error, str(subject))
        if not error.errno:
            log.error("%s %s: an error without an errno", name, subject, exc_info=error)
            return errors.internal_error(error, str(subject))
        if errors.is_interruption(error) and self.is_stopping:
            # cat and Python repeat a read that failed with EINTR if no signal arrived.
            return errors.disconnected(str(subject))
        return error

    # The mount itself

    def init(self) -> None:
        """Report that the kernel's first request has arrived, so that the mount is ready."""
        self._ready()

    @_operation
    def statfs(self, _path: str) -> dict[str, int]:
        """Return the fields of `struct statvfs`, which df shows."""
        statfs = self._filesystem.statfs()
        free = statfs.free_bytes // _BLOCK_BYTES
        return {
            "f_bsize": _BLOCK_BYTES,
            "f_frsize": _BLOCK_BYTES,
            "f_blocks": statfs.total_bytes // _BLOCK_BYTES,
            "f_bfree": free,
            "f_bavail": free,
            "f_namemax": _NAME_MAX,
        }

    # Names and attributes

    @property
    def generation(self) -> int:
        """Return `FileSystem.generation`."""
        return self._filesystem.generation

    def check_and_touch(self, validity: Validity, generation: int) -> bool:
        """Call `FileSystem.check_and_touch`; return False while operations are observed."""
        return not self.operation_log.is_observed and self._filesystem.check_and_touch(
            validity, generation
        )

    @_operation
    def getattr(
        self, path: str | None, fh: int | None = None, validity: Validity | None = None
    ) -> Attr:
        """Return the attributes of a path, or of an open file with its exact size.

        Without a handle, the attributes' dependencies are added to `validity`.
        """
        # The kernel sends no path for an open file that was unlinked: the handle has it.
        file = None if fh is None else self._files.get(fh)
        if file is not None:
            return self._filesystem.fstat(file, self._lookup_ctx)
        ctx = self._lookup_ctx if validity is None else self._lookup_ctx.tracking(validity)
        attr = self._filesystem.stat(_require_path(path), ctx)
        if not stat.S_ISDIR(attr.mode):
            self.note_file_stat()
        return attr

    def note_file_stat(self) -> None:
        """Record that the current caller has called stat() on a file, as `ls -l` does."""
        self._stat_callers.add(self._workers.context()[2])

    def wants_attributes(self) -> bool:
        """Return whether the current caller has recently called stat() on a file."""
        return self._workers.context()[2] in self._stat_callers

    @_operation
    def readlink(self, path: str) -> str:
        """Return the target of a symbolic link."""
        return self._filesystem.readlink(path, self._lookup_ctx)

    def on_readlink(self, path: str) -> None:
        """Report a readlink that was served from a cache to the deletion guard."""
        self._filesystem.guard.on_readlink(path, self._caller)

    def cached_directory(self, path: str) -> "CachedDirectory | None":
        """Return `FileSystem.cached_directory`; None while operations are observed."""
        return None if self.operation_log.is_observed else self._filesystem.cached_directory(path)

    @_operation
    def opendir(self, path: str) -> int:
        """Open a directory and fetch its first page; return a handle number.

        The kernel locks the directory for READDIR and not for OPENDIR, so the wait belongs here.
        """
        mutation_count = self._filesystem.local_mutation_count
        stream = self._filesystem.scandir(path, self._listing_ctx)
        number = next(self._numbers)
        self._directories[number] = OpenDirectory(path, stream, mutation_count)
        return number

    def open_directory(self, fh: int) -> OpenDirectory:
        """Return an open directory by its handle number.

        Raises:
            OSError: EBADF, if the handle is not open.
        """
        try:
            return self._directories[fh]
        except KeyError:
            raise errors.bad_handle("", "no such open directory") from None

    @_operation
    def readdir(self, fh: int, index: int) -> Sequence[Entry]:
        """Return entries of an open directory from `index` on; empty only at its end."""
        directory = self.open_directory(fh)
        entries = directory.stream.read(max(index - DOT_ENTRY_COUNT, 0), _MAX_ENTRIES)
        if index < DOT_ENTRY_COUNT:
            return (*dot_entries(directory.path)[index:], *entries)
        return entries

    def is_unmodified(self, directory: OpenDirectory) -> bool:
        """Return whether nothing was changed through this mount since the directory was opened."""
        return directory.mutation_count == self._filesystem.local_mutation_count

    @_operation
    def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._directories.pop(fh, None)

    # Files

    @_operation
    def open(self, path: str, flags: int) -> Handle:
        """Open a file; the deadline is that of the file system, and longer for an archive build."""
        started = time.monotonic()
        handle = self._filesystem.open(path, flags, self._open_ctx)
        try:
            _wait_for_attr_expiry(handle, started, self._open_ctx)
        except OSError:
            handle.close()
            raise
        return handle

    def register_handle(self, handle: Handle) -> int:
        """Return a number for the handle of an open file, valid until `release`."""
        number = next(self._numbers)
        self._files[number] = handle
        return number

    def back(self, fh: int, handle: Handle) -> int:
        """Return the backing file of an open file for the kernel to read; 0 if there is none."""
        assert handle.backing_fd is not None
        fd = handle.backing_fd(self._io_ctx) if self.passthrough.is_on else None
        try:
            return self.passthrough.open(fh, handle.path, fd, direct_io=handle.direct_io)
        finally:
            if fd is not None:
                os.close(fd)

    @_operation
    def read(self, fh: int, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from `offset` on; return the number of bytes read."""
        return self._file(fh).read_into(buffer, offset, self._io_ctx)

    @_operation
    def write(self, _path: str | None, data: bytes, fh: int) -> int:
        """Write one whole value. There is no offset, because `>>` writes at the old size."""
        return self._file(fh).write(data, self._io_ctx)

    @_operation
    def truncate(self, path: str | None, length: int, fh: int | None = None) -> None:
        """Truncate by path or by handle."""
        file = None if fh is None else self._files.get(fh)
        if file is not None:
            path = file.path
        self._filesystem.truncate(_require_path(path), length, self._io_ctx)

    @_operation
    def release(self, fh: int) -> None:
        """Close an open file."""
        file = self._files.pop(fh, None)
        if file is not None:
            try:
                if file.backing_fd is not None:
                    self.passthrough.close(fh)
            finally:
                file.close()

    # Changes

    @_operation
    def unlink(self, path: str) -> None:
        """Remove a file."""
        self._filesystem.unlink(path, self._removal_ctx)

    @_operation
    def rmdir(self, path: str) -> None:
        """Remove a directory."""
        self._filesystem.rmdir(path, self._removal_ctx)

    def _refuse_creation(self, path: str) -> None:
        """Refuse to add a name to a directory, or to rename the one that is there."""
        self._filesystem.create(path, self._lookup_ctx)

    create = _named_operation("create", _refuse_creation)
    mknod = _named_operation("mknod", _refuse_creation)
    mkdir = _named_operation("mkdir", _refuse_creation)
    symlink = _named_operation("symlink", _refuse_creation)
    link = _named_operation("link", _refuse_creation)
    rename = _named_operation("rename", _refuse_creation)

    def _set_attributes(self, path: str | None) -> None:
        """Change nothing; succeed on a control, and fail on any other file."""
        self._filesystem.setattr(_require_path(path), self._lookup_ctx)

    chmod = _named_operation("chmod", _set_attributes)
    chown = _named_operation("chown", _set_attributes)
    utimens = _named_operation("utimens", _set_attributes)

    def _succeed(self, _path: str | None) -> None:
        """Do nothing: every change is synchronous."""

    fsync = _named_operation("fsync", _succeed)
    fsyncdir = _named_operation("fsyncdir", _succeed)


class XattrOperations(Operations):
    """The operations, including those of extended attributes."""

    @_operation
    def getxattr(self, path: str, name: str) -> bytes:
        """Return the value of an extended attribute."""
        return self._filesystem.getxattr(path, name, self._lookup_ctx)

    @_operation
    def listxattr(self, path: str) -> list[str]:
        """Return the names of the extended attributes of a path."""
        return self._filesystem.listxattr(path, self._lookup_ctx)

    def _refuse_xattr_change(self, path: str, name: str) -> None:
        self._filesystem.setxattr(path, name)

    setxattr = _named_operation("setxattr", _refuse_xattr_change)
    removexattr = _named_operation("removexattr", _refuse_xattr_change)


def _wait_for_attr_expiry(handle: Handle, started: float, ctx: RequestContext) -> None:
    """Return when the kernel has dropped a size that was only an upper bound.

    Then the next fstat reaches this process, and cp, tar and rsync copy the exact number of bytes.
    The lifetime in the kernel starts when the caller receives the reply, which may be late.
    """
    reported_at = handle.size_hint_reported_at
    if reported_at is not None:
        # Another process may have received a bound while this open was waiting.
        received_at = min(reported_at + REPLY_DELAY_S, max(reported_at, started))
        ctx.sleep(received_at + ATTR_EXPIRY_S - time.monotonic())


def _require_path(path: str | None) -> str:
    """Return the path; raise ENOENT for None, which means that the file was unlinked."""
    if path is None:
        raise errors.not_found("")
    return path
