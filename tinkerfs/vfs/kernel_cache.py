"""What the kernel may have cached of a file: its size and its pages. Thread-safe."""

import threading
import time
from collections.abc import Callable

#: Lifetime of attributes in the kernel: 1 s (`binding.mount_options`), and a margin for its clock.
ATTR_EXPIRY_S = 1.05

#: Maximum delay between a reply and the moment when the kernel receives it. The lifetime starts at
#: that moment, which is late on a busy machine.
REPLY_DELAY_S = 1.0

#: Time after which an exact size replaces an upper bound for good. Before that, a delayed reply
#: with the bound may still arrive after the exact size.
ATTR_SETTLED_S = REPLY_DELAY_S + ATTR_EXPIRY_S

#: Maximum number of paths with a size hint; beyond it, hints older than _EXPIRY_S are removed.
_MAX_HINTS = 4096
#: After this time no kernel can still have a size hint cached.
_EXPIRY_S = 10.0

#: Maximum number of tracked paths; at the limit, all are dropped and their pages invalidated.
_MAX_PATHS = 4096


class SizeHintTracker:
    """Remembers when stat() last reported an upper bound as the size of a path.

    Such a size must leave every cache before the file is read (`Handle.size_hint_reported_at`).

    Args:
        monotonic: the clock, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # Single operations on a dict are atomic.
        self._reported_at: dict[str, float] = {}

    def reported_at(self, path: str) -> float | None:
        """Return when the last upper bound was reported; None if no kernel has it cached."""
        reported_at = self._reported_at.get(path)
        if reported_at is None or self._monotonic() - reported_at > _EXPIRY_S:
            return None
        return reported_at

    def record(self, path: str) -> None:
        """Record that an upper bound is reported now."""
        now = self._monotonic()
        if len(self._reported_at) >= _MAX_HINTS:
            for other, at in list(self._reported_at.items()):
                if now - at > _EXPIRY_S:
                    self._reported_at.pop(other, None)
        self._reported_at[path] = now

    def on_exact(self, path: str) -> None:
        """Record that the exact size is reported now, which may supersede an upper bound."""
        reported_at = self._reported_at.get(path)
        if reported_at is not None and self._monotonic() - reported_at >= ATTR_SETTLED_S:
            self._reported_at.pop(path, None)


class PageCacheTracker:
    """Tracks which version of a file the pages in the kernel's page cache belong to.

    The kernel has one page cache per path, which all handles of the path share.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Both are guarded by _lock.
        self._open_keys: dict[str, list[str]] = {}
        #: The version of all cached pages, by path.
        self._page_versions: dict[str, str] = {}

    def on_open(self, path: str, key: str) -> tuple[bool, bool]:
        """Record that a version is opened, and return (keep_cache, may_cache).

        While another version is open, the pages of this one must not be cached, because reads of
        the other version would return them.
        """
        with self._lock:
            keys = self._open_keys.setdefault(path, [])
            has_conflict = any(other != key for other in keys)
            keep_cache = not has_conflict and self._page_versions.get(path) == key
            if has_conflict:
                self._page_versions.pop(path, None)
            else:
                if len(self._page_versions) >= _MAX_PATHS:  # the next opens discard cached pages
                    self._page_versions.clear()
                self._page_versions[path] = key
            keys.append(key)
            return keep_cache, not has_conflict

    def on_close(self, path: str, key: str) -> None:
        """Record that a handle of a version is closed."""
        with self._lock:
            keys = self._open_keys[path]
            keys.remove(key)
            if not keys:
                del self._open_keys[path]
