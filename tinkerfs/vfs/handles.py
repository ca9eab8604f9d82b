"""Handles of open files: generated files, controls, journals and weights."""

from collections.abc import Callable
from typing import Any, ClassVar, Final, NoReturn

import msgspec

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
    """An open journal; reads include lines added after open(). Thread-safe."""

    #: The file grows without the kernel's knowledge.
    direct_io = True
    keep_cache = False
    size_hint_reported_at = None
    backing_fd = None

    def __init__(self, path: str, journal: Journal[Any]) -> None:
        self.path = path
        self._journal = journal
        journal.open()

    @property
    def size_bytes(self) -> int:
        """The current length."""
        return len(self._journal.text())

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the current bytes of [offset, offset + size)."""
        del ctx
        return self._journal.read(size, offset)

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
