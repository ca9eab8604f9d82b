"""The sessions and samplers of the account.

A view contains symbolic links into `/runs`, so that a tree walk visits everything once.
"""

from collections.abc import Iterable, Iterator

from tinkerfs import name_encoding
from tinkerfs.api import models
from tinkerfs.context import RequestContext
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.vfs import entities, render
from tinkerfs.vfs.schema import (
    ContentFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    Node,
    SizeHint,
    Symlink,
)
from tinkerfs.weights.file import WeightsFile
from tinkerfs.weights.traces import SessionTrace


def _list_sessions(node: Node, ctx: RequestContext) -> Iterable[tuple[str, models.SessionSummary]]:
    return node.backend.sessions.listing.get(ctx).items()


def _find_session(node: Node, session_id: str, ctx: RequestContext) -> models.SessionSummary | None:
    return entities.absent_as_none(node.backend.sessions.find, session_id, ctx)


def _session_ns(node: Node, _ctx: RequestContext) -> int:
    return _created_ns(node)


def _created_ns(node: Node) -> int:
    time_ns: int | None = node.entity.created_at_ns
    return node.backend.started_ns if time_ns is None else time_ns


def _session_xattrs(node: Node, _ctx: RequestContext) -> dict[str, str]:
    name = node.entity.display_name
    return {} if name is None else {"tinker.display_name": name}


def _newest_session_ns(node: Node, ctx: RequestContext) -> int:
    sessions = (node.backend.sessions.listing.peek(ctx) or {}).values()
    changed_ns = node.backend.sessions.listing.last_changed_ns()
    return entities.mtime_or_mount_time(
        node, changed_ns, *(session.created_at_ns for session in sessions)
    )


def _session(node: Node, ctx: RequestContext) -> models.Session:
    return node.backend.sessions.record(node.entity.session_id, ctx)


def _session_info(node: Node, ctx: RequestContext) -> bytes:
    summary = node.backend.sessions.summary(node.entity.session_id, ctx)
    return render.session_info(summary, _session(node, ctx))


# The trace, which the server builds on request.

#: Directory of the targets in `/.content`. No name of the server is encoded like this.
_TRACES = "%~sessions"
#: Upper bound of the size of a trace: it may be longer than when it was opened last.
_MAX_TRACE_BYTES = 1 << 40


def _trace(node: Node) -> SessionTrace:
    return SessionTrace(
        server=node.backend.settings.base_url,
        session_id=node.entity.session_id,
        path=node.path,
        mtime_ns=_created_ns(node),
    )


def _trace_path(node: Node, _ctx: RequestContext) -> str:
    return f"/.content/{_TRACES}/{name_encoding.encode(node.entity.session_id)}/trace.pftrace"


def _trace_size(node: Node) -> SizeHint:
    size_bytes = node.backend.weights.traces.size_bytes(_trace(node))
    if size_bytes is None:
        return SizeHint(_MAX_TRACE_BYTES, is_exact=False)
    return SizeHint(size_bytes, is_exact=True)


def _open_trace(node: Node, ctx: RequestContext) -> WeightsFile:
    return node.backend.weights.traces.open(_trace(node), ctx)


def _list_session_runs(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for run_id in _session(node, ctx).training_run_ids:
        yield run_id, run_id


def _find_session_run(node: Node, run_id: str, ctx: RequestContext) -> str | None:
    return run_id if run_id in _session(node, ctx).training_run_ids else None


def _list_session_samplers(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for sampler_id in _session(node, ctx).sampler_ids:
        yield sampler_id, sampler_id


def _find_session_sampler(node: Node, sampler_id: str, ctx: RequestContext) -> str | None:
    return sampler_id if sampler_id in _session(node, ctx).sampler_ids else None


def _list_samplers(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for sampler_id in node.backend.sessions.cached_sampler_ids(ctx):
        yield sampler_id, sampler_id


def _find_sampler(node: Node, sampler_id: str, ctx: RequestContext) -> str | None:
    sampler = entities.absent_as_none(node.backend.sessions.sampler, sampler_id, ctx)
    return None if sampler is None else sampler_id


def _sampler(node: Node, ctx: RequestContext) -> models.Sampler:
    return node.backend.sessions.sampler(node.entity, ctx)


def _sampler_checkpoint(node: Node, ctx: RequestContext) -> str | None:
    try:
        return entities.path_for_tinker_path(TinkerPath.parse(_sampler(node, ctx).model_path or ""))
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
                    Symlink(
                        "trace.pftrace",
                        "the session's timeline, for ui.perfetto.dev; resolved when opened",
                        _trace_path,
                        leads_to_file=True,
                    ),
                    Directory(
                        "runs",
                        "the training runs of the session",
                        (
                            DynamicEntries(
                                Symlink(
                                    "<run_id>",
                                    "the training run",
                                    lambda node, _ctx: entities.run_path(node.entity),
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
                                    lambda node, _ctx: (
                                        f"/samplers/{name_encoding.encode(node.entity)}"
                                    ),
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

#: The targets of `trace.pftrace`, in `/.content`.
TRACES = DynamicEntries(
    Directory(
        _TRACES,
        "what belongs to sessions",
        (
            DynamicEntries(
                Directory(
                    "<session_id>",
                    "a session",
                    (
                        ContentFile(
                            "trace.pftrace",
                            "the session's timeline as a Perfetto trace; resolved when opened",
                            _open_trace,
                            _trace_size,
                            awaits_exact_size=True,
                        ),
                    ),
                    _session_ns,
                ),
                _list_sessions,
                _find_session,
                False,
            ),
        ),
    ),
    lambda _node, _ctx: (),
    lambda _node, name, _ctx: name if name == _TRACES else None,
    is_listed=False,
    encode=str,
    decode=str,
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
                        lambda node, ctx: render.json_file(_sampler(node, ctx).raw),
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
