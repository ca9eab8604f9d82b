"""Cache of generated files, which are rendered once per version of their entity.

Used by stat(), which needs the length, and by open(). Thread-safe.
"""

from typing import Any

import msgspec

from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.clock import Clock
from tinkerfs.validity import Validity
from tinkerfs.vfs.kernel_cache import ATTR_SETTLED_S
from tinkerfs.vfs.resolver import Node
from tinkerfs.vfs.schema import NodeContext

#: Size of the cache: some 10,000 files.
_MAX_BYTES = 16 << 20

#: Memory per file in addition to its path and content: objects, and an entry in a dictionary.
_OVERHEAD_BYTES = 320

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
        # Content does not depend on the generation, because a change of the entity reveals new
        # information. So a change of one entity does not make all other files be rendered.
        self._files: ValidatedCache[str, _CachedFile] = ValidatedCache(
            lambda validity, _generation: validity.check_and_touch(clock.monotonic()), _MAX_BYTES
        )

    def get(self, node: Node, context: NodeContext) -> bytes:
        """Return the content of a file, rendered now unless it is cached."""
        cached = self._cached(node)
        if cached is not None:
            context.ctx.depends_on_all(cached.validity)
            return cached.data
        now, validity = self._clock.monotonic(), Validity()
        tracking_context = msgspec.structs.replace(context, ctx=context.ctx.tracking(validity))
        try:
            data: bytes = node.row.render(tracking_context)
        finally:
            context.ctx.depends_on_all(validity)
        previous = self._files.peek(node.path)
        made_at = now if previous is None or previous.data != data else previous.made_at
        file = _CachedFile(data, node.entity, validity, made_at)
        weight = len(node.path) + len(data) + _OVERHEAD_BYTES
        self._files.put(node.path, file, validity, 0, weight=weight)
        return data

    def has(self, node: Node) -> bool:
        """Return whether the content of a file is cached and valid."""
        return self._cached(node) is not None

    def may_use_page_cache(self, node: Node) -> bool:
        """Return whether the kernel may cache the pages of a file while it is open.

        The kernel reads up to the size that it has cached, so every size that it may have cached
        must be the length of the current content.
        """
        cached = self._cached(node)
        return (
            cached is not None
            and self._clock.monotonic() - cached.made_at > ATTR_SETTLED_S
            and len(cached.data) <= _PAGE_BYTES
        )

    def _cached(self, node: Node) -> _CachedFile | None:
        cached = self._files.get(node.path)
        return cached if cached is not None and cached.entity is node.entity else None
