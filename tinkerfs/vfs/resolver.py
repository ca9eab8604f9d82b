"""Nodes: paths resolved through the table, and folders' children.

A folder that was resolved is kept as long as everything that it was found by is fresh, and nothing
else has changed: so the next name in it costs two look-ups in dictionaries, whatever its depth, and
not a walk from the root. Thread-safe.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from tinkerfs import errors, name_encoding
from tinkerfs.context import RequestContext, Validity
from tinkerfs.vfs.removal_tracker import RemovalTracker
from tinkerfs.vfs.schema import (
    Backend,
    Directory,
    DynamicEntries,
    NodeContext,
    NodeSpec,
    RemovalPolicy,
    Symlink,
)

#: So many folders are kept before all are forgotten, some 400 bytes each: a walk comes to each
#: once, and then to what is in it.
_MAX_KEPT = 16_384


class Node(msgspec.Struct, frozen=True):
    """A resolved path: its row of the table, and what it is about.

    Attributes:
        row: never an `Each`, but one of its nodes.
        subject: as `Site.subject`.
        path: from the mount's root.
        parent: None for the root alone.
        lease: how long it holds; None for a child that a listing told.
        epoch: the catalogue's, from before it was looked for.
    """

    row: Any
    subject: Any
    path: str
    parent: "Node | None"
    lease: Validity | None = None
    epoch: int = 0


class PathResolver:
    """The nodes of one mount.

    Args:
        root: the root's row.
        model: what the table's functions may ask.
        removals: which names are hidden.
    """

    def __init__(self, root: Directory, model: Backend, removals: RemovalTracker) -> None:
        self._model = model
        self._removals = removals
        self._root = Node(root, None, "/", None, Validity())
        # Single operations on a dict are atomic; nodes are frozen.
        self._directory_nodes: dict[str, Node] = {}

    def resolve(self, path: str, ctx: RequestContext, *, include_hidden: bool = False) -> Node:
        """Return the node of a path; the call is told how long that holds, or its absence.

        Raises:
            OSError: ENOENT, ENOTDIR, and what asking the API for a name raises.
        """
        try:
            node = self._resolved(path, ctx)
            if include_hidden or self._is_visible(node, ctx):
                return node
        except errors.ApiError as error:
            raise errors.os_error_from_api(error, path, is_lookup=True) from error
        raise errors.not_found(path)

    def children(self, folder: Node, ctx: RequestContext) -> Iterator[tuple[str, Node]]:
        """Yield what is shown in a folder by name, in the table's order.

        A name is the table's or the record's own text where it can be: kept by many, once.
        """
        row, path, subject = folder.row, folder.path.rstrip("/"), folder.subject
        for each in row.rows:
            if not isinstance(each, DynamicEntries):
                node = Node(each, subject, f"{path}/{each.name}", folder)
                if self._is_visible(node, ctx):
                    yield each.name, node
            elif each.is_listed:
                for listed, about in self._listed(each, folder, ctx):
                    name = each.encode(listed)
                    yield name, Node(each.node or row, about, f"{path}/{name}", folder)

    def context_for(self, node: Node, ctx: RequestContext) -> NodeContext:
        """Return what the functions of a node's row are given."""
        return NodeContext(self._model, node.subject, node.path, ctx)

    def _resolved(self, path: str, ctx: RequestContext) -> Node:
        if path == "/":
            return self._root
        kept = self._directory_nodes.get(path)
        if (
            kept is not None
            and kept.epoch == self._model.catalogue.epoch
            and kept.lease is not None
            and kept.lease.check_and_touch(self._model.clock.monotonic())
        ):
            ctx.depends_on_all(kept.lease)
            return kept
        epoch = self._model.catalogue.epoch
        above, _, name = path.rpartition("/")
        folder = self._resolved(above or "/", ctx)
        if not isinstance(folder.row, Directory):
            raise errors.not_a_directory(path)
        if not self._is_visible(folder, ctx):
            raise errors.not_found(path)
        assert folder.lease is not None
        fixed = folder.row.static_children.get(name)
        if fixed is not None and not isinstance(fixed, Directory):
            return Node(fixed, folder.subject, path, folder)
        lease = folder.lease.copy()
        if fixed is not None:
            node = Node(fixed, folder.subject, path, folder, lease, epoch)
        else:
            try:
                row, subject = self._found(folder, name, ctx.tracking(lease), path)
            finally:
                ctx.depends_on_all(lease)
            node = Node(row, subject, path, folder, lease, epoch)
        if isinstance(node.row, Directory) and not lease.is_uncacheable:
            if len(self._directory_nodes) >= _MAX_KEPT:
                self._directory_nodes.clear()
            self._directory_nodes[path] = node
        return node

    def _found(
        self, folder: Node, name: str, ctx: RequestContext, path: str
    ) -> tuple[NodeSpec, Any]:
        for each in folder.row.dynamic_children:
            subject = self._find(each, folder, name, ctx)
            if subject is not None:
                return each.node or folder.row, subject
        raise errors.not_found(path)

    def _find(self, row: DynamicEntries, folder: Node, name: str, ctx: RequestContext) -> Any:
        if name_encoding.is_probe_name(name):
            return None
        site = self.context_for(folder, ctx)
        if name_encoding.is_truncated(name):
            return next((s for n, s in row.list(site) if row.encode(n) == name), None)
        try:
            return row.lookup(site, row.decode(name))
        except ValueError:  # no server name has this file name
            return None

    def _listed(
        self, row: DynamicEntries, folder: Node, ctx: RequestContext
    ) -> Iterator[tuple[Any, Any]]:
        is_empty = True
        try:
            for item in row.list(self.context_for(folder, ctx)):
                is_empty = False
                yield item
        except errors.UnsupportedEndpoint as error:
            # A listing that this server does not have leaves the folder empty, and `ls` working.
            if not is_empty:
                raise
            if not error.is_local:
                failure = errors.os_error_from_api(error, folder.path)
                self._model.telemetry.record_error(folder.path, "list", failure)

    def _is_visible(self, node: Node, ctx: RequestContext) -> bool:
        row, folder = node.row, node.parent
        if (
            isinstance(row, Symlink)
            and row.is_optional
            and row.target(self.context_for(node, ctx)) is None
        ):
            return False
        if not self._removals.has_tombstones:
            return True
        ctx.mark_uncacheable()
        return (
            folder is None
            or not is_checkpoint(folder)
            or not self._removals.is_hidden_in(folder.path)
            or row.name not in self._removals.hidden(folder.path, ctx.caller().pgid)
        )


def is_checkpoint(node: Node) -> bool:
    """Tell whether a node is the folder of a checkpoint, which `rm -r` deletes."""
    return isinstance(node.row, Directory) and node.row.removal is RemovalPolicy.CHECKPOINT
