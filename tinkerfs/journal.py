"""Journal: the last lines of a log, as a text that only grows while it is open.

`tail -f` requests a file's length and continues to read at its last offset. If the text were only
the last hundred lines, its length would not grow once each new line replaces an old one. So while
a reader has the journal open, lines are appended to one text for all readers. Thread-safe.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Maximum number of entries (spec: "The tree").
MAX_LOG_LINES: Final = 100
#: An open text beyond this length is truncated to the last entries; `tail` reports that.
_MAX_BYTES: Final = 1 << 20


class Journal(Generic[T]):
    """The last entries of a log.

    Args:
        format_entry: returns an entry as one line, without the newline.
    """

    def __init__(self, format_entry: Callable[[T], str]) -> None:
        self._format_entry = format_entry
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._entries: deque[T] = deque(maxlen=MAX_LOG_LINES)
        self._readers = 0
        #: None while no reader has the journal open.
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
        """Append an entry to the open text again, after it was changed."""
        with self._lock:
            self._append(entry)

    def text(self) -> bytes:
        """Return the open text, or the last entries as lines if no reader has it open."""
        with self._lock:
            return bytes(self._render() if self._text is None else self._text)

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes of the open text."""
        with self._lock:
            assert self._text is not None
            return bytes(self._text[offset : offset + size])

    def open(self) -> None:
        """Open the text for one more reader."""
        with self._lock:
            if self._text is None:
                self._text = self._render()
            self._readers += 1

    def close(self) -> None:
        """Close the text for one reader."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._text = None

    def _append(self, entry: T) -> None:
        if self._text is not None:
            self._text += self._encode(entry)
            if len(self._text) > _MAX_BYTES:
                self._text = self._render()

    def _render(self) -> bytearray:
        return bytearray().join(map(self._encode, self._entries))

    def _encode(self, entry: T) -> bytes:
        return (self._format_entry(entry) + "\n").encode("utf-8", "replace")
