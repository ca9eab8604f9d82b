"""Serialize the account's records to API JSON, in the dialect of a profile."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tinkerfs.demo.profiles import KIND_TYPES, Profile
from tinkerfs.demo.sample_data import Checkpoint, Run, Session

Json = dict[str, Any]


def time_json(time_s: float | None, profile: Profile) -> str | float | None:
    """Return a Unix time in the profile's format."""
    if time_s is None or profile.times == "unix":
        return time_s
    text = datetime.fromtimestamp(time_s, UTC).isoformat().removesuffix("+00:00")
    return f"{text}Z" if profile.times == "utc" else text


def tinker_path(run_id: str, checkpoint: Checkpoint, profile: Profile) -> str:
    """Return the tinker path of a checkpoint."""
    kind = "checkpoints" if profile.flat_paths else checkpoint.kind
    return f"tinker://{run_id}/{kind}/{checkpoint.name}"


def checkpoint_json(run_id: str, checkpoint: Checkpoint, profile: Profile) -> Json:
    """Return the record of a checkpoint."""
    record: Json = {
        "checkpoint_id": checkpoint.name if profile.listed_ids == "name" else checkpoint.id,
        "checkpoint_type": KIND_TYPES.get(checkpoint.kind, checkpoint.kind),
        "time": time_json(checkpoint.time_s, profile),
        "tinker_path": tinker_path(run_id, checkpoint, profile),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.is_public,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": time_json(checkpoint.expires_at_s, profile),
    }
    return _in_dialect(record, profile) | checkpoint.extra


def run_json(run: Run, profile: Profile) -> Json:
    """Return the record of a training run."""
    record: Json = {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": profile.owner or run.owner,
        "is_lora": True,
        "corrupted": run.is_corrupted,
        "lora_rank": run.lora_rank,
        "last_request_time": time_json(run.last_request_time_s, profile),
        "last_checkpoint": _newest(run, "weights", profile),
        "last_sampler_checkpoint": _newest(run, "sampler_weights", profile),
        "user_metadata": run.user_metadata,
    }
    return _in_dialect(record, profile) | run.extra


def weights_info_json(run: Run) -> Json:
    """Return the weights info of any checkpoint of a run."""
    return {
        "base_model": run.base_model,
        "is_lora": True,
        "lora_rank": run.lora_rank,
        "train_unembed": False,
        "train_mlp": True,
        "train_attn": True,
        "optimizer_config": {"type": "adam"},
    }


def session_json(session: Session) -> Json:
    """Return the record of a session."""
    return {
        "training_run_ids": session.run_ids,
        "sampler_ids": list(session.samplers),
        "user_metadata": session.user_metadata,
        "display_name": session.display_name,
    }


def session_summary_json(session: Session, runs: Sequence[Run], profile: Profile) -> Json:
    """Return a session as a search result; `runs` are its remaining runs."""
    sizes = [checkpoint.size_bytes or 0 for run in runs for checkpoint in run.checkpoints]
    return {
        "session_id": session.id,
        "created_at": time_json(session.created_at_s, profile),
        "owner": "demo-user",
        "project_id": session.project_id,
        "status": session.status,
        "checkpoints_count": len(sizes),
        "display_name": session.display_name,
        "user_metadata": session.user_metadata,
        "checkpoint_storage_bytes": sum(sizes),
    }


def cursor_json(offset: int, limit: int, total_count: int, profile: Profile) -> Json:
    """Return the cursor of one page."""
    if profile.is_total_zero_past_end and offset >= total_count:
        total_count = 0
    return {"offset": offset, "limit": limit, "total_count": total_count}


def _newest(run: Run, kind: str, profile: Profile) -> Json | None:
    checkpoint = run.newest(kind)
    return checkpoint_json(run.id, checkpoint, profile) if checkpoint else None


def _in_dialect(record: Json, profile: Profile) -> Json:
    return {
        key: None if key in profile.nulls else value
        for key, value in record.items()
        if key not in profile.omitted
    }
