"""Open files."""

from collections.abc import Callable

from tinkerfs import errors
from tinkerfs.call import Call

__all__ = ["RenderedHandle"]


class RenderedHandle:
    """A file whose bytes were made when it was opened; what is written to it acts at once.

    Thread-safe: the bytes are replaced whole.

    Args:
        path: for messages.
        data: the bytes, None for a file that was not opened to be read.
        render: makes the bytes anew, after a write.
        store: acts on what is written; None for a file that was not opened to be written.
    """

    #: Metadata changes behind the kernel's back, and what only open resolves was told too long.
    direct_io = True

    def __init__(
        self,
        path: str,
        data: bytes | None,
        render: Callable[[Call], bytes],
        store: Callable[[str, Call], None] | None,
    ) -> None:
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
