"""Cache of FUSE replies by path, each valid as long as all of its dependencies.

A cached reply is ready to be copied to libfuse, which saves the path resolution. The key is the
path as libfuse passes it, in bytes. Thread-safe.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from tinkerfs.context import Validity

#: Number of paths after which the older half of the remembered paths is forgotten.
_MAX_GHOSTS = 32_768

T = TypeVar("T")


class _Reply(msgspec.Struct, Generic[T], frozen=True):
    value: T
    validity: Validity
    generation: int


class ReplyCache(Generic[T]):
    """Replies of one kind of request.

    Args:
        is_valid: `FileSystem.is_valid`.
        max_entries: the cache is cleared when it is full.
    """

    def __init__(self, is_valid: Callable[[Validity, int], bool], max_entries: int) -> None:
        self._is_valid = is_valid
        self._max_entries = max_entries
        # Single operations on a dict are atomic; replies are frozen.
        self._replies: dict[bytes, _Reply[T]] = {}
        self._ghosts: set[int] = set()
        self._previous_ghosts: set[int] = set()

    def get(self, path: bytes) -> T | None:
        """Return the cached reply, None if there is no valid one."""
        reply = self._replies.get(path)
        if reply is None or not self._is_valid(reply.validity, reply.generation):
            return None
        return reply.value

    def note_and_check(self, path: bytes) -> bool:
        """Record a request for a path; return whether there was another one recently.

        Only then its reply is worth caching, because a walk requests each path once. This is the
        admission filter of a 2Q cache, with hashes in place of paths.
        """
        key = hash(path)
        if key in self._ghosts or key in self._previous_ghosts:
            return True
        if len(self._ghosts) >= _MAX_GHOSTS:
            self._previous_ghosts, self._ghosts = self._ghosts, set()
        self._ghosts.add(key)
        return False

    def put(self, path: bytes, value: T, validity: Validity, generation: int) -> None:
        """Cache a reply, unless it is uncacheable.

        `generation` is `FileSystem.generation` from before the request was served.
        """
        if not validity.is_uncacheable:
            if len(self._replies) >= self._max_entries:
                self._replies.clear()
            self._replies[path] = _Reply(value, validity, generation)
