"""Remember which processes recently called stat() on a file.

readdirplus includes the attributes of files only for them, because attributes cost memory in the
kernel and in libfuse, and a plain `ls` or `find` never reads them.
"""

import threading
from typing import Final

#: Maximum number of remembered processes; the oldest one is evicted.
_MAX_CALLERS: Final = 64


class StatCallers:
    """The processes that most recently called stat() on a file, by process id. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: dict[int, None] = {}  # modified under _lock, read without it

    def __contains__(self, pid: int) -> bool:
        return pid in self._pids

    def add(self, pid: int) -> None:
        """Remember a process, and evict the oldest one if there are too many."""
        if pid not in self._pids:
            with self._lock:
                self._pids[pid] = None
                if len(self._pids) > _MAX_CALLERS:
                    del self._pids[next(iter(self._pids))]
