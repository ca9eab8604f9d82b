"""What the rows about runs and checkpoints share: where these stand, and when they changed."""

from collections.abc import Iterator

from tinkerfs import errors, name_encoding
from tinkerfs.api import models
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.vfs import render
from tinkerfs.vfs.schema import NodeContext


def run_path(run_id: str) -> str:
    """Return the path of a training run from the mount's root."""
    return f"/runs/{name_encoding.encode(run_id)}"


def checkpoint_path(checkpoint: Checkpoint) -> str:
    """Return the path from the mount's root that always leads to a checkpoint."""
    kind, name = name_encoding.encode(checkpoint.kind), name_encoding.encode(checkpoint.name)
    return f"{run_path(checkpoint.run_id)}/checkpoints/{kind}/{name}"


def path_for_tinker_path(path: TinkerPath) -> str:
    """Return the path from the mount's root of what a tinker path names."""
    # Two-part paths of older data have no kind, nor have hatchery's: the bare name resolves.
    kind = "" if path.kind in ("", "checkpoints") else f"{name_encoding.encode(path.kind)}/"
    return f"{run_path(path.run_id)}/checkpoints/{kind}{name_encoding.encode(path.name)}"


def list_runs(site: NodeContext) -> Iterator[tuple[str, models.TrainingRun]]:
    """Yield the user's training runs by id."""
    return ((run.run_id, run) for run in site.model.catalogue.iter_runs(site.call))


def find_run(site: NodeContext, run_id: str) -> models.TrainingRun | None:
    """Return a training run, listed or not."""
    try:
        return site.model.catalogue.run(run_id, site.call)
    except errors.NOT_FOUND_ERRORS as error:
        if error.is_local:
            return None
        raise


def run_ns(site: NodeContext) -> int:
    """Return when a training run was last asked something."""
    time_ns: int | None = site.entity.last_request_time_ns
    return site.model.started_ns if time_ns is None else time_ns


def newest_run_ns(site: NodeContext) -> int:
    """Return when any of the user's training runs was, as far as is known without a call."""
    known = site.model.catalogue.cached_runs()
    changed_ns = site.model.catalogue.runs_last_changed_ns()
    return mtime_or_mount_time(site, changed_ns, known.newest_ns if known else None)


def checkpoint_ns(site: NodeContext) -> int:
    """Return when a checkpoint was saved."""
    time_ns: int | None = site.entity.record.time_ns
    return site.model.started_ns if time_ns is None else time_ns


def stored_bytes(site: NodeContext) -> int:
    """Return what the server stores of a checkpoint, bytes."""
    return site.entity.record.size_bytes or 0


def run_xattrs(site: NodeContext) -> dict[str, str]:
    """Return the extended attributes of a training run."""
    run: models.TrainingRun = site.entity
    return _without_none(
        {
            "tinker.base_model": run.base_model,
            "tinker.lora_rank": run.lora_rank,
            "tinker.time": _rfc3339(run.last_request_time_ns),
        }
    )


def checkpoint_xattrs(site: NodeContext) -> dict[str, str]:
    """Return the extended attributes of a checkpoint; its run is known, it was on the way."""
    checkpoint: Checkpoint = site.entity
    run, record = site.model.catalogue.run(checkpoint.run_id, site.call), checkpoint.record
    return _without_none(
        {
            "tinker.path": checkpoint.tinker_path,
            "tinker.base_model": run.base_model,
            "tinker.lora_rank": run.lora_rank,
            "tinker.public": int(record.is_public),
            "tinker.size_bytes": record.size_bytes,
            "tinker.time": _rfc3339(record.time_ns),
            "tinker.expires_at": _rfc3339(record.expires_at_ns) or "never",
        }
    )


def _rfc3339(time_ns: int | None) -> str | None:
    return None if time_ns is None else render.rfc3339_ns(time_ns)


def _without_none(values: dict[str, str | int | None]) -> dict[str, str]:
    """Leave out what the server did not tell."""
    return {name: str(value) for name, value in values.items() if value is not None}


def mtime_or_mount_time(site: NodeContext, *times_ns: int | None) -> int:
    """Return the latest of the times that are known, and not before the mount was made.

    For folders that are not listed to tell their time: what tar finds in one must not change it.
    """
    return newest_ns(site, site.model.started_ns, *times_ns)


def newest_ns(site: NodeContext, *times_ns: int | None) -> int:
    """Return the latest of the times that are known, or when the mount was made.

    A folder is as new as what it lists, and at least as new as the last change that was seen in it:
    so `make`, `rsync -u` and file managers notice that something went.
    """
    return max((time for time in times_ns if time is not None), default=site.model.started_ns)
