"""Cache of generated files, which are rendered once per version of their entity.

Used by stat(), which needs the length, and by open(). Thread-safe.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.clock import Clock
from tinkerfs.context import RequestContext
from tinkerfs.validity import Validity
from tinkerfs.vfs.handles import GeneratedFileHandle
from tinkerfs.vfs.kernel_cache import ATTR_SETTLED_S
from tinkerfs.vfs.schema import Node

#: Size of the cache: some 10,000 files.
_MAX_BYTES = 16 << 20

#: Memory per file in addition to its path and content: objects, and an entry in a dictionary.
_OVERHEAD_BYTES = 320

#: Pages of the kernel's page cache may belong to different versions, so a file that may be cached
#: must fit into one page.
_PAGE_BYTES = 4096


class _CachedFile(msgspec.Struct):
    """Content of a file.

    Attributes:
        made_at: when this content first appeared, on the monotonic clock.
        opened: the handle that opens share; None until the kernel may cache the pages.
    """

    data: bytes
    entity: Any
    validity: Validity
    made_at: float
    opened: "_SharedHandle | None" = None


class _SharedHandle(NamedTuple):
    """A handle, and how long its path leads to the content."""

    handle: GeneratedFileHandle
    validity: Validity
    generation: int


class GeneratedFileCache:
    """The content of generated files, by path and entity.

    Args:
        clock: the clock of the mount.
        check: returns whether a path that was resolved leads to the same node.
    """

    def __init__(self, clock: Clock, check: Callable[[Validity, int], bool]) -> None:
        self._clock = clock
        self._check = check
        # Content does not depend on the generation, because a change of the entity reveals new
        # information. So a change of one entity does not make all other files be rendered.
        self._files: ValidatedCache[str, _CachedFile] = ValidatedCache(
            lambda validity, _generation: validity.check_and_touch(clock.with_suspend()), _MAX_BYTES
        )

    def shared_handle(self, path: str) -> GeneratedFileHandle | None:
        """Return a handle that `open` returned for a path, if a new one would equal it."""
        file = self._files.get(path)
        opened = None if file is None else file.opened
        if opened is None or not self._check(opened.validity, opened.generation):
            return None
        return opened.handle

    def open(self, node: Node, generation: int, ctx: RequestContext) -> GeneratedFileHandle:
        """Return a handle with the content of a file.

        Args:
            node: the file, as the resolver returned it for its path.
            generation: the generation of the metadata before the node was resolved.
            ctx: as `get`.
        """
        data = self.get(node, ctx)
        file = self._cached(node)
        if file is None or not self._may_use_page_cache(file):
            return GeneratedFileHandle(node.path, data, direct_io=True)
        handle = GeneratedFileHandle(node.path, file.data, direct_io=False)
        assert node.validity is not None
        file.opened = _SharedHandle(handle, node.validity, generation)
        return handle

    def get(self, node: Node, ctx: RequestContext) -> bytes:
        """Return the content of a file, rendered now unless it is cached."""
        cached = self._cached(node)
        if cached is not None:
            ctx.depends_on_all(cached.validity)
            return cached.data
        now, validity = self._clock.monotonic(), Validity()
        try:
            data: bytes = node.spec.render(node, ctx.tracking(validity))
        finally:
            ctx.depends_on_all(validity)
        previous = self._files.peek(node.path)
        made_at = now if previous is None or previous.data != data else previous.made_at
        file = _CachedFile(data, node.entity, validity, made_at)
        weight = len(node.path) + len(data) + _OVERHEAD_BYTES
        self._files.put(node.path, file, validity, 0, weight=weight)
        return data

    def has(self, node: Node) -> bool:
        """Return whether the content of a file is cached and valid."""
        return self._cached(node) is not None

    def _may_use_page_cache(self, file: _CachedFile) -> bool:
        """Return whether the kernel may cache the pages of a file while it is open.

        The kernel reads up to the size that it has cached, so every size that it may have cached
        must be the length of the current content.
        """
        return (
            self._clock.monotonic() - file.made_at > ATTR_SETTLED_S
            and len(file.data) <= _PAGE_BYTES
        )

    def _cached(self, node: Node) -> _CachedFile | None:
        cached = self._files.get(node.path)
        return cached if cached is not None and cached.entity is node.entity else None
