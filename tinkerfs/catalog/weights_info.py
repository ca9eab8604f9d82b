"""Weights infos: JSON that never changes, asked for once of each version. Thread-safe."""

from collections.abc import Callable

from tinkerfs.cache.metadata import CachePolicy, Loader, MetadataCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.context import Priority, RequestContext
from tinkerfs.name_encoding import compound_key

#: Kept in memory, 1 kB each; all are kept on disk.
MAX_WEIGHTS_INFO_ENTRIES = 16_384


class WeightsInfoCache:
    """The weights infos of checkpoints, by tinker path and version, across mounts.

    Of a record without a time the version cannot be known: its info is fresh for as long as a
    listing, and not kept on disk.

    Args:
        cache: those in memory, and the calls under way.
        store: those on disk.
        base_url: the server.
        freshness: for how long one serves, and a refusal.
        load: asks for one.
    """

    def __init__(
        self,
        cache: MetadataCache,
        store: MetadataStore,
        base_url: str,
        freshness: CachePolicies,
        load: Callable[[Checkpoint, Priority], bytes],
    ) -> None:
        self._cache = cache
        self._store = store
        self._space = f"weights_info {base_url}"
        self._freshness = freshness
        self._load = load

    def get(self, checkpoint: Checkpoint, ctx: RequestContext) -> bytes:
        """Return one, asking for it where it is not known.

        Raises:
            ApiError: what `load` raised, now or while that is remembered.
            OSError: EINTR or ETIMEDOUT, when the wait ended early.
        """
        known = self._known(checkpoint)
        if known is not None:
            return known
        load, policy = self._loading(checkpoint), self._policy(checkpoint)
        return self._cache.get(_key(checkpoint), load, policy, ctx)

    def ask(self, checkpoint: Checkpoint) -> bool:
        """Begin to ask for one that nobody waits for yet; tell whether that was needed."""
        return self._known(checkpoint) is None and self._cache.prefetch(
            _key(checkpoint), self._loading(checkpoint), self._policy(checkpoint)
        )

    def keep(self, checkpoint: Checkpoint, info: bytes) -> None:
        """Keep one that came by another way."""
        if checkpoint.is_dated:
            self._store.put(self._space, _name(checkpoint), info)
        else:
            self._cache.put(_key(checkpoint), info, self._freshness.undated)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Drop one, in memory and on disk: its checkpoint was deleted."""
        self._cache.drop(_key(checkpoint))
        self._store.delete(self._space, _name(checkpoint))

    def clear(self) -> None:
        """Drop what is in memory."""
        self._cache.clear()

    def _known(self, checkpoint: Checkpoint) -> bytes | None:
        """Return one that never changes and was told before, without a call."""
        if not checkpoint.is_dated:
            return None
        kept: bytes | None = self._cache.peek(_key(checkpoint))
        return kept or self._store.get(self._space, _name(checkpoint))

    def _policy(self, checkpoint: Checkpoint) -> CachePolicy:
        return self._freshness.immutable if checkpoint.is_dated else self._freshness.undated

    def _loading(self, checkpoint: Checkpoint) -> Loader[bytes]:
        def load(priority: Priority) -> bytes:
            info = self._load(checkpoint, priority)
            if checkpoint.is_dated:
                self._store.put(self._space, _name(checkpoint), info)
            return info

        return load


def _name(checkpoint: Checkpoint) -> str:
    return compound_key(checkpoint.tinker_path, *checkpoint.fingerprint)


def _key(checkpoint: Checkpoint) -> tuple[str, str, str, int | None]:
    return ("weights_info", checkpoint.tinker_path, *checkpoint.fingerprint)
