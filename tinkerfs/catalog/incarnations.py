"""How often each name of a checkpoint was deleted through mounts of this host.

What is cached under a name's incarnation is never used for a checkpoint that is saved under the
name after a deletion, even where the server gives both the same record.
"""

import threading

from tinkerfs.cache.store import MetadataStore
from tinkerfs.name_encoding import compound_key


class Incarnations:
    """The number of each checkpoint's name, across mounts. Thread-safe.

    Args:
        store: where the numbers are stored; without it they last as long as the mount.
        base_url: the server.
    """

    def __init__(self, store: MetadataStore, base_url: str) -> None:
        self._store = store
        self._space = f"incarnation {base_url}"
        self._lock = threading.Lock()
        self._begun: dict[tuple[str, str, str], int] = {}  # guarded by _lock

    def get(self, key: tuple[str, str, str]) -> int:
        """Return the number of a name's incarnation, 0 for the first one.

        Args:
            key: run, kind and name.
        """
        stored = self._store.get(self._space, compound_key(*key))
        number = int(stored) if stored is not None and stored.isdigit() else 0
        with self._lock:
            return max(number, self._begun.get(key, 0))

    def begin(self, key: tuple[str, str, str]) -> None:
        """Begin the next incarnation: what had the name was deleted."""
        number = self.get(key) + 1
        with self._lock:
            number = self._begun[key] = max(number, self._begun.get(key, 0) + 1)
        self._store.put(self._space, compound_key(*key), str(number).encode())
