"""The control file `export` of a training checkpoint.

A server without archives exports a training checkpoint as external weights. That takes minutes and
uses the account's capacity, so only a write starts it.
"""

from functools import partial

from msgspec.structs import replace

from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import RequestContext
from tinkerfs.vfs import controls, render, weights_nodes
from tinkerfs.vfs.schema import ControlFile, Node

#: The text without an export; every checkpoint directory shows its length.
_NONE = render.line("none")


def _describe(node: Node, ctx: RequestContext) -> bytes:
    if node.backend.exports.is_idle(ctx):
        return _NONE
    description = node.backend.exports.describe(weights_nodes.version_of(node), ctx)
    return render.line(description)


def _write(node: Node, text: str, ctx: RequestContext) -> None:
    """Export the checkpoint for some time, or delete its export."""
    if not text.strip():
        return
    backend, checkpoint = node.backend, node.entity
    ttl_s = controls.parse_expiry_s(text, backend.clock.now(), node.path)
    version = weights_nodes.version_of(node)
    # An export has its own time-out, which is that of archives.
    ctx = replace(ctx, timeout_s=None)
    if ttl_s is None:
        backend.exports.delete(version, node.path, ctx)
        return
    check_current = partial(backend.mutations.check_current, checkpoint)
    backend.exports.export(version, ttl_s, node.path, ctx, check_current=check_current)


def _is_training(checkpoint: ListedCheckpoint) -> bool:
    return checkpoint.kind == "weights"


EXPORT = ControlFile(
    "export",
    "state of the export of a training checkpoint; write a duration to export, never to delete it",
    _describe,
    _write,
    applies_to=_is_training,
)
