"""Views of the account: checkpoints, adapters and models.

A view contains symbolic links into `/runs`, so that a tree walk visits everything once.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import name_encoding
from tinkerfs.api import models
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import RequestContext
from tinkerfs.vfs import entities, weights_nodes
from tinkerfs.vfs.schema import Directory, DynamicEntries, Node, Symlink

# Checkpoints.


def _view(
    name: str,
    doc: str,
    shows: Callable[[ListedCheckpoint], bool],
    time_ns: Callable[[Node, RequestContext], int] = entities.checkpoint_ns,
) -> Directory:
    """Return a directory with a link to every checkpoint that matches `shows`."""

    def list_checkpoints(
        node: Node,
        ctx: RequestContext,
    ) -> Iterator[tuple[tuple[str, str, str], ListedCheckpoint]]:
        for checkpoint in node.backend.catalog.account.iter(ctx):
            if shows(checkpoint):
                yield checkpoint.key, checkpoint

    def find(node: Node, parts: tuple[str, ...], ctx: RequestContext) -> ListedCheckpoint | None:
        if len(parts) != 3:
            return None
        run_id, kind, name = parts
        checkpoint = node.backend.catalog.account_checkpoint((run_id, kind, name), ctx)
        return checkpoint if checkpoint is not None and shows(checkpoint) else None

    def view_ns(node: Node, ctx: RequestContext) -> int:
        listing = node.backend.catalog.account.peek(ctx)
        newest_ns = None if listing is None else listing.newest_ns(shows)
        changed_ns = node.backend.catalog.account.last_changed_ns()
        return entities.mtime_or_mount_time(node, changed_ns, newest_ns)

    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint",
        lambda node, _ctx: entities.checkpoint_path(node.entity),
        mtime_ns=time_ns,
        facts=entities.listed_checkpoint_facts,
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


def _expiry_ns(node: Node, _ctx: RequestContext) -> int:
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


def _list_adapters(
    node: Node, ctx: RequestContext
) -> Iterator[tuple[tuple[str, str, str], ListedCheckpoint]]:
    for checkpoint in node.backend.catalog.account.iter(ctx):
        yield checkpoint.key, checkpoint


def _find_adapter(
    node: Node, parts: tuple[str, ...], ctx: RequestContext
) -> ListedCheckpoint | None:
    if len(parts) != 3:
        return None
    run_id, kind, name = parts
    listing = node.backend.catalog.account.peek(ctx)
    if listing is not None and listing.get((run_id, kind, name)) is not None:
        return node.backend.catalog.account.get(ctx).get((run_id, kind, name))
    return entities.absent_as_none(node.backend.catalog.checkpoint, run_id, kind, name, ctx)


def adapters(files: Directory) -> Directory:
    """Return the directory of adapters for serving engines.

    Args:
        files: the unlisted directory that contains the targets of the links.
    """
    link = Symlink(
        "<run_id>@<kind>@<name>",
        "the checkpoint as engines load it; checkpoints that are not listed resolve too",
        weights_nodes.adapter_path,
        mtime_ns=entities.checkpoint_ns,
        facts=entities.listed_checkpoint_facts,
    )

    def find_files(_node: Node, name: str, _ctx: RequestContext) -> str | None:
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
            DynamicEntries(files, lambda _node, _ctx: (), find_files, False),
        ),
        CHECKPOINTS.mtime_ns,
    )


# Runs by base model. The entity is an organisation, or a pair of organisation and model.


def _list_orgs(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for org in node.backend.catalog.runs.get(ctx).by_model:
        yield org, org


def _find_org(node: Node, org: str, ctx: RequestContext) -> str | None:
    return org if org in node.backend.catalog.runs.get(ctx).by_model else None


def _list_models(node: Node, ctx: RequestContext) -> Iterator[tuple[str, tuple[str, str]]]:
    for model in node.backend.catalog.runs.get(ctx).by_model.get(node.entity, ()):
        if model:
            yield model, (node.entity, model)


def _find_model(node: Node, model: str, ctx: RequestContext) -> tuple[str, str] | None:
    models_of_org = node.backend.catalog.runs.get(ctx).by_model.get(node.entity, {})
    return (node.entity, model) if model and model in models_of_org else None


def _runs_of_model(node: Node, ctx: RequestContext) -> dict[str, models.TrainingRun]:
    org, model = (node.entity, "") if isinstance(node.entity, str) else node.entity
    return node.backend.catalog.runs.get(ctx).by_model.get(org, {}).get(model, {})


def _list_runs_of_model(
    node: Node, ctx: RequestContext
) -> Iterable[tuple[str, models.TrainingRun]]:
    return _runs_of_model(node, ctx).items()


def _find_run_of_model(node: Node, run_id: str, ctx: RequestContext) -> models.TrainingRun | None:
    return _runs_of_model(node, ctx).get(run_id)


_RUNS_OF_MODEL = DynamicEntries(
    Symlink(
        "<run_id>",
        "a training run of that base model",
        lambda node, _ctx: entities.run_path(node.entity.run_id),
        mtime_ns=entities.run_ns,
        facts=entities.run_xattrs,
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
