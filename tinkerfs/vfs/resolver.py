"""Path resolution: finds the spec in the layout table and the entity for a path.

Resolved directories are cached. A cached directory is valid until one of the API responses that it
was resolved from expires, or until the generation of the metadata changes. Looking up a name in a
cached directory does not start at the root. Thread-safe.
"""

from collections.abc import Iterator
from typing import Any

from tinkerfs import errors, name_encoding
from tinkerfs.cache.validated_cache import ValidatedCache
from tinkerfs.context import RequestContext
from tinkerfs.validity import Validity
from tinkerfs.vfs.deletion_guard import DeletionGuard
from tinkerfs.vfs.node import DIRECTORY_RANK, inode_for_path
from tinkerfs.vfs.schema import (
    Backend,
    ContentFile,
    ControlFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    Node,
    NodeSpec,
    Symlink,
)

#: The inode ranks put names that cannot be removed before and after the checkpoints of a run. They
#: also put read-only files before control files, so that a copy fails before it changes anything.
_RANKS = {GeneratedFile: 0, ContentFile: 0, Directory: DIRECTORY_RANK, Symlink: 2, ControlFile: 3}

#: Maximum number of cached directories, about 450 bytes each.
_MAX_DIRECTORIES = 16_384


class PathResolver:
    """Resolves paths and lists the children of directories.

    Args:
        root: the spec of the root.
        backend: the services that the functions of the table use.
        guard: knows which names are hidden from which callers.
    """

    def __init__(self, root: Directory, backend: Backend, guard: DeletionGuard) -> None:
        self._backend = backend
        self._guard = guard
        self._root = Node(backend, root, None, "/", None, Validity())
        self._directory_nodes: ValidatedCache[str, Node] = ValidatedCache(
            backend.check_and_touch, _MAX_DIRECTORIES
        )

    def resolve(self, path: str, ctx: RequestContext, *, include_hidden: bool = False) -> Node:
        """Return the node of a path.

        The validity of the node, or of the absence of the path, is added to `ctx`.

        Raises:
            OSError: ENOENT, ENOTDIR, or the failure of an API request.
        """
        try:
            node = self._resolve(path, ctx)
            if include_hidden or self._is_visible(node, ctx):
                return node
        except errors.ApiError as error:
            raise errors.os_error_from_api(error, path, is_lookup=True) from error
        raise errors.not_found(path)

    def children(self, directory: Node, ctx: RequestContext) -> Iterator[tuple[str, Node]]:
        """Yield the visible children of a directory by name, in the order of the table.

        Where possible a name is the string object of the table or of the record, so that cached
        listings share it.
        """
        backend, spec, entity = self._backend, directory.spec, directory.entity
        path = directory.path.rstrip("/")
        for child in spec.specs:
            if not isinstance(child, DynamicEntries):
                node = Node(backend, child, entity, f"{path}/{child.name}", directory)
                if self._is_visible(node, ctx):
                    yield child.name, node
            elif child.is_listed:
                for server_name, child_entity in self._list(child, directory, ctx):
                    name = child.encode(server_name)
                    child_path = f"{path}/{name}"
                    yield (
                        name,
                        Node(backend, child.spec or spec, child_entity, child_path, directory),
                    )

    def _resolve(self, path: str, ctx: RequestContext) -> Node:
        if path == "/":
            return self._root
        cached = self._directory_nodes.get(path)
        if cached is not None and cached.validity is not None:
            ctx.depends_on_all(cached.validity)
            return cached
        generation = self._backend.catalog.generation
        parent, _, name = path.rpartition("/")
        directory = self._resolve(parent or "/", ctx)
        if not isinstance(directory.spec, Directory):
            raise errors.not_a_directory(path)
        if not self._is_visible(directory, ctx):
            raise errors.not_found(path)
        assert directory.validity is not None
        static = directory.spec.static_children.get(name)
        if static is not None and not isinstance(static, Directory):
            return Node(
                self._backend, static, directory.entity, path, directory, directory.validity
            )
        validity = directory.validity.copy()
        if static is not None:
            node = Node(self._backend, static, directory.entity, path, directory, validity)
        else:
            try:
                spec, entity = self._look_up(directory, name, ctx.tracking(validity), path)
            finally:
                ctx.depends_on_all(validity)
            node = Node(self._backend, spec, entity, path, directory, validity)
        if isinstance(node.spec, Directory):
            self._directory_nodes.put(path, node, validity, generation)
        return node

    def _look_up(
        self, directory: Node, name: str, ctx: RequestContext, path: str
    ) -> tuple[NodeSpec, Any]:
        for entries in directory.spec.dynamic_children:
            entity = self._look_up_in(entries, directory, name, ctx)
            if entity is not None:
                return entries.spec or directory.spec, entity
        raise errors.not_found(path)

    def _look_up_in(
        self, entries: DynamicEntries, directory: Node, name: str, ctx: RequestContext
    ) -> Any:
        if name_encoding.is_probe_name(name):
            return None
        if name_encoding.is_truncated(name):
            listed = entries.list(directory, ctx)
            return next((e for n, e in listed if entries.encode(n) == name), None)
        try:
            return entries.lookup(directory, entries.decode(name), ctx)
        except ValueError:  # not the encoding of a server name
            return None

    def _list(
        self, entries: DynamicEntries, directory: Node, ctx: RequestContext
    ) -> Iterator[tuple[Any, Any]]:
        is_empty = True
        try:
            for item in entries.list(directory, ctx):
                is_empty = False
                yield item
        except errors.UnsupportedEndpoint as error:
            # If the server does not implement a listing, the directory is empty and `ls` succeeds.
            if not is_empty:
                raise
            if not error.is_local:
                failure = errors.os_error_from_api(error, directory.path)
                self._backend.telemetry.record_error(directory.path, "list", failure)

    def _is_visible(self, node: Node, ctx: RequestContext) -> bool:
        spec, directory = node.spec, node.parent
        if isinstance(spec, Symlink) and spec.is_optional and spec.target(node, ctx) is None:
            return False
        if (
            isinstance(spec, ControlFile)
            and spec.applies_to is not None
            and not spec.applies_to(node.entity)
        ):
            return False
        if not self._guard.has_hidden_files:
            return True
        ctx.mark_uncacheable()
        return (
            directory is None
            or not directory.is_checkpoint
            or spec.name not in self._guard.hidden(directory.path, ctx.caller().pgid)
        )


def inode_of(node: Node) -> int:
    """Return the inode number of a node."""
    return inode_for_path(node.path, _RANKS[type(node.spec)])
