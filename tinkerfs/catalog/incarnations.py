"""Count how often each checkpoint name was deleted through mounts on this host.

Cached data is stored under the incarnation of its name. A checkpoint that is saved under the name
after a deletion therefore never uses that data, even if the server's records are identical.
"""

import threading

from tinkerfs.cache.store import MetadataStore
from tinkerfs.name_encoding import compound_key


class Incarnations:
    """Persistent incarnation number of each checkpoint name. Thread-safe.

    If the store is not available, the numbers last as long as the mount.
    """

    def __init__(self, store: MetadataStore, base_url: str) -> None:
        self._store = store
        self._namespace = f"incarnation {base_url}"
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str, str], int] = {}  # guarded by _lock

    def get(self, key: tuple[str, str, str]) -> int:
        """Return the current incarnation of a run's kind and name; the first one is 0."""
        stored = self._store.get(self._namespace, compound_key(*key))
        number = int(stored) if stored is not None and stored.isdigit() else 0
        with self._lock:
            return max(number, self._latest.get(key, 0))

    def begin(self, key: tuple[str, str, str]) -> None:
        """Begin the next incarnation of a name after its checkpoint was deleted."""
        number = self.get(key) + 1
        with self._lock:
            number = self._latest[key] = max(number, self._latest.get(key, 0) + 1)
        self._store.put(self._namespace, compound_key(*key), str(number).encode())
