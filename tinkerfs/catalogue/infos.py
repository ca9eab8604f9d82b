"""Weights infos: JSON that never changes, asked for once ever. Thread-safe."""

from collections.abc import Callable

from tinkerfs.cache.metadata import Load, MetadataCache, Policy
from tinkerfs.cache.store import Store
from tinkerfs.call import Call, Interest
from tinkerfs.catalogue.listings import Checkpoint

__all__ = ["MAX_INFOS", "Infos"]

#: Kept in memory, 1 kB each; all are kept on disk.
MAX_INFOS = 16_384


class Infos:
    """The weights infos of checkpoints, by tinker path and version, across mounts.

    Args:
        cache: those in memory, and the calls under way.
        store: those on disk.
        base_url: the server.
        policy: for how long one serves, and a refusal.
        load: asks for one.
    """

    def __init__(
        self,
        cache: MetadataCache,
        store: Store,
        base_url: str,
        policy: Policy,
        load: Callable[[Checkpoint, Interest], bytes],
    ) -> None:
        self._cache = cache
        self._store = store
        self._space = f"weights_info {base_url}"
        self._policy = policy
        self._load = load

    def get(self, checkpoint: Checkpoint, call: Call) -> bytes:
        """Return one, asking for it where it is not known.

        Raises:
            ApiError: what `load` raised, now or while that is remembered.
            OSError: EINTR or ETIMEDOUT, when the wait ended early.
        """
        known = self.known(checkpoint)
        if known is not None:
            return known
        return self._cache.get(_key(checkpoint), self._loading(checkpoint), self._policy, call)

    def ask(self, checkpoint: Checkpoint) -> bool:
        """Begin to ask for one that nobody waits for yet; tell whether that was needed."""
        return self.known(checkpoint) is None and self._cache.ask(
            _key(checkpoint), self._loading(checkpoint), self._policy
        )

    def known(self, checkpoint: Checkpoint) -> bytes | None:
        """Return one that was told before, without a call."""
        kept: bytes | None = self._cache.peek(_key(checkpoint))
        return kept or self._store.get(self._space, _name(checkpoint))

    def keep(self, checkpoint: Checkpoint, info: bytes) -> None:
        """Keep one on disk."""
        self._store.put(self._space, _name(checkpoint), info)

    def clear(self) -> None:
        """Drop what is in memory."""
        self._cache.clear()

    def _loading(self, checkpoint: Checkpoint) -> Load[bytes]:
        def load(interest: Interest) -> bytes:
            info = self._load(checkpoint, interest)
            self.keep(checkpoint, info)
            return info

        return load


def _name(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.tinker_path}\n{checkpoint.version}"


def _key(checkpoint: Checkpoint) -> tuple[str, str, str]:
    return ("weights_info", checkpoint.tinker_path, checkpoint.version)
