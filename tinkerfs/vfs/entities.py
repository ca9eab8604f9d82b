"""Paths, modification times and extended attributes of runs and checkpoints."""

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tinkerfs import errors, name_encoding
from tinkerfs.api import models
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import RequestContext
from tinkerfs.tinker_path import KINDS, TinkerPath
from tinkerfs.vfs import render
from tinkerfs.vfs.schema import Node

P = ParamSpec("P")
T = TypeVar("T")


def run_path(run_id: str) -> str:
    """Return the path of a training run from the mount's root."""
    return f"/runs/{name_encoding.encode(run_id)}"


def checkpoint_path(checkpoint: ListedCheckpoint) -> str:
    """Return the canonical path of a checkpoint from the mount's root."""
    kind, name = checkpoint.kind, name_encoding.encode(checkpoint.name)
    if kind not in KINDS:
        kind = name_encoding.encode(kind)
    return f"{run_path(checkpoint.run_id)}/checkpoints/{kind}/{name}"


def path_for_tinker_path(path: TinkerPath) -> str:
    """Return the path from the mount's root for a tinker path."""
    # Older two-part paths and the paths of hatchery have no kind; the bare name resolves too.
    kind = "" if path.kind in ("", "checkpoints") else f"{name_encoding.encode(path.kind)}/"
    return f"{run_path(path.run_id)}/checkpoints/{kind}{name_encoding.encode(path.name)}"


def list_runs(node: Node, ctx: RequestContext) -> Iterator[tuple[str, models.TrainingRun]]:
    """Yield the user's training runs by id."""
    return ((run.run_id, run) for run in node.backend.catalog.runs.iter(ctx))


def find_run(node: Node, run_id: str, ctx: RequestContext) -> models.TrainingRun | None:
    """Return a training run, which need not be listed, or None."""
    return absent_as_none(node.backend.catalog.run, run_id, ctx)


def absent_as_none(find: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Call a function that finds an entity; return None if its absence is cached.

    An absence that the server has just reported is raised, so that the reason is recorded once.
    """
    try:
        return find(*args, **kwargs)
    except errors.NOT_FOUND_ERRORS as error:
        if error.is_local:
            return None
        raise


def run_ns(node: Node, _ctx: RequestContext) -> int:
    """Return the time of the last request to a training run."""
    time_ns: int | None = node.entity.last_request_time_ns
    return node.backend.started_ns if time_ns is None else time_ns


def newest_run_ns(node: Node, ctx: RequestContext) -> int:
    """Return the time of the last request to any run of the user, from the cache."""
    runs = node.backend.catalog.runs.peek(ctx)
    changed_ns = node.backend.catalog.runs.last_changed_ns()
    return mtime_or_mount_time(node, changed_ns, runs.newest_ns if runs else None)


def checkpoint_ns(node: Node, _ctx: RequestContext) -> int:
    """Return when a checkpoint was saved."""
    time_ns: int | None = node.entity.record.time_ns
    return node.backend.started_ns if time_ns is None else time_ns


def stored_bytes(node: Node) -> int:
    """Return the number of bytes that the server stores for a checkpoint."""
    return node.entity.record.size_bytes or 0


def run_xattrs(node: Node, _ctx: RequestContext) -> dict[str, str]:
    """Return the extended attributes of a training run."""
    run: models.TrainingRun = node.entity
    return _without_none(
        {
            "tinker.base_model": run.base_model,
            "tinker.lora_rank": run.lora_rank,
            "tinker.time": _rfc3339(run.last_request_time_ns),
        }
    )


def checkpoint_xattrs(node: Node, ctx: RequestContext) -> dict[str, str]:
    """Return the extended attributes of a checkpoint."""
    checkpoint: ListedCheckpoint = node.entity
    # Resolving the checkpoint has loaded the run already.
    return _checkpoint_facts(checkpoint, node.backend.catalog.run(checkpoint.run_id, ctx))


def listed_checkpoint_facts(node: Node, ctx: RequestContext) -> dict[str, str]:
    """Return the same values of a checkpoint in a view; those of its run only if it is cached."""
    checkpoint: ListedCheckpoint = node.entity
    runs = node.backend.catalog.runs.peek(ctx)
    return _checkpoint_facts(checkpoint, runs.by_id.get(checkpoint.run_id) if runs else None)


def _checkpoint_facts(
    checkpoint: ListedCheckpoint, run: models.TrainingRun | None
) -> dict[str, str]:
    record = checkpoint.record
    return _without_none(
        {
            "tinker.path": checkpoint.tinker_path,
            "tinker.base_model": run.base_model if run else None,
            "tinker.lora_rank": run.lora_rank if run else None,
            "tinker.public": int(record.is_public),
            "tinker.size_bytes": record.size_bytes,
            "tinker.time": _rfc3339(record.time_ns),
            "tinker.expires_at": _rfc3339(record.expires_at_ns) or "never",
        }
    )


def _rfc3339(time_ns: int | None) -> str | None:
    return None if time_ns is None else render.rfc3339_ns(time_ns)


def _without_none(values: dict[str, str | int | None]) -> dict[str, str]:
    """Return the values as strings, without those that the server did not report."""
    return {name: str(value) for name, value in values.items() if value is not None}


def mtime_or_mount_time(node: Node, *times_ns: int | None) -> int:
    """Return the latest of the known times, but not a time before the mount.

    It is for directories that stat() does not list: the time must not change when tar reads one.
    """
    return newest_ns(node, node.backend.started_ns, *times_ns)


def newest_ns(node: Node, *times_ns: int | None) -> int:
    """Return the latest of the known times, or the time of mounting.

    A directory is as new as its newest entry and as the last change that was observed in it. So
    `make`, `rsync -u` and file managers notice a removed entry.
    """
    return max((time for time in times_ns if time is not None), default=node.backend.started_ns)
