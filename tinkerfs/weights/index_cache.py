"""Cache of indexes: in memory, and in the metadata store across mounts."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import RequestContext
from tinkerfs.weights.archive_index import Index, decode_index, encode_index

#: Maximum number of indexes in memory. An index of 1,000 members takes 0.3 MB.
MAX_INDEXES = 64

#: Namespace of the metadata store. The number is the version of the stored format.
_NAMESPACE = "weights index 2"


class IndexCache:
    """Indexes by the cache key of their checkpoint version. Thread-safe.

    Concurrent callers share one load. A failed load is not cached.
    """

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._loads: SingleFlight[str, Future[Index]] = SingleFlight()
        self._lock = threading.Lock()
        self._indexes: OrderedDict[str, Index] = OrderedDict()  # guarded by _lock

    def cached(self, cache_key: str) -> Index | None:
        """Return an index if it is cached."""
        with self._lock:
            index = self._indexes.get(cache_key)
            if index is not None:
                self._indexes.move_to_end(cache_key)
                return index
        if self.is_loading(cache_key):
            return None
        raw = self._store.get(_NAMESPACE, cache_key)
        if raw is None:
            return None
        try:
            index = decode_index(raw)
        except ValueError:
            return None
        with self._lock:
            self._add(cache_key, index)
        return index

    def is_loading(self, cache_key: str) -> bool:
        """Return whether an index is being loaded."""
        return self._loads.get(cache_key) is not None

    def get(
        self,
        cache_key: str,
        prepare: Callable[[], Callable[[], Index]],
        name: str,
        ctx: RequestContext,
    ) -> Index:
        """Return an index; load it unless it is cached or being loaded.

        `prepare` runs on the calling thread, and returns the function that loads the index, which
        runs on a thread with this `name`.

        Raises:
            ApiError, OSError: as raised by the two functions; EINTR if the caller was interrupted.
        """
        cached = self.cached(cache_key)
        if cached is not None:
            return cached
        future = self._loads.get(cache_key)
        if future is None:
            future = Future[Index]()
            work = partial(self._load, cache_key, prepare(), future)
            with self._lock:
                index = self._indexes.get(cache_key)
                if index is not None:
                    return index
                future = self._loads.run(cache_key, work, name, future)
        return ctx.wait_for(future)

    def drop(self, cache_key: str) -> None:
        """Drop an index, because the weights have changed."""
        with self._lock:
            self._indexes.pop(cache_key, None)
            self._loads.forget(cache_key)
        self._store.delete(_NAMESPACE, cache_key)

    def _load(self, cache_key: str, load: Callable[[], Index], future: "Future[Index]") -> Index:
        """Load an index, and cache it unless it was dropped meanwhile."""
        index = load()
        with self._lock:
            is_current = self._loads.get(cache_key) is future
            if is_current:
                self._add(cache_key, index)
        if is_current:
            self._store.put(_NAMESPACE, cache_key, encode_index(index))
        return index

    def _add(self, cache_key: str, index: Index) -> None:
        """Cache an index in memory; the caller holds the lock."""
        self._indexes[cache_key] = index
        if len(self._indexes) > MAX_INDEXES:
            self._indexes.popitem(last=False)
