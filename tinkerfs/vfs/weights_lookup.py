"""Whose weights a path names: of one checkpoint, or of all below a folder.

For what acts on weights as such, without a kernel. Nothing here asks for an archive: a name within
`files/` is left for who knows the members.
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

#: What holds links to all there is, by one listing: where every run would take one of its own.
_ALL = {"/": "/checkpoints", "/runs": "/checkpoints"}


def resolve_weights(filesystem: FileSystem, path: str, ctx: RequestContext) -> WeightsRef | None:
    """Return the weights that a path names; None where it is a folder of checkpoints or of runs.

    Args:
        filesystem: where it is looked up.
        path: from the root; links are followed.
        ctx: how long to wait.

    Raises:
        OSError: ENOENT where there is no such name; EINVAL where it is a file without weights; as
            `FileSystem.stat`.
    """
    place, rest = "/", [part for part in path.split("/") if part]
    while rest:
        place = filesystem.realpath(posixpath.join(place, rest.pop(0)), ctx)
        row, site = filesystem.resolve(place, ctx)
        found = weights_nodes.weights_ref(row, site)
        if (
            row in (weights_nodes.FILES, weights_nodes.ADAPTER)
            and found is not None
            and ".." not in rest
        ):
            return replace(found, member_path="/".join(rest))
    row, site = filesystem.resolve(place, ctx)
    found = weights_nodes.weights_ref(row, site)
    if found is None and not isinstance(row, Directory):
        raise errors.invalid(path, "it is neither a checkpoint nor weights")
    return found


def iter_weights(filesystem: FileSystem, path: str, ctx: RequestContext) -> list[WeightsRef]:
    """Return the weights of every checkpoint that a folder holds or links to, each once.

    Args:
        filesystem: where they are looked up.
        path: from the root; links are followed.
        ctx: how long to wait for each listing.

    Raises:
        OSError: as `FileSystem.listdir`.
    """
    first = filesystem.realpath(path, ctx)
    found: dict[tuple[str, str, str], WeightsRef] = {}
    folders, seen = [_ALL.get(first, first)], {first}

    def take(place: str) -> bool:
        row, site = filesystem.resolve(place, ctx)
        holding = weights_nodes.weights_ref(row, site)
        if holding is not None:
            found.setdefault(holding.checkpoint.key, holding)
        elif isinstance(row, Directory) and place not in seen:
            seen.add(place)
            folders.append(place)
        return holding is not None

    while folders:
        folder = folders.pop(0)
        for entry in filesystem.listdir(folder, ctx):
            place = posixpath.join(folder, entry.name)
            if stat.S_ISDIR(entry.mode):
                take(place)
            elif stat.S_ISLNK(entry.mode) and not take(place):
                try:
                    take(filesystem.realpath(place, ctx))
                except OSError as error:  # `latest` may lead to what is gone
                    if not errors.is_missing(error):
                        raise
    return list(found.values())
