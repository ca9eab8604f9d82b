"""The views: other ways to the same runs and checkpoints, and the sessions that made them.

Each is a folder of symbolic links into `/runs`, so that a walk comes to everything once.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import errors, name_encoding
from tinkerfs.api import models
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.vfs import entities, render, weights_nodes
from tinkerfs.vfs.schema import Directory, DynamicEntries, GeneratedFile, NodeContext, Symlink

# Checkpoints.


def _view(
    name: str,
    doc: str,
    shows: Callable[[Checkpoint], bool],
    time_ns: Callable[[NodeContext], int] = entities.checkpoint_ns,
) -> Directory:
    """A folder with a link to each checkpoint of the user that it shows."""

    def listed(site: NodeContext) -> Iterator[tuple[tuple[str, str, str], Checkpoint]]:
        for checkpoint in site.model.catalogue.iter_account_checkpoints(site.call):
            if shows(checkpoint):
                yield checkpoint.key, checkpoint

    def find(site: NodeContext, parts: tuple[str, ...]) -> Checkpoint | None:
        if len(parts) != 3:
            return None
        run_id, kind, name = parts
        checkpoint = site.model.catalogue.user_checkpoint((run_id, kind, name), site.call)
        return checkpoint if checkpoint is not None and shows(checkpoint) else None

    def view_ns(site: NodeContext) -> int:
        known = site.model.catalogue.cached_account_checkpoints()
        newest_first = known.by_key.values() if known else ()
        times_ns = (c.record.time_ns for c in newest_first if shows(c))
        newest_ns = next((time_ns for time_ns in times_ns if time_ns is not None), None)
        changed_ns = site.model.catalogue.user_changed_ns()
        return entities.mtime_or_mount_time(site, changed_ns, newest_ns)

    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint",
        lambda site: entities.checkpoint_path(site.entity),
        mtime_ns=time_ns,
    )
    return Directory(
        name,
        doc,
        (
            DynamicEntries(
                link,
                listed,
                find,
                True,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
        ),
        view_ns,
    )


def _expiry_ns(site: NodeContext) -> int:
    expires_at_ns: int = site.entity.record.expires_at_ns
    return expires_at_ns


CHECKPOINTS = _view("checkpoints", "every checkpoint of the user, newest first", lambda _c: True)
PUBLISHED = _view("published", "the public ones only", lambda c: c.record.is_public)
EXPIRING = _view(
    "expiring",
    "those with an expiry only, which is the links' mtime",
    lambda c: c.record.expires_at_ns is not None,
    _expiry_ns,
)


# Adapters: what serving engines take.

SERVED_KINDS = ("sampler_weights", "external_weights")


def _list_adapters(site: NodeContext) -> Iterator[tuple[tuple[str, str, str], Checkpoint]]:
    for key, checkpoint in site.model.catalogue.user_checkpoints(site.call).by_key.items():
        if checkpoint.kind in SERVED_KINDS:
            yield key, checkpoint


def _find_adapter(site: NodeContext, parts: tuple[str, ...]) -> Checkpoint | None:
    if len(parts) != 3 or parts[1] not in SERVED_KINDS:
        return None
    run_id, kind, name = parts
    known = site.model.catalogue.cached_account_checkpoints()
    if known is not None and (run_id, kind, name) in known.by_key:
        return site.model.catalogue.user_checkpoints(site.call).by_key.get((run_id, kind, name))
    try:
        return site.model.catalogue.checkpoint(run_id, kind, name, site.call)
    except errors.NOT_FOUND_ERRORS as error:
        if error.is_local:
            return None
        raise


def adapters(files: Directory) -> Directory:
    """Return the view of what serving engines take.

    Args:
        files: the unlisted directory that its names lead into.
    """
    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint's files; also of those that are not listed",
        lambda site: weights_nodes.adapter_path(site.entity),
        mtime_ns=entities.checkpoint_ns,
    )

    def find_files(_site: NodeContext, name: str) -> str | None:
        return name if name == files.name else None

    return Directory(
        "adapters",
        "every sampler and external checkpoint as the folder of files that serving engines take",
        (
            DynamicEntries(
                link,
                _list_adapters,
                _find_adapter,
                True,
                name_encoding.encode_composite,
                name_encoding.decode_composite,
            ),
            DynamicEntries(files, lambda _site: (), find_files, False),
        ),
        CHECKPOINTS.mtime_ns,
    )


# Runs by base model. A subject is an organisation, or that and a model.


def _list_orgs(site: NodeContext) -> Iterator[tuple[str, str]]:
    for org in site.model.catalogue.runs(site.call).by_model:
        yield org, org


def _find_org(site: NodeContext, org: str) -> str | None:
    return org if org in site.model.catalogue.runs(site.call).by_model else None


def _list_models(site: NodeContext) -> Iterator[tuple[str, tuple[str, str]]]:
    for model in site.model.catalogue.runs(site.call).by_model.get(site.entity, ()):
        if model:
            yield model, (site.entity, model)


def _find_model(site: NodeContext, model: str) -> tuple[str, str] | None:
    models_of_org = site.model.catalogue.runs(site.call).by_model.get(site.entity, {})
    return (site.entity, model) if model and model in models_of_org else None


def _runs_of_model(site: NodeContext) -> dict[str, models.TrainingRun]:
    org, model = (site.entity, "") if isinstance(site.entity, str) else site.entity
    return site.model.catalogue.runs(site.call).by_model.get(org, {}).get(model, {})


def _list_runs_of_model(site: NodeContext) -> Iterable[tuple[str, models.TrainingRun]]:
    return _runs_of_model(site).items()


def _find_run_of_model(site: NodeContext, run_id: str) -> models.TrainingRun | None:
    return _runs_of_model(site).get(run_id)


_RUNS_OF_MODEL = DynamicEntries(
    Symlink(
        "<run_id>",
        "a training run of that base model",
        lambda site: entities.run_path(site.entity.run_id),
        mtime_ns=entities.run_ns,
    ),
    _list_runs_of_model,
    _find_run_of_model,
)

MODELS = Directory(
    "models",
    "the training runs by base model; `Qwen/Qwen3-8B` is two folders",
    (
        DynamicEntries(
            Directory(
                "<organisation>",
                "the first part of the base model's name",
                (
                    DynamicEntries(
                        Directory("<model>", "the rest of it", (_RUNS_OF_MODEL,)),
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


def _list_sessions(site: NodeContext) -> Iterable[tuple[str, models.SessionSummary]]:
    return site.model.sessions.list_ids(site.call).items()


def _find_session(site: NodeContext, session_id: str) -> models.SessionSummary | None:
    try:
        return site.model.sessions.find(session_id, site.call)
    except errors.NOT_FOUND_ERRORS as error:
        if error.is_local:
            return None
        raise


def _session_ns(site: NodeContext) -> int:
    time_ns: int | None = site.entity.created_at_ns
    return site.model.started_ns if time_ns is None else time_ns


def _session_xattrs(site: NodeContext) -> dict[str, str]:
    name = site.entity.display_name
    return {} if name is None else {"tinker.display_name": name}


def _newest_session_ns(site: NodeContext) -> int:
    known = site.model.sessions.cached().values()
    changed_ns = site.model.sessions.changed_ns()
    return entities.mtime_or_mount_time(
        site, changed_ns, *(session.created_at_ns for session in known)
    )


def _session(site: NodeContext) -> models.Session:
    return site.model.sessions.record(site.entity.session_id, site.call)


def _list_session_runs(site: NodeContext) -> Iterator[tuple[str, str]]:
    for run_id in _session(site).training_run_ids:
        yield run_id, run_id


def _find_session_run(site: NodeContext, run_id: str) -> str | None:
    return run_id if run_id in _session(site).training_run_ids else None


def _list_session_samplers(site: NodeContext) -> Iterator[tuple[str, str]]:
    for sampler_id in _session(site).sampler_ids:
        yield sampler_id, sampler_id


def _find_session_sampler(site: NodeContext, sampler_id: str) -> str | None:
    return sampler_id if sampler_id in _session(site).sampler_ids else None


def _list_samplers(site: NodeContext) -> Iterator[tuple[str, str]]:
    for sampler_id in site.model.sessions.known_samplers():
        yield sampler_id, sampler_id


def _find_sampler(site: NodeContext, sampler_id: str) -> str | None:
    try:
        site.model.sessions.sampler(sampler_id, site.call)
    except errors.NOT_FOUND_ERRORS as error:
        if error.is_local:
            return None
        raise
    return sampler_id


def _sampler(site: NodeContext) -> models.Sampler:
    return site.model.sessions.sampler(site.entity, site.call)


def _sampler_checkpoint(site: NodeContext) -> str | None:
    try:
        return entities.path_for_tinker_path(TinkerPath.parse(_sampler(site).model_path or ""))
    except ValueError:  # it serves its base model
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
                        "the session's record",
                        lambda site: render.session_info(site.entity, _session(site)),
                        is_expensive=True,
                    ),
                    Directory(
                        "runs",
                        "the training runs that it made",
                        (
                            DynamicEntries(
                                Symlink(
                                    "<run_id>",
                                    "the training run",
                                    lambda site: entities.run_path(site.entity),
                                ),
                                _list_session_runs,
                                _find_session_run,
                            ),
                        ),
                        _session_ns,
                    ),
                    Directory(
                        "samplers",
                        "the samplers that it made",
                        (
                            DynamicEntries(
                                Symlink(
                                    "<sampler_id>",
                                    "the sampler",
                                    lambda site: f"/samplers/{name_encoding.encode(site.entity)}",
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
    "samplers; lists those of the sessions that were looked into, and resolves every other",
    (
        DynamicEntries(
            Directory(
                "<sampler_id>",
                "a sampler",
                (
                    GeneratedFile(
                        "info.json",
                        "the sampler's record",
                        lambda site: render.json_file(_sampler(site).raw),
                        is_expensive=True,
                    ),
                    Symlink(
                        "checkpoint",
                        "the checkpoint that it serves, when it has one",
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
