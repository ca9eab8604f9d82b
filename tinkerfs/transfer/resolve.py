"""Find the weights of a checkpoint, or of all checkpoints below a directory.

Used by commands that read weights without a mount. No archive is requested: a path within `files/`
is returned as it is, for the caller to compare with the members.
"""

import posixpath
import stat
from dataclasses import replace

from tinkerfs import errors
from tinkerfs.context import RequestContext
from tinkerfs.vfs import weights_nodes
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.schema import Directory
from tinkerfs.vfs.weights_nodes import WeightsRef

#: Directories that are replaced by a view with links to the same checkpoints. The view needs one
#: listing, and the original one listing per run.
_VIEWS = {"/": "/checkpoints", "/runs": "/checkpoints"}


def resolve_weights(filesystem: FileSystem, path: str, ctx: RequestContext) -> WeightsRef | None:
    """Return the weights for a path; None for a directory of checkpoints or of runs.

    Args:
        filesystem: the file system of the path.
        path: from the root; symbolic links are followed.
        ctx: deadline and cancellation.

    Raises:
        OSError: ENOENT if the path does not exist; EINVAL for a file without weights; or as
            `FileSystem.stat`.
    """
    resolved, pending = "/", [name for name in path.split("/") if name]
    while pending:
        resolved = filesystem.realpath(posixpath.join(resolved, pending.pop(0)), ctx)
        row, context = filesystem.resolve(resolved, ctx)
        weights = weights_nodes.weights_ref(row, context)
        if (
            row in (weights_nodes.FILES, weights_nodes.ADAPTER)
            and weights is not None
            and ".." not in pending
        ):
            return replace(weights, member_path="/".join(pending))
    row, context = filesystem.resolve(resolved, ctx)
    weights = weights_nodes.weights_ref(row, context)
    if weights is None and not isinstance(row, Directory):
        raise errors.invalid(path, "neither a checkpoint nor weights")
    return weights


def iter_weights(filesystem: FileSystem, path: str, ctx: RequestContext) -> list[WeightsRef]:
    """Return the weights of every checkpoint below or linked in a directory, once.

    Args:
        filesystem: the file system of the path.
        path: from the root; symbolic links are followed.
        ctx: cancellation, and a deadline for each listing.

    Raises:
        OSError: as `FileSystem.listdir`.
    """
    root = filesystem.realpath(path, ctx)
    found: dict[tuple[str, str, str], WeightsRef] = {}
    pending, seen = [_VIEWS.get(root, root)], {root}

    def visit(child: str) -> bool:
        # Adds the weights of a path or queues a directory, and returns whether there were weights.
        row, context = filesystem.resolve(child, ctx)
        weights = weights_nodes.weights_ref(row, context)
        if weights is not None:
            found.setdefault(weights.checkpoint.key, weights)
        elif isinstance(row, Directory) and child not in seen:
            seen.add(child)
            pending.append(child)
        return weights is not None

    while pending:
        directory = pending.pop(0)
        for entry in filesystem.listdir(directory, ctx):
            child = posixpath.join(directory, entry.name)
            if stat.S_ISDIR(entry.mode):
                visit(child)
            elif stat.S_ISLNK(entry.mode) and not visit(child):
                try:
                    visit(filesystem.realpath(child, ctx))
                except OSError as error:  # the target of `latest` may be deleted
                    if not errors.is_missing(error):
                        raise
    return list(found.values())
