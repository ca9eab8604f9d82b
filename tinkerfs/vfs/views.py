"""Views of the account: checkpoints, adapters, models, sessions and samplers.

A view contains symbolic links into `/runs`, so that a tree walk visits everything once.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import name_encoding
from tinkerfs.api import models
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.vfs import entities, render, weights_nodes
from tinkerfs.vfs.schema import Directory, DynamicEntries, GeneratedFile, NodeContext, Symlink

# Checkpoints.


def _view(
    name: str,
    doc: str,
    shows: Callable[[ListedCheckpoint], bool],
    time_ns: Callable[[NodeContext], int] = entities.checkpoint_ns,
) -> Directory:
    """Return a directory with a link to every checkpoint that matches `shows`."""

    def list_checkpoints(
        node: NodeContext,
    ) -> Iterator[tuple[tuple[str, str, str], ListedCheckpoint]]:
        for checkpoint in node.backend.catalog.account.iter(node.ctx):
            if shows(checkpoint):
                yield checkpoint.key, checkpoint

    def find(node: NodeContext, parts: tuple[str, ...]) -> ListedCheckpoint | None:
        if len(parts) != 3:
            return None
        run_id, kind, name = parts
        checkpoint = node.backend.catalog.account_checkpoint((run_id, kind, name), node.ctx)
        return checkpoint if checkpoint is not None and shows(checkpoint) else None

    def view_ns(node: NodeContext) -> int:
        listing = node.backend.catalog.account.peek()
        newest_first = listing.by_key.values() if listing else ()
        times_ns = (c.record.time_ns for c in newest_first if shows(c))
        newest_ns = next((time_ns for time_ns in times_ns if time_ns is not None), None)
        changed_ns = node.backend.catalog.account.last_changed_ns()
        return entities.mtime_or_mount_time(node, changed_ns, newest_ns)

    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint",
        lambda node: entities.checkpoint_path(node.entity),
        mtime_ns=time_ns,
    )
    return Directory(
        name,
        doc,
        (
            DynamicEntries(
                link,
                list_checkpoints,
                find,
                True,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
        ),
        view_ns,
    )


def _expiry_ns(node: NodeContext) -> int:
    expires_at_ns: int = node.entity.record.expires_at_ns
    return expires_at_ns


CHECKPOINTS = _view("checkpoints", "every checkpoint of the user, newest first", lambda _c: True)
PUBLISHED = _view("published", "the public checkpoints of the user", lambda c: c.record.is_public)
EXPIRING = _view(
    "expiring",
    "the checkpoints with an expiry, which is the mtime of the link",
    lambda c: c.record.expires_at_ns is not None,
    _expiry_ns,
)


# Adapters: the files that serving engines load.


def _list_adapters(node: NodeContext) -> Iterator[tuple[tuple[str, str, str], ListedCheckpoint]]:
    yield from node.backend.catalog.account.get(node.ctx).by_key.items()


def _find_adapter(node: NodeContext, parts: tuple[str, ...]) -> ListedCheckpoint | None:
    if len(parts) != 3:
        return None
    run_id, kind, name = parts
    listing = node.backend.catalog.account.peek()
    if listing is not None and (run_id, kind, name) in listing.by_key:
        return node.backend.catalog.account.get(node.ctx).by_key.get((run_id, kind, name))
    return entities.absent_as_none(node.backend.catalog.checkpoint, run_id, kind, name, node.ctx)


def adapters(files: Directory) -> Directory:
    """Return the directory of adapters for serving engines.

    Args:
        files: the unlisted directory that contains the targets of the links.
    """
    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint as engines load it; checkpoints that are not listed resolve too",
        lambda node: weights_nodes.adapter_path(node.entity),
        mtime_ns=entities.checkpoint_ns,
    )

    def find_files(_node: NodeContext, name: str) -> str | None:
        return name if name == files.name else None

    return Directory(
        "adapters",
        "every checkpoint of the user, as a directory that serving engines load",
        (
            DynamicEntries(
                link,
                _list_adapters,
                _find_adapter,
                True,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
            DynamicEntries(files, lambda _node: (), find_files, False),
        ),
        CHECKPOINTS.mtime_ns,
    )


# Runs by base model. The entity is an organisation, or a pair of organisation and model.


def _list_orgs(node: NodeContext) -> Iterator[tuple[str, str]]:
    for org in node.backend.catalog.runs.get(node.ctx).by_model:
        yield org, org


def _find_org(node: NodeContext, org: str) -> str | None:
    return org if org in node.backend.catalog.runs.get(node.ctx).by_model else None


def _list_models(node: NodeContext) -> Iterator[tuple[str, tuple[str, str]]]:
    for model in node.backend.catalog.runs.get(node.ctx).by_model.get(node.entity, ()):
        if model:
            yield model, (node.entity, model)


def _find_model(node: NodeContext, model: str) -> tuple[str, str] | None:
    models_of_org = node.backend.catalog.runs.get(node.ctx).by_model.get(node.entity, {})
    return (node.entity, model) if model and model in models_of_org else None


def _runs_of_model(node: NodeContext) -> dict[str, models.TrainingRun]:
    org, model = (node.entity, "") if isinstance(node.entity, str) else node.entity
    return node.backend.catalog.runs.get(node.ctx).by_model.get(org, {}).get(model, {})


def _list_runs_of_model(node: NodeContext) -> Iterable[tuple[str, models.TrainingRun]]:
    return _runs_of_model(node).items()


def _find_run_of_model(node: NodeContext, run_id: str) -> models.TrainingRun | None:
    return _runs_of_model(node).get(run_id)


_RUNS_OF_MODEL = DynamicEntries(
    Symlink(
        "<run_id>",
        "a training run of that base model",
        lambda node: entities.run_path(node.entity.run_id),
        mtime_ns=entities.run_ns,
    ),
    _list_runs_of_model,
    _find_run_of_model,
)

MODELS = Directory(
    "models",
    "the training runs by base model; `Qwen/Qwen3-8B` is two directories",
    (
        DynamicEntries(
            Directory(
                "<organisation>",
                "the first part of the base model's name",
                (
                    DynamicEntries(
                        Directory("<model>", "the rest of the name", (_RUNS_OF_MODEL,)),
                        _list_models,
                        _find_model,
                    ),
                    _RUNS_OF_MODEL,
                ),
            ),
            _list_orgs,
            _find_org,
        ),
    ),
    entities.newest_run_ns,
)


# Sessions and samplers.


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
