"""Who looks at files, and not at names alone: those want attributes along with a listing."""

import threading
from typing import Final

#: Processes that look at files at a time.
_MAX_LOOKERS: Final = 64


class StatCallers:
    """The processes that have last asked for the attributes of files, by id. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pids: dict[int, None] = {}  # changed under _lock; looked into without

    def __contains__(self, pid: int) -> bool:
        return pid in self._pids

    def add(self, pid: int) -> None:
        """Remember one more, and of 64 the first no longer."""
        if pid not in self._pids:
            with self._lock:
                self._pids[pid] = None
                if len(self._pids) > _MAX_LOOKERS:
                    del self._pids[next(iter(self._pids))]
