"""Open files."""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.journal import Journal
from tinkerfs.weights.file import WeightsFile

#: So many paths are remembered as in the kernel's page cache before all are forgotten.
_MAX_KEPT = 4096


class GeneratedFileHandle:
    """A file whose bytes were made when it was opened; what is written to it acts at once.

    Thread-safe: the bytes are replaced whole.

    Args:
        path: for messages.
        data: the bytes, None for a file that was not opened to be read.
        render: makes the bytes anew, after a write.
        store: acts on what is written; None for a file that was not opened to be written.
        direct_io: as `Handle.direct_io`: metadata changes behind the kernel's back, and what only
            open resolves was told too long.
        told_at: as `Handle.told_at`.
    """

    __slots__ = ("_data", "_path", "_render", "_store", "direct_io", "size_hint_reported_at")

    #: What the kernel read for another handle may be of another version.
    keep_cache = False

    def __init__(
        self,
        path: str,
        data: bytes | None,
        render: Callable[[RequestContext], bytes],
        store: Callable[[str, RequestContext], None] | None,
        *,
        direct_io: bool,
        size_hint_reported_at: float | None,
    ) -> None:
        self.direct_io = direct_io
        self.size_hint_reported_at = size_hint_reported_at
        self._path = path
        self._render = render
        self._store = store
        self._data = data

    def load(self, ctx: RequestContext) -> bytes:
        """Return the bytes as of when they were first wanted, or last written."""
        data = self._data
        if data is None:
            data = self._data = self._render(ctx)
        return data

    @property
    def size_bytes(self) -> int | None:
        """The length, None while nothing was read."""
        return None if self._data is None else len(self._data)

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        return self.load(ctx)[offset : offset + size]

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return how many there are."""
        data = self.read(len(buffer), offset, ctx)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Act on one whole value, wherever in the file it was written.

        Raises:
            OSError: EBADF where the file was not opened to write; what the value's meaning raises.
        """
        if self._store is None:
            raise errors.bad_handle(self._path, "not opened for writing")
        self._store(data.decode("utf-8", "replace"), ctx)
        self._data = None
        return len(data)

    def close(self) -> None:
        """Do nothing: the bytes go with the handle."""


class JournalHandle:
    """A journal that is open: what is added to it can be read on. Thread-safe."""

    #: It grows behind the kernel's back.
    direct_io = True
    keep_cache = False
    size_hint_reported_at = None

    def __init__(self, path: str, journal: Journal[Any]) -> None:
        self._path = path
        self._journal = journal
        journal.open()

    @property
    def size_bytes(self) -> int:
        """The length by now."""
        return len(self._journal.text())

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size) that there are by now."""
        del ctx
        return self._journal.read(size, offset)

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return how many there are."""
        data = self.read(len(buffer), offset, ctx)
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Refuse.

        Raises:
            OSError: EBADF.
        """
        del data, ctx
        raise errors.bad_handle(self._path, "not opened for writing")

    def close(self) -> None:
        """Let the journal go back to its last lines."""
        self._journal.close()


class PageCacheTracker:
    """Which versions of its bytes each path is open for, and what the kernel may keep of them.

    The kernel has one page cache a path, whichever handle fills it. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._open: dict[str, list[str]] = {}
        #: The version that all pages of a path are of.
        self._kept: dict[str, str] = {}

    def on_open(self, path: str, key: str) -> tuple[bool, bool]:
        """Take note of an open, and return whether pages may stay, and whether there may be any.

        While somebody has another version open there are none of this one: the other would be
        given them.
        """
        with self._lock:
            keys = self._open.setdefault(path, [])
            is_apart = any(other != key for other in keys)
            keep_cache = not is_apart and self._kept.get(path) == key
            if is_apart:
                self._kept.pop(path, None)
            else:
                if len(self._kept) >= _MAX_KEPT:  # each costs the kernel pages that it had
                    self._kept.clear()
                self._kept[path] = key
            keys.append(key)
            return keep_cache, not is_apart

    def on_close(self, path: str, key: str) -> None:
        """Take note that an open is over."""
        with self._lock:
            keys = self._open[path]
            keys.remove(key)
            if not keys:
                del self._open[path]


class WeightsHandle:
    """A file whose bytes come by position. Thread-safe.

    Args:
        path: for messages.
        file: closed by `close`.
        fail: raises a failure of a read as an OSError, and tells it.
        versions: told of this open.
        told_at: as `Handle.told_at`.
    """

    def __init__(
        self,
        path: str,
        file: WeightsFile,
        fail: Callable[[errors.ApiError | OSError], NoReturn],
        *,
        versions: PageCacheTracker,
        size_hint_reported_at: float | None,
    ) -> None:
        self._path = path
        self._file = file
        self._fail = fail
        self._versions = versions
        self.keep_cache, self._may_be_cached = versions.on_open(path, file.key)
        self.size_hint_reported_at = size_hint_reported_at

    @property
    def direct_io(self) -> bool:
        """Whether the kernel may still go by a size that was a mere bound, or may keep no pages."""
        return self.size_hint_reported_at is not None or not self._may_be_cached

    @property
    def size_bytes(self) -> int:
        """The exact length."""
        return self._file.size_bytes

    def read(self, size: int, offset: int, ctx: RequestContext) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        try:
            return self._file.read(size, offset, ctx)
        except (errors.ApiError, OSError) as error:
            self._fail(error)

    def read_into(self, buffer: memoryview, offset: int, ctx: RequestContext) -> int:
        """Fill a buffer with the bytes from `offset` on, and return how many there are."""
        try:
            return self._file.read_into(buffer, offset, ctx)
        except (errors.ApiError, OSError) as error:
            self._fail(error)

    def write(self, data: bytes, ctx: RequestContext) -> int:
        """Refuse.

        Raises:
            OSError: EBADF.
        """
        del data, ctx
        raise errors.bad_handle(self._path, "not opened for writing")

    def close(self) -> None:
        """Let go of the file."""
        self._versions.on_close(self._path, self._file.key)
        self._file.close()
