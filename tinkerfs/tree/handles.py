"""Open files."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from tinkerfs import errors
from tinkerfs.call import Call
from tinkerfs.weights.file import WeightsFile

__all__ = ["RenderedHandle", "WeightsHandle"]


class RenderedHandle:
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

    #: What the kernel read for another handle may be of another version.
    keep_cache = False

    def __init__(
        self,
        path: str,
        data: bytes | None,
        render: Callable[[Call], bytes],
        store: Callable[[str, Call], None] | None,
        *,
        direct_io: bool,
        told_at: float | None,
    ) -> None:
        self.direct_io = direct_io
        self.told_at = told_at
        self._path = path
        self._render = render
        self._store = store
        self._data = data

    def load(self, call: Call) -> bytes:
        """Return the bytes as of when they were first wanted, or last written."""
        data = self._data
        if data is None:
            data = self._data = self._render(call)
        return data

    @property
    def size_bytes(self) -> int | None:
        """The length, None while nothing was read."""
        return None if self._data is None else len(self._data)

    def read(self, size: int, offset: int, call: Call) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        return self.load(call)[offset : offset + size]

    def write(self, data: bytes, call: Call) -> int:
        """Act on one whole value, wherever in the file it was written.

        Raises:
            OSError: EBADF where the file was not opened to write; what the value's meaning raises.
        """
        if self._store is None:
            raise errors.bad_handle(self._path, "not opened for writing")
        self._store(data.decode("utf-8", "replace"), call)
        self._data = None
        return len(data)

    def close(self) -> None:
        """Do nothing: the bytes go with the handle."""


class WeightsHandle:
    """A file whose bytes come by position. Thread-safe.

    Args:
        path: for messages.
        file: closed by `close`.
        telling: makes every failure of a read an OSError, and tells it.
        keep_cache: as `Handle.keep_cache`.
        told_at: as `Handle.told_at`.
    """

    def __init__(
        self,
        path: str,
        file: WeightsFile,
        telling: Callable[[], AbstractContextManager[None]],
        *,
        keep_cache: bool,
        told_at: float | None,
    ) -> None:
        self._path = path
        self._file = file
        self._telling = telling
        self.keep_cache = keep_cache
        self.told_at = told_at

    @property
    def direct_io(self) -> bool:
        """Whether the kernel may still hold pages by a size that was a mere bound."""
        return self.told_at is not None

    @property
    def size_bytes(self) -> int:
        """The exact length."""
        return self._file.size_bytes

    def read(self, size: int, offset: int, call: Call) -> bytes:
        """Return the bytes of [offset, offset + size); fewer only at the end."""
        with self._telling():
            return self._file.read(size, offset, call)

    def write(self, data: bytes, call: Call) -> int:
        """Refuse.

        Raises:
            OSError: EBADF.
        """
        del data, call
        raise errors.bad_handle(self._path, "not opened for writing")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
