"""`/.tinkerfs/trash`: checkpoints that were removed with `--trash`.

The target of a link is an unlisted directory in the trash, because the original path of the
checkpoint does not resolve.
"""

from collections.abc import Iterator

from tinkerfs import name_encoding
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import RequestContext
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs import controls, entities, render
from tinkerfs.vfs.schema import (
    ControlFile,
    Directory,
    DynamicEntries,
    Node,
    NodeSpec,
    Symlink,
)

_TRASH = "/.tinkerfs/trash"


def _list_trashed(
    node: Node, ctx: RequestContext
) -> Iterator[tuple[tuple[str, str, str], ListedCheckpoint]]:
    for checkpoint in node.backend.catalog.trashed_checkpoints(ctx):
        yield checkpoint.key, checkpoint


def _find_trashed(
    node: Node, parts: tuple[str, ...], ctx: RequestContext
) -> ListedCheckpoint | None:
    if len(parts) != 3:
        return None
    run_id, kind, name = parts
    return node.backend.catalog.trashed_checkpoint((run_id, kind, name), ctx)


def _list_versions(
    node: Node, ctx: RequestContext
) -> Iterator[tuple[tuple[str, ...], ListedCheckpoint]]:
    for checkpoint in node.backend.catalog.trashed_checkpoints(ctx):
        yield (*checkpoint.key, checkpoint.version), checkpoint


def _find_version(
    node: Node, parts: tuple[str, ...], ctx: RequestContext
) -> ListedCheckpoint | None:
    checkpoint = _find_trashed(node, parts[:3], ctx) if len(parts) == 4 else None
    return checkpoint if checkpoint is not None and checkpoint.version == parts[3] else None


def _expiry_ns(node: Node, _ctx: RequestContext) -> int:
    expires_at_ns: int | None = node.entity.record.expires_at_ns
    return node.backend.started_ns if expires_at_ns is None else expires_at_ns


def _expires_at(node: Node, ctx: RequestContext) -> bytes:
    return render.line(render.rfc3339_ns(_expiry_ns(node, ctx)))


def _trash_ns(node: Node, _ctx: RequestContext) -> int:
    return entities.mtime_or_mount_time(node, node.backend.catalog.trash_last_changed_ns())


def _target(node: Node, _ctx: RequestContext) -> str:
    checkpoint: ListedCheckpoint = node.entity
    return f"{_TRASH}/{name_encoding.encode_composite((*checkpoint.key, checkpoint.version))}"


def trash_directory(specs: tuple[NodeSpec, ...]) -> Directory:
    """Return the trash directory.

    Args:
        specs: those of a checkpoint's directory that have the same meaning in the trash.
    """
    expires_at = ControlFile(
        "expires_at",
        'time of the final deletion; write "never" to restore the checkpoint and its expiry',
        _expires_at,
        controls.write_trashed_expires_at,
    )
    link = Symlink(
        "<run_id>@<kind>@<name>",
        "a removed checkpoint; its mtime is the time of the final deletion",
        _target,
        mtime_ns=_expiry_ns,
    )
    checkpoint = Directory(
        "<run_id>@<kind>@<name>@<version>",
        "the target of the link; not listed",
        (*specs, expires_at),
        entities.checkpoint_ns,
        entities.stored_bytes,
        xattrs=entities.checkpoint_xattrs,
    )
    return Directory(
        "trash",
        "checkpoints that were removed with --trash and are not yet deleted",
        (
            DynamicEntries(
                link,
                _list_trashed,
                _find_trashed,
                True,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
            DynamicEntries(
                checkpoint,
                _list_versions,
                _find_version,
                False,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
        ),
        _trash_ns,
    )


def trash_paths(path: str) -> list[str]:
    """Return the possible paths in the trash of the checkpoint of a path.

    There are several if the path does not contain the kind of the checkpoint.

    Args:
        path: from the mount's root: a link in the trash, a path that a checkpoint had before it was
            removed, or a path below one of these.

    Raises:
        ValueError: the path is of another form, or contains a truncated name.
    """
    return [f"{_TRASH}/{name}" for name in _link_names(path.strip("/").split("/"))]


def _link_names(parts: list[str]) -> list[str]:
    if parts[:2] in ([".tinkerfs", "trash"], ["adapters", ".content"]):
        parts = parts[1:]
    match parts:
        case ["trash" | "checkpoints" | "published" | "expiring" | "adapters", name, *_]:
            if name_encoding.is_truncated(name):  # alike in all of these directories
                return [name]
            key = name_encoding.decode_composite(name)
            if len(key) in (3, 4):  # the fourth part is the version
                return [name_encoding.encode_composite(key[:3])]
        case [".content", run_id, kind, name, *_]:
            return [name_encoding.encode_composite(map(name_encoding.decode, (run_id, kind, name)))]
        case ["runs", run_id, "checkpoints", kind, name, *_]:
            run_id, kind, name = map(name_encoding.decode, (run_id, kind, name))
            # Paths of hatchery have `checkpoints` in the place of the kind.
            return [name_encoding.encode_composite((run_id, k, name)) for k in _kinds(kind)]
        case ["runs", run_id, "checkpoints", name]:
            run_id, name = name_encoding.decode(run_id), name_encoding.decode(name)
            return [name_encoding.encode_composite((run_id, kind, name)) for kind in KINDS]
    raise ValueError("not a path of a checkpoint")


def _kinds(kind: str) -> tuple[str, ...]:
    return (kind,) if kind in KINDS else KINDS
