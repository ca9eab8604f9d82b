"""Persistent cache of weights infos, immutable JSON descriptions of checkpoints."""

from collections.abc import Callable

from tinkerfs.cache.cache_policy import CachePolicy
from tinkerfs.cache.metadata import Loader, MetadataCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.context import BACKGROUND_CONTEXT, Priority, RequestContext
from tinkerfs.name_encoding import compound_key

#: Maximum number of entries in memory, 1 kB each; the number on disk is unlimited.
MAX_WEIGHTS_INFO_ENTRIES = 16_384


class WeightsInfoCache:
    """Weights infos by tinker path and version, in memory and on disk. Thread-safe.

    A checkpoint record without a time does not identify the version. Its weights info has the TTL
    of a listing and is not stored on disk.

    Args:
        cache: in-memory cache, also of errors and requests in flight.
        store: cache on disk.
        base_url: the server, which separates the entries on disk.
        policies: TTLs of values and errors.
        load: requests the weights info of a checkpoint.
    """

    def __init__(
        self,
        cache: MetadataCache,
        store: MetadataStore,
        base_url: str,
        policies: CachePolicies,
        load: Callable[[ListedCheckpoint, Priority], bytes],
    ) -> None:
        self._cache = cache
        self._store = store
        self._namespace = f"weights_info {base_url}"
        self._policies = policies
        self._load = load

    def get(self, checkpoint: ListedCheckpoint, ctx: RequestContext) -> bytes:
        """Return a checkpoint's weights info; one request if it is not cached.

        Raises:
            ApiError: the error of `load`, which may be cached.
            OSError: EINTR or ETIMEDOUT if the wait was cancelled or timed out.
        """
        cached = self._cached(checkpoint)
        if cached is not None:
            return cached
        load, policy = self._loader(checkpoint), self._policy(checkpoint)
        return self._cache.get(_memory_key(checkpoint), load, policy, ctx)

    def prefetch(self, checkpoint: ListedCheckpoint) -> bool:
        """Request a weights info in the background; return False if it is cached."""
        return self._cached(checkpoint) is None and self._cache.prefetch(
            _memory_key(checkpoint), self._loader(checkpoint), self._policy(checkpoint)
        )

    def put(self, checkpoint: ListedCheckpoint, info: bytes) -> None:
        """Cache a weights info that was received by another request."""
        if checkpoint.has_time:
            self._store.put(self._namespace, _store_key(checkpoint), info)
        else:
            self._cache.put(_memory_key(checkpoint), info, self._policies.without_time)

    def invalidate(self, checkpoint: ListedCheckpoint) -> None:
        """Discard the weights info of a deleted checkpoint, in memory and on disk."""
        self._cache.drop(_memory_key(checkpoint))
        self._store.delete(self._namespace, _store_key(checkpoint))

    def clear(self) -> None:
        """Discard every weights info in memory."""
        self._cache.clear()

    def wait_idle(self, ctx: RequestContext) -> None:
        """Wait until no load is in flight."""
        self._cache.wait_idle(ctx)

    def _cached(self, checkpoint: ListedCheckpoint) -> bytes | None:
        """Return a cached weights info if the version is certain, without a request."""
        if not checkpoint.has_time:
            return None
        in_memory: bytes | None = self._cache.peek(_memory_key(checkpoint), BACKGROUND_CONTEXT)
        return in_memory or self._store.get(self._namespace, _store_key(checkpoint))

    def _policy(self, checkpoint: ListedCheckpoint) -> CachePolicy:
        return self._policies.immutable if checkpoint.has_time else self._policies.without_time

    def _loader(self, checkpoint: ListedCheckpoint) -> Loader[bytes]:
        def load(priority: Priority) -> bytes:
            info = self._load(checkpoint, priority)
            if checkpoint.has_time:
                self._store.put(self._namespace, _store_key(checkpoint), info)
            return info

        return load


def _store_key(checkpoint: ListedCheckpoint) -> str:
    return compound_key(checkpoint.tinker_path, *checkpoint.fingerprint)


def _memory_key(checkpoint: ListedCheckpoint) -> tuple[str, str, str, int | None]:
    return ("weights_info", checkpoint.tinker_path, *checkpoint.fingerprint)
