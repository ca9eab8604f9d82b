"""The sessions and samplers of the account.

A view contains symbolic links into `/runs`, so that a tree walk visits everything once.
"""

from collections.abc import Iterable, Iterator

from tinkerfs import name_encoding
from tinkerfs.api import models
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.vfs import entities, render
from tinkerfs.vfs.schema import Directory, DynamicEntries, GeneratedFile, NodeContext, Symlink


def _list_sessions(node: NodeContext) -> Iterable[tuple[str, models.SessionSummary]]:
    return node.backend.sessions.listing.get(node.ctx).items()


def _find_session(node: NodeContext, session_id: str) -> models.SessionSummary | None:
    return entities.absent_as_none(node.backend.sessions.find, session_id, node.ctx)


def _session_ns(node: NodeContext) -> int:
    time_ns: int | None = node.entity.created_at_ns
    return node.backend.started_ns if time_ns is None else time_ns


def _session_xattrs(node: NodeContext) -> dict[str, str]:
    name = node.entity.display_name
    return {} if name is None else {"tinker.display_name": name}


def _newest_session_ns(node: NodeContext) -> int:
    sessions = (node.backend.sessions.listing.peek() or {}).values()
    changed_ns = node.backend.sessions.listing.last_changed_ns()
    return entities.mtime_or_mount_time(
        node, changed_ns, *(session.created_at_ns for session in sessions)
    )


def _session(node: NodeContext) -> models.Session:
    return node.backend.sessions.record(node.entity.session_id, node.ctx)


def _session_info(node: NodeContext) -> bytes:
    summary = node.backend.sessions.summary(node.entity.session_id, node.ctx)
    return render.session_info(summary, _session(node))


def _list_session_runs(node: NodeContext) -> Iterator[tuple[str, str]]:
    for run_id in _session(node).training_run_ids:
        yield run_id, run_id


def _find_session_run(node: NodeContext, run_id: str) -> str | None:
    return run_id if run_id in _session(node).training_run_ids else None


def _list_session_samplers(node: NodeContext) -> Iterator[tuple[str, str]]:
    for sampler_id in _session(node).sampler_ids:
        yield sampler_id, sampler_id


def _find_session_sampler(node: NodeContext, sampler_id: str) -> str | None:
    return sampler_id if sampler_id in _session(node).sampler_ids else None


def _list_samplers(node: NodeContext) -> Iterator[tuple[str, str]]:
    for sampler_id in node.backend.sessions.cached_sampler_ids():
        yield sampler_id, sampler_id


def _find_sampler(node: NodeContext, sampler_id: str) -> str | None:
    sampler = entities.absent_as_none(node.backend.sessions.sampler, sampler_id, node.ctx)
    return None if sampler is None else sampler_id


def _sampler(node: NodeContext) -> models.Sampler:
    return node.backend.sessions.sampler(node.entity, node.ctx)


def _sampler_checkpoint(node: NodeContext) -> str | None:
    try:
        return entities.path_for_tinker_path(TinkerPath.parse(_sampler(node).model_path or ""))
    except ValueError:  # the sampler serves its base model
        return None


SESSIONS = Directory(
    "sessions",
    "the user's sessions",
    (
        DynamicEntries(
            Directory(
                "<session_id>",
                "a session",
                (
                    GeneratedFile(
                        "info.json",
                        "the session's record and status, and its checkpoints' count and bytes",
                        _session_info,
                        is_expensive=True,
                    ),
                    Directory(
                        "runs",
                        "the training runs of the session",
                        (
                            DynamicEntries(
                                Symlink(
                                    "<run_id>",
                                    "the training run",
                                    lambda node: entities.run_path(node.entity),
                                ),
                                _list_session_runs,
                                _find_session_run,
                            ),
                        ),
                        _session_ns,
                    ),
                    Directory(
                        "samplers",
                        "the samplers of the session",
                        (
                            DynamicEntries(
                                Symlink(
                                    "<sampler_id>",
                                    "the sampler",
                                    lambda node: f"/samplers/{name_encoding.encode(node.entity)}",
                                ),
                                _list_session_samplers,
                                _find_session_sampler,
                            ),
                        ),
                        _session_ns,
                    ),
                ),
                _session_ns,
                xattrs=_session_xattrs,
            ),
            _list_sessions,
            _find_session,
        ),
    ),
    _newest_session_ns,
)

SAMPLERS = Directory(
    "samplers",
    "samplers; only those of sessions that were listed before are listed, but all resolve",
    (
        DynamicEntries(
            Directory(
                "<sampler_id>",
                "a sampler",
                (
                    GeneratedFile(
                        "info.json",
                        "the sampler's record",
                        lambda node: render.json_file(_sampler(node).raw),
                        is_expensive=True,
                    ),
                    Symlink(
                        "checkpoint",
                        "the checkpoint that the sampler serves, if it has one",
                        _sampler_checkpoint,
                        True,
                    ),
                ),
            ),
            _list_samplers,
            _find_sampler,
        ),
    ),
)
