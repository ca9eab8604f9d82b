"""Cache of generated files, which are rendered once per version of their entity.

Used by stat(), which needs the length, and by open(). Thread-safe.
"""

from typing import Any

import msgspec

from tinkerfs.clock import Clock
from tinkerfs.validity import Validity
from tinkerfs.vfs.resolver import Node
from tinkerfs.vfs.schema import NodeContext

#: Size of the cache, which is cleared when it is exceeded: some 10,000 files.
_MAX_BYTES = 16 << 20

#: Memory per file in addition to its path and content: objects, and an entry in a dictionary.
_OVERHEAD_BYTES = 320

#: The kernel caches the size of a file for 1 s after it has read the reply. On a busy machine it
#: reads the reply up to 1 s late. The rest is a tolerance for the clock.
KERNEL_ATTR_EXPIRY_S = 2.05

#: Pages of the kernel's page cache may belong to different versions, so a file that may be cached
#: must fit into one page.
_PAGE_BYTES = 4096


class _CachedFile(msgspec.Struct, frozen=True):
    """Content of a file.

    Attributes:
        made_at: when this content first appeared, on the monotonic clock.
    """

    data: bytes
    entity: Any
    validity: Validity
    made_at: float


class GeneratedFileCache:
    """The content of generated files, by path and entity."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Single operations on a dict are atomic. Concurrent updates may leave a wrong total, which
        # is corrected when the cache is cleared.
        self._files: dict[str, _CachedFile] = {}
        self._total_bytes = 0

    def get(self, node: Node, context: NodeContext) -> bytes:
        """Return the content of a file, rendered now unless it is cached."""
        now = self._clock.monotonic()
        cached = self._files.get(node.path)
        if cached is not None and _is_valid(cached, node, now):
            context.ctx.depends_on_all(cached.validity)
            return cached.data
        validity = Validity()
        tracking_context = msgspec.structs.replace(context, ctx=context.ctx.tracking(validity))
        try:
            data: bytes = node.row.render(tracking_context)
        finally:
            context.ctx.depends_on_all(validity)
        if not validity.is_uncacheable:
            is_same = cached is not None and cached.data == data
            made_at = cached.made_at if cached is not None and is_same else now
            self._store(node.path, _CachedFile(data, node.entity, validity, made_at))
        return data

    def has(self, node: Node) -> bool:
        """Return whether the content of a file is cached and valid."""
        cached = self._files.get(node.path)
        return cached is not None and _is_valid(cached, node, self._clock.monotonic())

    def may_use_page_cache(self, node: Node) -> bool:
        """Return whether the kernel may cache the pages of a file while it is open.

        The kernel reads up to the size that it has cached, so every size that it may have cached
        must be the length of the current content.
        """
        now = self._clock.monotonic()
        cached = self._files.get(node.path)
        return (
            cached is not None
            and now - cached.made_at > KERNEL_ATTR_EXPIRY_S
            and len(cached.data) <= _PAGE_BYTES
            and _is_valid(cached, node, now)
        )

    def _store(self, path: str, file: _CachedFile) -> None:
        if self._total_bytes > _MAX_BYTES:
            self._files.clear()
            self._total_bytes = 0
        self._files[path] = file
        self._total_bytes += len(path) + len(file.data) + _OVERHEAD_BYTES


def _is_valid(cached: _CachedFile, node: Node, now: float) -> bool:
    return cached.entity is node.entity and cached.validity.check_and_touch(now)
