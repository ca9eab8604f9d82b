"""Handles of open files: generated files, controls, journals and weights."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Final, NoReturn

import msgspec
from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.journal import Journal
from tinkerfs.vfs.kernel_cache import PageCacheTracker
from tinkerfs.weights.file import WeightsFile

#: Maximum size of a file of weights that is verified while it is opened.
_MAX_VERIFIED_AT_OPEN_BYTES: Final = 1 << 30


class GeneratedFileHandle(msgspec.Struct, frozen=True):
    """A generated file that is open for reading. Immutable: opens of one content may share it.

    Attributes:
        path: as `Handle.path`.
        data: the content.
        direct_io: as `Handle.direct_io`. The content changes without the kernel's knowledge, and
            stat() may have reported an upper bound as the size.
        size_hint_reported_at: as `Handle.size_hint_reported_at`.
    """

    path: str
    data: bytes
    direct_io: bool
    size_hint_reported_at: float | None = None

    #: Pages that another handle has cached may belong to another version.
    keep_cache: ClassVar[bool] = False
    backing_fd: ClassVar[None] = None

    @property
    def size_bytes(self) -> int:
        """The length."""
        return len(self.data)

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        del ctx
        return self.data[offset : offset + size]

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return their number."""
        del ctx
        data = self.data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Raise EBADF."""
        del data, ctx
        raise errors.bad_handle(self.path, "not opened for writing")

    def close(self) -> None:
        """Do nothing: the handle owns only memory."""


class ControlHandle:
    """A control file that is open for writing; a write acts immediately. Thread-safe.

    Args:
        path: as `Handle.path`.
        data: the content; None if the file was not opened for reading.
        render: returns the content after a write.
        on_write: acts on a written value.
    """

    __slots__ = ("_data", "_on_write", "_render", "path")

    #: A write changes the content without the kernel's knowledge.
    direct_io = True
    keep_cache = False
    size_hint_reported_at = None
    backing_fd = None

    def __init__(
        self,
        path: str,
        data: bytes | None,
        render: Callable[[RequestContext], bytes],
        on_write: Callable[[str, RequestContext], None],
    ) -> None:
        self.path = path
        self._data = data
        self._render = render
        self._on_write = on_write

    @property
    def size_bytes(self) -> int | None:
        """The length; None until the content has been read."""
        return None if self._data is None else len(self._data)

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size), rendered again after a write."""
        data = self._data
        if data is None:
            data = self._data = self._render(ctx)
        return data[offset : offset + size]

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return their number."""
        data = self.read(len(buffer), offset, ctx)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Act on one whole value; the offset of the write does not matter."""
        self._on_write(data.decode("utf-8", "replace"), ctx)
        self._data = None
        return len(data)

    def close(self) -> None:
        """Do nothing: the handle owns only memory."""


class JournalHandle:
    """An open journal; reads include lines added after open(). Thread-safe.

    Args:
        path: as `Handle.path`.
        journal: opened here, and closed by `close`.
        waits: whether a read at the end waits for the next line, as a read of a pipe does.
    """

    #: The file grows without the kernel's knowledge.
    direct_io = True
    keep_cache = False
    size_hint_reported_at = None
    backing_fd = None

    def __init__(self, path: str, journal: Journal[Any], *, waits: bool) -> None:
        self.path = path
        self._journal = journal
        self._waits = waits
        self._lock = threading.Lock()
        # All guarded by _lock.
        #: What to add to an offset in the file for a position in the journal.
        self._shift = 0
        #: Number of lines before the last position, and whether it was the start of a line.
        self._lines = 0
        self._is_line_start = True
        journal.open()

    @property
    def size_bytes(self) -> int:
        """The current length."""
        return self._journal.size_bytes

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the current bytes of [offset, offset + size).

        In place of lines that were dropped before they were read, it returns their number.
        """
        data = self._read(size, offset)
        while self._waits and not data and size:
            with self._lock:
                position = offset + self._shift
            replace(ctx, timeout_s=None).wait_for(self._journal.growth(position))
            data = self._read(size, offset)
        return data

    def _read(self, size: int, offset: int) -> bytes:
        with self._lock:
            position = offset + self._shift
            data, first, dropped_lines = self._journal.read(size, position)
            if first > position:
                missed = max(dropped_lines - self._lines, 1)
                end = "" if self._is_line_start else "\n"
                data = f"{end}# {missed} lines dropped\n".encode()[:size]
                self._shift, self._lines = first - offset - len(data), dropped_lines
                self._is_line_start = True
            elif data:
                self._lines += data.count(b"\n")
                self._is_line_start = data.endswith(b"\n")
            return data

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return their number."""
        data = self.read(len(buffer), offset, ctx)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Raise EBADF."""
        del data, ctx
        raise errors.bad_handle(self.path, "not opened for writing")

    def close(self) -> None:
        """Release the journal, which then drops its oldest lines."""
        self._journal.close()


class WeightsHandle:
    """An open file of weights. Thread-safe.

    Args:
        path: as `Handle.path`.
        file: owned by the handle, which closes it.
        raise_os_error: records the failure of a read and raises it as an OSError.
        page_cache: notified of the open and the close.
        size_hint_reported_at: as `Handle.size_hint_reported_at`.
    """

    def __init__(
        self,
        path: str,
        file: WeightsFile,
        raise_os_error: Callable[[errors.ApiError | OSError], NoReturn],
        *,
        page_cache: PageCacheTracker,
        size_hint_reported_at: float | None,
    ) -> None:
        self.path = path
        self._file = file
        self._raise_os_error = raise_os_error
        self._page_cache = page_cache
        self.keep_cache, self._may_be_cached = page_cache.on_open(path, file.key)
        self.size_hint_reported_at = size_hint_reported_at

    @property
    def direct_io(self) -> bool:
        """Whether the kernel may have a wrong size, or must not cache pages."""
        return self.size_hint_reported_at is not None or not self._may_be_cached

    def backing_fd(self, ctx: RequestContext) -> int | None:
        """Return a new descriptor of the cached file, if it is whole and intact."""
        return self._file.backing_fd(ctx, _MAX_VERIFIED_AT_OPEN_BYTES)

    @property
    def size_bytes(self) -> int:
        """The exact length."""
        return self._file.size_bytes

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        try:
            return self._file.read(size, offset, ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error)

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return their number."""
        try:
            return self._file.read_into(buffer, offset, ctx)
        except (errors.ApiError, OSError) as error:
            self._raise_os_error(error)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Raise EBADF."""
        del data, ctx
        raise errors.bad_handle(self.path, "not opened for writing")

    def close(self) -> None:
        """Close the file."""
        self._page_cache.on_close(self.path, self._file.key)
        self._file.close()
