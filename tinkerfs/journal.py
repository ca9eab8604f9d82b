"""Journal: the last lines of a log, as a text that only grows while it is open.

`tail -f` requests a file's length and continues to read at its last offset. If the text were only
the last hundred lines, its length would not grow once each new line replaces an old one. So while
a reader has the journal open, lines are appended to one text for all readers. If that exceeds its
bound, the oldest lines are dropped, and positions in the text remain the same. Thread-safe.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Maximum number of entries (spec: "The tree").
MAX_LOG_LINES: Final = 100
#: Maximum length of an open text.
_MAX_BYTES: Final = 1 << 20


class Journal(Generic[T]):
    """The last entries of a log.

    Args:
        format_entry: returns an entry as one line, without the newline.
        max_entries: number of entries at which an open text starts.
        header: first line of the text, without the newline; empty for none.
    """

    def __init__(
        self,
        format_entry: Callable[[T], str],
        *,
        max_entries: int = MAX_LOG_LINES,
        header: str = "",
    ) -> None:
        self._format_entry = format_entry
        self._header = f"{header}\n".encode() if header else b""
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._entries: deque[T] = deque(maxlen=max_entries)
        self._readers = 0
        #: None while no reader has the journal open.
        self._text: bytearray | None = None
        #: Position of the first byte of the open text, and the number of lines before it.
        self._start = 0
        self._dropped_lines = 0
        self._growth: Future[None] = Future()

    def entries(self) -> list[T]:
        """Return the last entries, newest last."""
        with self._lock:
            return list(self._entries)

    def add(self, entry: T) -> None:
        """Add an entry."""
        with self._lock:
            self._entries.append(entry)
            growth = self._append(entry)
        _resolve(growth)

    def amend(self, entry: T) -> None:
        """Append an entry to the open text again, after it was changed."""
        with self._lock:
            growth = self._append(entry)
        _resolve(growth)

    def text(self) -> bytes:
        """Return the open text, or the last entries as lines if no reader has it open."""
        with self._lock:
            return bytes(self._render() if self._text is None else self._text)

    @property
    def size_bytes(self) -> int:
        """The position of the end of the text; while it is open, it only grows."""
        with self._lock:
            return len(self._render()) if self._text is None else self._start + len(self._text)

    def read(self, size: int, position: int) -> tuple[bytes, int, int]:
        """Return bytes of the open text at a position, or after it if it was dropped.

        Returns:
            the bytes; the position of the first one; the number of lines dropped before it.
        """
        with self._lock:
            assert self._text is not None
            first = max(position, self._start)
            offset = first - self._start
            return bytes(self._text[offset : offset + size]), first, self._dropped_lines

    def growth(self, position: int) -> "Future[None]":
        """Return a future that is done as soon as the open text is longer than a position."""
        with self._lock:
            if self._text is not None and self._start + len(self._text) > position:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            return self._growth

    def open(self) -> None:
        """Open the text for one more reader."""
        with self._lock:
            if self._text is None:
                self._text = self._render()
                self._on_first_open()
            self._readers += 1

    def close(self) -> None:
        """Close the text for one reader."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._on_last_close()
                self._text = None
                self._start = self._dropped_lines = 0

    def _on_first_open(self) -> None:
        """Prepare for readers; called under the lock."""

    def _on_last_close(self) -> None:
        """End the work for readers; called under the lock."""

    def _append(self, entry: T) -> "Future[None] | None":
        """Append to the open text; return a future to resolve without the lock."""
        if self._text is None:
            return None
        self._text += self._encode(entry)
        if len(self._text) > _MAX_BYTES:
            # Half of it at once, so that few lines are moved in memory.
            end = self._text.find(b"\n", len(self._text) - _MAX_BYTES // 2) + 1
            self._dropped_lines += self._text.count(b"\n", 0, end)
            self._start += end
            del self._text[:end]
        growth, self._growth = self._growth, Future()
        return growth

    def _render(self) -> bytearray:
        return bytearray(self._header + b"".join(map(self._encode, self._entries)))

    def _encode(self, entry: T) -> bytes:
        return (self._format_entry(entry) + "\n").encode("utf-8", "replace")


def _resolve(growth: "Future[None] | None") -> None:
    if growth is not None:
        growth.set_result(None)
