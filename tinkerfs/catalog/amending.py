"""What a change of a checkpoint changes in its run's record (pure)."""

from msgspec.structs import replace

from tinkerfs.api import models, raw_json
from tinkerfs.catalog.listings import CheckpointListing, RunListing, kind_and_name


def apply_to_run(run: models.TrainingRun, listing: CheckpointListing) -> models.TrainingRun:
    """Return a run whose last checkpoints are those of its listing as it is now."""
    lasts = {
        "last_checkpoint": run.last_checkpoint,
        "last_sampler_checkpoint": run.last_sampler_checkpoint,
    }
    now = {name: _newest(listing, last) for name, last in lasts.items() if last is not None}
    fields = (
        b'"%s":%s' % (name.encode(), b"null" if last is None else last.raw)
        for name, last in now.items()
    )
    raw = raw_json.merge_objects(run.raw, b"{" + b",".join(fields) + b"}")
    return replace(run, raw=raw, **now)


def run_with_listed_last(run: models.TrainingRun, listing: CheckpointListing) -> models.TrainingRun:
    """Return a run whose last checkpoints are in a listing; the run itself if they are."""
    lasts = [each for each in (run.last_checkpoint, run.last_sampler_checkpoint) if each]
    is_listed = all(listing.get(*kind_and_name(each)) for each in lasts)
    return run if is_listed else apply_to_run(run, listing)


def apply_to_runs(runs: RunListing, run_id: str, listing: CheckpointListing) -> RunListing:
    """Return the runs after a change of a checkpoint of one."""
    run = runs.by_id.get(run_id)
    if run is None:
        return runs
    return RunListing.from_runs({**runs.by_id, run_id: apply_to_run(run, listing)}.values())


def _newest(listing: CheckpointListing, last: models.Checkpoint | None) -> models.Checkpoint | None:
    """Return a run's last checkpoint of the kind that `last` was of, as it is now."""
    if last is None:
        return None
    kind, name = kind_and_name(last)
    now = listing.get(kind, name)
    if now is not None:
        return now.record
    of_kind = [c.record for c in listing.all if c.kind == kind]
    return max(of_kind, key=lambda record: record.time_ns or 0, default=None)
