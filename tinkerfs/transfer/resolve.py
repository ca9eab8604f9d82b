"""Find the weights of a checkpoint, or of all checkpoints below a directory.

Used by commands that read weights without a mount. No archive is requested: a path within `files/`
is returned as it is, for `select_members` to compare with the members.
"""

import posixpath
import stat
from collections.abc import Mapping
from dataclasses import replace

from tinkerfs import errors, name_encoding
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.transfer.failure import Failure
from tinkerfs.vfs import entities, weights_nodes
from tinkerfs.vfs.filesystem import FileSystem
from tinkerfs.vfs.schema import Directory
from tinkerfs.vfs.weights_nodes import WeightsRef
from tinkerfs.weights.reader import MemberListing

_SCHEME = "tinker://"

#: Directories that are replaced by a view with links to the same checkpoints. The view needs one
#: listing, and the original one listing per run.
_VIEWS = {"/": "/checkpoints", "/runs": "/checkpoints"}


def path_of(tinker_path: str) -> str:
    """Return the path from the root for a tinker path of a checkpoint or a run.

    Raises:
        StartupError: the text is not a tinker path.
    """
    run_id = tinker_path.removeprefix(_SCHEME)
    try:
        if tinker_path.startswith(_SCHEME) and run_id and "/" not in run_id:
            return entities.run_path(run_id)
        return entities.path_for_tinker_path(TinkerPath.parse(tinker_path))
    except ValueError as error:
        raise errors.StartupError(str(error)) from None


def find_weights(
    filesystem: FileSystem, paths: Mapping[str, str], failures: list[Failure]
) -> tuple[list[WeightsRef], bool]:
    """Return the weights at some paths, without duplicates.

    A path without weights is appended to `failures`. The second result is whether the last path is
    that of a single checkpoint, archive or file.

    Args:
        filesystem: the file system of the paths.
        paths: name to display -> path from the root.
        failures: of other paths.
    """
    found: dict[object, WeightsRef] = {}
    one = None
    for name, path in paths.items():
        try:
            one = resolve_weights(filesystem, path, BACKGROUND_CONTEXT)
            below = [one] if one else iter_weights(filesystem, path, BACKGROUND_CONTEXT)
        except OSError as error:
            failures.append(Failure(name, error))
            continue
        if not below:
            failures.append(Failure(name, errors.StartupError("contains no checkpoints")))
        for each in below:
            is_adapter = each.base_model is not None
            key = (each.checkpoint.key, each.is_archive, each.member_path, is_adapter)
            found.setdefault(key, each)
    return list(found.values()), one is not None


def select_members(ref: WeightsRef, listing: MemberListing) -> list[str]:
    """Return the names of the archive members that a reference selects.

    Raises:
        OSError: ENOENT if it selects none.
    """

    def is_selected(name: str) -> bool:
        encoded = "/".join(map(name_encoding.encode, name.split("/")))
        return not ref.member_path or f"{encoded}/".startswith(f"{ref.member_path}/")

    found = [name for name in listing.members if is_selected(name)]
    if not found and ref.member_path:
        raise errors.not_found(ref.member_path)
    return found


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
        node = filesystem.resolve(resolved, ctx)
        weights = weights_nodes.weights_ref(node)
        if (
            node.spec in (weights_nodes.FILES, weights_nodes.ADAPTER)
            and weights is not None
            and ".." not in pending
        ):
            return replace(weights, member_path="/".join(pending))
    node = filesystem.resolve(resolved, ctx)
    weights = weights_nodes.weights_ref(node)
    if weights is None and not isinstance(node.spec, Directory):
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
        node = filesystem.resolve(child, ctx)
        weights = weights_nodes.weights_ref(node)
        if weights is not None:
            found.setdefault(weights.checkpoint.key, weights)
        elif isinstance(node.spec, Directory) and child not in seen:
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
