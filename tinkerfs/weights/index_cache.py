"""Cache of indexes: in memory, in the metadata store across mounts, and in a directory of hosts."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Final

from tinkerfs.cache.blocks import BlockRecord, Blocks
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.cache.store import MetadataStore
from tinkerfs.concurrency import SingleFlight
from tinkerfs.context import RequestContext
from tinkerfs.weights.archive_index import Index, decode_index, encode_index

#: Maximum number of indexes in memory. An index of 1,000 members takes 0.3 MB.
MAX_INDEXES = 64

#: Namespace of the metadata store. The number is the version of the stored format.
_NAMESPACE = "weights index 2"

#: Stands for the whole record in locks.
_FIRST_UNIT: Final = range(1)


class IndexCache:
    """Indexes by the cache key of their checkpoint version. Thread-safe.

    Concurrent callers share one load. So do hosts that share a cache directory. A failed load is
    not cached.

    Args:
        store: caches indexes across mounts.
        blocks: has the records that hosts share, if there are any.
        timeout_s: how long to wait for another host that loads an index, seconds.
    """

    def __init__(self, store: MetadataStore, blocks: Blocks, timeout_s: float) -> None:
        self._store = store
        self._blocks = blocks
        self._timeout_s = timeout_s
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
        index = _decode(raw)
        if index is not None:
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
        about: str = "",
    ) -> Index:
        """Return an index; load it unless it is cached or being loaded.

        `prepare` runs on the calling thread, and returns the function that loads the index, which
        runs on a thread with this `name`. `about` names the checkpoint, for users.

        Raises:
            ApiError, OSError: as raised by the two functions; EINTR if the caller was interrupted.
        """
        cached = self.cached(cache_key)
        if cached is not None:
            return cached
        future = self._loads.get(cache_key)
        if future is None:
            with ctx.blocking(), self._record(cache_key, about) as record:
                shared = _decode(None if record is None else record.read_record())
            if shared is not None:
                with self._lock:
                    self._add(cache_key, shared)
                self._store.put(_NAMESPACE, cache_key, encode_index(shared))
                return shared
            future = Future[Index]()
            work = partial(self._load, cache_key, about, prepare(), future)
            with self._lock:
                index = self._indexes.get(cache_key)
                if index is not None:
                    return index
                future = self._loads.run(cache_key, work, name, future)
        return ctx.wait_for(future)

    def drop(self, cache_key: str, about: str = "") -> None:
        """Drop an index, because the weights have changed."""
        with self._record(cache_key, about) as record:
            if record is not None:
                record.drop_all()
        with self._lock:
            self._indexes.pop(cache_key, None)
            self._loads.forget(cache_key)
        self._store.delete(_NAMESPACE, cache_key)

    @contextmanager
    def _record(self, cache_key: str, about: str) -> Iterator[BlockRecord | None]:
        """Open the record that hosts share; None if there is none."""
        record = self._blocks.open_record(f"{_NAMESPACE} {cache_key}", f"{about} index")
        try:
            yield record
        finally:
            if record is not None:
                record.close()

    def _load_shared(self, record: BlockRecord, load: Callable[[], Index]) -> Index:
        """Load an index, unless another host loads it first; let other hosts wait for it."""
        record.ensure_directory()
        with record.lock_units(_FIRST_UNIT, self._timeout_s):
            index = _decode(record.read_record())
            if index is None:
                index = load()
                raw = encode_index(index)
                # The files of an export belong to records of the host that made it.
                if index.form != "files" and len(raw) <= BLOCK_BYTES:
                    record.put(0, raw)
            return index

    def _load(
        self, cache_key: str, about: str, load: Callable[[], Index], future: "Future[Index]"
    ) -> Index:
        """Load an index, and cache it unless it was dropped meanwhile."""
        with self._record(cache_key, about) as record:
            index = load() if record is None else self._load_shared(record, load)
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


def _decode(raw: bytes | None) -> Index | None:
    """Return an index as it is stored; None if there is none, or one of another form."""
    if raw is None:
        return None
    try:
        return decode_index(raw)
    except ValueError:
        return None
