"""Journal: the last lines of a log, and a text that only grows while it is open.

`tail -f` asks for a file's length and reads on from where it was. Of the last hundred lines alone
the length says nothing once each new line pushes out an old one. So while a reader has the journal
open, lines are appended to the same text, for all readers. Thread-safe.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Maximum number of entries (spec: "The tree").
KEPT_LINES: Final = 100
#: Length at which a text that is read is cut to the last entries; `tail` says "file truncated".
_MAX_BYTES: Final = 1 << 20


class Journal(Generic[T]):
    """The last entries.

    Args:
        line_of: an entry as one line, without its end.
    """

    def __init__(self, line_of: Callable[[T], str]) -> None:
        self._line_of = line_of
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._entries: deque[T] = deque(maxlen=KEPT_LINES)
        self._readers = 0
        #: None without readers.
        self._text: bytearray | None = None

    def entries(self) -> list[T]:
        """Return the last entries, newest last."""
        with self._lock:
            return list(self._entries)

    def add(self, entry: T) -> None:
        """Add an entry."""
        with self._lock:
            self._entries.append(entry)
            self._append(entry)

    def amend(self, entry: T) -> None:
        """Show an entry that was added before, and has changed since, to readers again."""
        with self._lock:
            self._append(entry)

    def text(self) -> bytes:
        """Return the last entries as lines, and while there is a reader what went before."""
        with self._lock:
            return bytes(self._rendered() if self._text is None else self._text)

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes of `text`, to a reader."""
        with self._lock:
            assert self._text is not None
            return bytes(self._text[offset : offset + size])

    def open(self) -> None:
        """Count one reader more."""
        with self._lock:
            if self._text is None:
                self._text = self._rendered()
            self._readers += 1

    def close(self) -> None:
        """Count one reader less."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._text = None

    def _append(self, entry: T) -> None:
        if self._text is not None:
            self._text += self._encoded(entry)
            if len(self._text) > _MAX_BYTES:
                self._text = self._rendered()

    def _rendered(self) -> bytearray:
        return bytearray().join(map(self._encoded, self._entries))

    def _encoded(self, entry: T) -> bytes:
        return (self._line_of(entry) + "\n").encode("utf-8", "replace")
