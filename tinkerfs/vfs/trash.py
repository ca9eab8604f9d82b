"""`/.tinkerfs/trash`: what was removed with `--trash`, and which path there stands for what.

A link leads to a directory beside it that no listing shows, because the checkpoint's own path does
not resolve.
"""

from collections.abc import Iterator

from tinkerfs import name_encoding
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs import controls, entities, render
from tinkerfs.vfs.schema import (
    ControlFile,
    Directory,
    DynamicEntries,
    NodeContext,
    NodeSpec,
    Symlink,
)

_PLACE = "/.tinkerfs/trash"


def _list_trashed(site: NodeContext) -> Iterator[tuple[tuple[str, str, str], Checkpoint]]:
    for checkpoint in site.model.trash.checkpoints(site.call):
        yield checkpoint.key, checkpoint


def _find_trashed(site: NodeContext, parts: tuple[str, ...]) -> Checkpoint | None:
    if len(parts) != 3:
        return None
    run_id, kind, name = parts
    return site.model.trash.checkpoint((run_id, kind, name), site.call)


def _list_versions(site: NodeContext) -> Iterator[tuple[tuple[str, ...], Checkpoint]]:
    for checkpoint in site.model.trash.checkpoints(site.call):
        yield (*checkpoint.key, checkpoint.version), checkpoint


def _find_version(site: NodeContext, parts: tuple[str, ...]) -> Checkpoint | None:
    found = _find_trashed(site, parts[:3]) if len(parts) == 4 else None
    return found if found is not None and found.version == parts[3] else None


def _expiry_ns(site: NodeContext) -> int:
    expires_at_ns: int | None = site.entity.record.expires_at_ns
    return site.model.started_ns if expires_at_ns is None else expires_at_ns


def _expires_at(site: NodeContext) -> bytes:
    return render.line(render.rfc3339_ns(_expiry_ns(site)))


def _trash_ns(site: NodeContext) -> int:
    return entities.mtime_or_mount_time(site, site.model.trash.changed_ns())


def _target(site: NodeContext) -> str:
    checkpoint: Checkpoint = site.entity
    return f"{_PLACE}/{name_encoding.encode_composite((*checkpoint.key, checkpoint.version))}"


def trash_directory(rows: tuple[NodeSpec, ...]) -> Directory:
    """Return the directory of the trash.

    Args:
        rows: those of a checkpoint's own directory that mean the same in the trash.
    """
    expires_at = ControlFile(
        "expires_at",
        'when it will be gone; "never" written restores it with the expiry it had before',
        _expires_at,
        controls.store_trashed_expires_at,
    )
    link = Symlink(
        "<run_id>@<kind>@<name>",
        "a removed checkpoint; its time is when it will be gone",
        _target,
        mtime_ns=_expiry_ns,
    )
    checkpoint = Directory(
        "<run_id>@<kind>@<name>@<version>",
        "where the link leads; not listed",
        (*rows, expires_at),
        entities.checkpoint_ns,
        entities.stored_bytes,
        xattrs=entities.checkpoint_xattrs,
    )
    return Directory(
        "trash",
        "what was removed with --trash and is not gone yet",
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
    """Return the paths of the links in the trash that a path may stand for (pure).

    Several are returned where the path does not say which kind of checkpoint is meant.

    Args:
        path: from the mount's root: a link in the trash, a path that a checkpoint had before it was
            removed, or a path below one of these.

    Raises:
        ValueError: it is none of these, or has a part that was shortened to fit.
    """
    return [f"{_PLACE}/{name}" for name in _link_names(path.strip("/").split("/"))]


def _link_names(parts: list[str]) -> list[str]:
    if parts[:2] in ([".tinkerfs", "trash"], ["adapters", ".content"]):
        parts = parts[1:]
    match parts:
        case ["trash" | "checkpoints" | "published" | "expiring" | "adapters", name, *_]:
            if name_encoding.is_truncated(name):  # in all of them alike
                return [name]
            key = name_encoding.decode_composite(name)
            if len(key) in (3, 4):  # the fourth part is the version
                return [name_encoding.encode_composite(key[:3])]
        case [".content", run_id, kind, name, *_]:
            return [name_encoding.encode_composite(map(name_encoding.decode, (run_id, kind, name)))]
        case ["runs", run_id, "checkpoints", kind, name, *_]:
            run_id, kind, name = map(name_encoding.decode, (run_id, kind, name))
            # In hatchery's paths `checkpoints` stands where others have the kind.
            return [name_encoding.encode_composite((run_id, each, name)) for each in _kinds(kind)]
        case ["runs", run_id, "checkpoints", name]:
            run_id, name = name_encoding.decode(run_id), name_encoding.decode(name)
            return [name_encoding.encode_composite((run_id, kind, name)) for kind in KINDS]
    raise ValueError("not a path of a checkpoint")


def _kinds(kind: str) -> tuple[str, ...]:
    return (kind,) if kind in KINDS else KINDS
