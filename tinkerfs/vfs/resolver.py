"""Nodes: paths resolved through the table, and folders' children.

A folder that was resolved is kept as long as everything that it was found by is fresh, and nothing
else has changed: so the next name in it costs two look-ups in dictionaries, whatever its depth, and
not a walk from the root. Thread-safe.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from tinkerfs import errors, name_encoding
from tinkerfs.context import Call, Lease
from tinkerfs.vfs.removal_tracker import Removals
from tinkerfs.vfs.schema import Each, Folder, Link, Model, Removal, Row, Site

__all__ = ["Node", "Nodes", "is_checkpoint"]

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
    lease: Lease | None = None
    epoch: int = 0


class Nodes:
    """The nodes of one mount.

    Args:
        root: the root's row.
        model: what the table's functions may ask.
        removals: which names are hidden.
    """

    def __init__(self, root: Folder, model: Model, removals: Removals) -> None:
        self._model = model
        self._removals = removals
        self._root = Node(root, None, "/", None, Lease())
        # Single operations on a dict are atomic; nodes are frozen.
        self._kept: dict[str, Node] = {}

    def resolve(self, path: str, call: Call, *, with_hidden: bool = False) -> Node:
        """Return the node of a path; the call is told how long that holds, or its absence.

        Raises:
            OSError: ENOENT, ENOTDIR, and what asking the API for a name raises.
        """
        try:
            node = self._resolved(path, call)
            if with_hidden or self._is_shown(node, call):
                return node
        except errors.ApiError as error:
            raise errors.from_api(error, path, is_lookup=True) from error
        raise errors.not_found(path)

    def children(self, folder: Node, call: Call) -> Iterator[tuple[str, Node]]:
        """Yield what is shown in a folder by name, in the table's order.

        A name is the table's or the record's own text where it can be: kept by many, once.
        """
        row, path, subject = folder.row, folder.path.rstrip("/"), folder.subject
        for each in row.rows:
            if not isinstance(each, Each):
                node = Node(each, subject, f"{path}/{each.name}", folder)
                if self._is_shown(node, call):
                    yield each.name, node
            elif each.is_listed:
                for listed, about in self._listed(each, folder, call):
                    name = each.encode(listed)
                    yield name, Node(each.node or row, about, f"{path}/{name}", folder)

    def site(self, node: Node, call: Call) -> Site:
        """Return what the functions of a node's row are given."""
        return Site(self._model, node.subject, node.path, call)

    def _resolved(self, path: str, call: Call) -> Node:
        if path == "/":
            return self._root
        kept = self._kept.get(path)
        if (
            kept is not None
            and kept.epoch == self._model.catalogue.epoch
            and kept.lease is not None
            and kept.lease.holds(self._model.clock.monotonic())
        ):
            call.rests_on_all_of(kept.lease)
            return kept
        epoch = self._model.catalogue.epoch
        above, _, name = path.rpartition("/")
        folder = self._resolved(above or "/", call)
        if not isinstance(folder.row, Folder):
            raise errors.not_a_directory(path)
        if not self._is_shown(folder, call):
            raise errors.not_found(path)
        assert folder.lease is not None
        fixed = folder.row.fixed.get(name)
        if fixed is not None and not isinstance(fixed, Folder):
            return Node(fixed, folder.subject, path, folder)
        lease = folder.lease.extended()
        if fixed is not None:
            node = Node(fixed, folder.subject, path, folder, lease, epoch)
        else:
            try:
                row, subject = self._found(folder, name, call.leasing(lease), path)
            finally:
                call.rests_on_all_of(lease)
            node = Node(row, subject, path, folder, lease, epoch)
        if isinstance(node.row, Folder) and not lease.is_void:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[path] = node
        return node

    def _found(self, folder: Node, name: str, call: Call, path: str) -> tuple[Row, Any]:
        for each in folder.row.each:
            subject = self._find(each, folder, name, call)
            if subject is not None:
                return each.node or folder.row, subject
        raise errors.not_found(path)

    def _find(self, row: Each, folder: Node, name: str, call: Call) -> Any:
        if name_encoding.is_software_probe(name):
            return None
        site = self.site(folder, call)
        if name_encoding.is_cut(name):
            return next((s for n, s in row.list(site) if row.encode(n) == name), None)
        try:
            return row.find(site, row.decode(name))
        except ValueError:  # no server name has this file name
            return None

    def _listed(self, row: Each, folder: Node, call: Call) -> Iterator[tuple[Any, Any]]:
        is_empty = True
        try:
            for item in row.list(self.site(folder, call)):
                is_empty = False
                yield item
        except errors.EndpointMissing as error:
            # A listing that this server does not have leaves the folder empty, and `ls` working.
            if not is_empty:
                raise
            if not error.is_remembered:
                failure = errors.from_api(error, folder.path)
                self._model.telemetry.failed(folder.path, "list", failure)

    def _is_shown(self, node: Node, call: Call) -> bool:
        row, folder = node.row, node.parent
        if isinstance(row, Link) and row.is_optional and row.target(self.site(node, call)) is None:
            return False
        if not self._removals.is_anything_hidden:
            return True
        call.is_momentary()
        return (
            folder is None
            or not is_checkpoint(folder)
            or not self._removals.is_hidden_in(folder.path)
            or row.name not in self._removals.hidden(folder.path, call.caller().group)
        )


def is_checkpoint(node: Node) -> bool:
    """Tell whether a node is the folder of a checkpoint, which `rm -r` deletes."""
    return isinstance(node.row, Folder) and node.row.removal is Removal.CHECKPOINT
