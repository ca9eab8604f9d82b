"""Cache of indexes: in memory, and in the metadata store across mounts."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import run_in_thread
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
        self._lock = threading.RLock()  # reentrant: a future that is already done runs its callback
        self._futures: OrderedDict[str, Future[Index]] = OrderedDict()  # guarded by _lock

    def cached(self, cache_key: str) -> Index | None:
        """Return an index if it is cached."""
        with self._lock:
            future = self._futures.get(cache_key)
            if future is not None:
                self._futures.move_to_end(cache_key)
                return future.result() if future.done() and not future.exception() else None
        raw = self._store.get(_NAMESPACE, cache_key)
        if raw is None:
            return None
        try:
            index = decode_index(raw)
        except ValueError:
            return None
        future = Future[Index]()
        future.set_result(index)
        with self._lock:
            self._add(cache_key, future)
        return index

    def is_loading(self, cache_key: str) -> bool:
        """Return whether an index is being loaded."""
        with self._lock:
            future = self._futures.get(cache_key)
        return future is not None and not future.done()

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
        with self._lock:
            future = self._futures.get(cache_key)
        if future is None:
            load = prepare()
            with self._lock:
                future = self._futures.get(cache_key)
                if future is None:
                    future = run_in_thread(lambda: self._load(cache_key, load), name)
                    self._add(cache_key, future)
                    future.add_done_callback(lambda done: self._on_done(cache_key, done))
        return ctx.wait_for(future)

    def drop(self, cache_key: str) -> None:
        """Drop an index, because the weights have changed."""
        with self._lock:
            self._futures.pop(cache_key, None)
        self._store.delete(_NAMESPACE, cache_key)

    def _load(self, cache_key: str, load: Callable[[], Index]) -> Index:
        index = load()
        self._store.put(_NAMESPACE, cache_key, encode_index(index))
        return index

    def _add(self, cache_key: str, future: "Future[Index]") -> None:
        self._futures[cache_key] = future
        if len(self._futures) > MAX_INDEXES:
            self._futures.popitem(last=False)

    def _on_done(self, cache_key: str, future: "Future[Index]") -> None:
        """Drop a failed load, so that the next caller retries."""
        if future.exception() is not None:
            with self._lock:
                if self._futures.get(cache_key) is future:
                    del self._futures[cache_key]
