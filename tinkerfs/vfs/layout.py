"""The layout table: every directory, file and link of the mount.

To add a file, write a pure function in `render.py` (or a function that uses the backend), add a
spec here and run `scripts/docs`. Listing, lookup, attributes and `docs/layout.md` are derived from
the spec. The first and the last name of a directory above checkpoints cannot be removed. So a tool
that removes everything gets an error before it reaches a checkpoint, whichever end it starts from.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import RequestContext
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs import (
    controls,
    entities,
    export_control,
    mount_files,
    readme,
    render,
    session_views,
    team_views,
    trash,
    views,
    weights_nodes,
)
from tinkerfs.vfs.schema import (
    ContentFile,
    ControlFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    Node,
    NodeSpec,
    RemovalPolicy,
    Symlink,
)

# The functions of the specs, in the order of the table.


def _latest(node: Node, _ctx: RequestContext) -> str | None:
    return _latest_path(node.entity, node.entity.last_checkpoint)


def _latest_sampler(node: Node, _ctx: RequestContext) -> str | None:
    return _latest_path(node.entity, node.entity.last_sampler_checkpoint)


def _latest_path(run: models.TrainingRun, record: models.Checkpoint | None) -> str | None:
    if record is None:
        return None
    # `<kind>/<name>` always resolves, so the form of the server's ids need not be known.
    checkpoint = ListedCheckpoint.from_record(run.run_id, record)
    return entities.checkpoint_path(checkpoint)


def _list_kinds(
    node: Node, ctx: RequestContext
) -> Iterator[tuple[str, tuple[models.TrainingRun, str]]]:
    listing = node.backend.catalog.checkpoints(node.entity.run_id).get(ctx)
    for kind in listing.kinds:
        if listing.of_kind(kind):
            yield kind, (node.entity, kind)


def _find_kind(node: Node, kind: str, ctx: RequestContext) -> tuple[models.TrainingRun, str] | None:
    # The three kinds always resolve, so that `rmdir` finds a directory that has become empty.
    if kind in KINDS:
        return node.entity, kind
    listing = node.backend.catalog.checkpoints(node.entity.run_id).get(ctx)
    return (node.entity, kind) if kind in listing.kinds else None


def _list_bare(node: Node, ctx: RequestContext) -> Iterable[tuple[str, ListedCheckpoint]]:
    return node.backend.catalog.checkpoints(node.entity.run_id).get(ctx).bare.items()


def _find_bare(node: Node, name: str, ctx: RequestContext) -> ListedCheckpoint | None:
    return node.backend.catalog.checkpoints(node.entity.run_id).get(ctx).bare.get(name)


def _find_path_kind(
    node: Node, kind: str, ctx: RequestContext
) -> tuple[models.TrainingRun, str] | None:
    run: models.TrainingRun = node.entity
    return (run, kind) if _of_path(node, run, kind, ctx) else None


def _list_of_path(node: Node, ctx: RequestContext) -> Iterable[tuple[str, ListedCheckpoint]]:
    run, kind = node.entity
    return _of_path(node, run, kind, ctx).items()


def _find_of_path(node: Node, name: str, ctx: RequestContext) -> ListedCheckpoint | None:
    run, kind = node.entity
    return _of_path(node, run, kind, ctx).get(name)


def _of_path(
    node: Node, run: models.TrainingRun, kind: str, ctx: RequestContext
) -> dict[str, ListedCheckpoint]:
    return node.backend.catalog.checkpoints(run.run_id).get(ctx).of_path(kind)


def _list_of_kind(node: Node, ctx: RequestContext) -> Iterator[tuple[str, ListedCheckpoint]]:
    run, kind = node.entity
    for checkpoint in node.backend.catalog.checkpoints(run.run_id).get(ctx).of_kind(kind):
        yield checkpoint.name, checkpoint


def _find_of_kind(node: Node, name: str, ctx: RequestContext) -> ListedCheckpoint | None:
    run, kind = node.entity
    return node.backend.catalog.checkpoint(run.run_id, kind, name, ctx)


# `.content` includes trashed checkpoints, because their links in the trash lead there.


def _list_content(node: Node, ctx: RequestContext) -> Iterator[tuple[str, ListedCheckpoint]]:
    run, kind = node.entity
    for checkpoint in node.backend.catalog.checkpoints_with_trash(run.run_id).get(ctx).all:
        if checkpoint.kind == kind:
            yield checkpoint.name, checkpoint


def _find_content(node: Node, name: str, ctx: RequestContext) -> ListedCheckpoint | None:
    run, kind = node.entity
    return node.backend.catalog.checkpoint(run.run_id, kind, name, ctx, include_trashed=True)


def _kind_ns(node: Node, ctx: RequestContext) -> int:
    run, kind = node.entity
    try:
        listing = node.backend.catalog.checkpoints(run.run_id).get(ctx)
    except errors.ApiError:  # another user's run: its checkpoints cannot be listed
        listing = None
    newest_ns = run.last_request_time_ns
    if listing is not None and listing.of_kind(kind):
        newest_ns = listing.newest_ns[kind]
    changed_ns = node.backend.catalog.checkpoints(run.run_id).last_changed_ns()
    return entities.newest_ns(node, changed_ns, newest_ns)


def _checkpoints_ns(node: Node, _ctx: RequestContext) -> int:
    run: models.TrainingRun = node.entity
    changed_ns = node.backend.catalog.checkpoints(run.run_id).last_changed_ns()
    return entities.newest_ns(node, changed_ns, run.last_request_time_ns)


def _checkpoint_info(node: Node, ctx: RequestContext) -> bytes:
    try:
        info = node.backend.catalog.weights_info(node.entity, ctx)
    except errors.ApiError as error:
        # Without the weights info the file still has the record; `errors` has the reason.
        if not error.is_local:
            node.backend.telemetry.record_error(
                node.path, "weights info", errors.os_error_from_api(error, node.path)
            )
        ctx.mark_uncacheable()
        info = None
    return render.checkpoint_info(node.entity.record, info)


def _published(node: Node, _ctx: RequestContext) -> bytes:
    return render.line("1" if node.entity.record.is_public else "0")


def _expires_at(node: Node, _ctx: RequestContext) -> bytes:
    expires_at_ns = node.entity.record.expires_at_ns
    return render.line("never" if expires_at_ns is None else render.rfc3339_ns(expires_at_ns))


def _list_version(node: Node, _ctx: RequestContext) -> Iterable[tuple[str, ListedCheckpoint]]:
    return ((node.entity.version, node.entity),)


def _find_version(node: Node, version: str, _ctx: RequestContext) -> ListedCheckpoint | None:
    checkpoint: ListedCheckpoint = node.entity
    return checkpoint if version == checkpoint.version else None


def _list_adapter_version(
    node: Node, _ctx: RequestContext
) -> Iterable[tuple[str, ListedCheckpoint]]:
    return ((weights_nodes.adapter_version(node), node.entity),)


def _find_adapter_version(
    node: Node, version: str, _ctx: RequestContext
) -> ListedCheckpoint | None:
    checkpoint: ListedCheckpoint = node.entity
    return checkpoint if version == weights_nodes.adapter_version(node) else None


# The table.

_CHECKPOINT_SPECS: tuple[NodeSpec, ...] = (
    GeneratedFile(
        "info.json",
        "weights info, merged with the checkpoint's record",
        _checkpoint_info,
        mode=0o644,
        is_expensive=True,
    ),
    weights_nodes.LINKS["archive_url"],
    ControlFile(
        "published",
        '"1" or "0"; write it to publish or unpublish',
        _published,
        controls.write_published,
    ),
    ControlFile(
        "expires_at",
        'RFC 3339 time or "never"; write it to set or clear the expiry',
        _expires_at,
        controls.write_expires_at,
    ),
    GeneratedFile(
        "tinker_path",
        "the tinker:// path and a newline",
        lambda node, _ctx: render.line(node.entity.tinker_path),
        mode=0o644,
    ),
    weights_nodes.LINKS["files"],
    weights_nodes.LINKS["archive.tar"],
    weights_nodes.LINKS["tensors.json"],
    export_control.EXPORT,
)


_CHECKPOINT = Directory(
    "<name>",
    "a checkpoint",
    _CHECKPOINT_SPECS,
    entities.checkpoint_ns,
    entities.stored_bytes,
    RemovalPolicy.CHECKPOINT,
    entities.checkpoint_xattrs,
)

#: A trashed checkpoint cannot be published, and its `expires_at` has another meaning.
_TRASHED_SPECS = tuple(spec for spec in _CHECKPOINT_SPECS if not isinstance(spec, ControlFile))

_ALIAS = Symlink(
    "<name>",
    "the checkpoint of that name, if the server's ids have no kind; not listed",
    lambda node, _ctx: entities.checkpoint_path(node.entity),
    mtime_ns=entities.checkpoint_ns,
)

_CHECKPOINTS = Directory(
    "checkpoints",
    "the run's checkpoints by kind and name, independent of the form of the server's ids",
    (
        DynamicEntries(
            Directory(
                "<kind>",
                "the checkpoints of one kind: weights, sampler_weights, external_weights",
                (DynamicEntries(_CHECKPOINT, _list_of_kind, _find_of_kind),),
                _kind_ns,
                removal=RemovalPolicy.CONTAINER,
            ),
            _list_kinds,
            _find_kind,
        ),
        # This is a link, so that a checkpoint has one directory, and the removal of an alias does
        # not delete the checkpoint.
        DynamicEntries(_ALIAS, _list_bare, _find_bare, False),
        DynamicEntries(
            Directory(
                "<part>",
                "the part of a tinker path in the place of a kind; not listed",
                (DynamicEntries(_ALIAS, _list_of_path, _find_of_path, False),),
            ),
            lambda _node, _ctx: (),  # needed only for truncated names, which do not occur here
            _find_path_kind,
            False,
        ),
    ),
    _checkpoints_ns,
    removal=RemovalPolicy.CONTAINER,
)

_RUN = Directory(
    "<run_id>",
    "a training run",
    (
        GeneratedFile(
            "info.json",
            "the training run's record",
            lambda node, _ctx: render.run_info(node.entity),
        ),
        _CHECKPOINTS,
        Symlink("latest", "the newest training checkpoint, if there is one", _latest, True),
        Symlink(
            "latest_sampler",
            "the newest sampler checkpoint, if there is one",
            _latest_sampler,
            True,
        ),
    ),
    entities.run_ns,
    xattrs=entities.run_xattrs,
)


def _content(
    doc: str,
    versions: DynamicEntries,
    find_kind: Callable[[Node, str, RequestContext], tuple[models.TrainingRun, str] | None],
    *others: DynamicEntries,
) -> Directory:
    """Return a directory of expensive content by run, kind, name and version, and of `others`.

    None of its names is listed, so that a tree walk does not reach the content.
    """
    name = Directory("<name>", "a checkpoint", (versions,))
    kind = Directory(
        "<kind>",
        "a kind of checkpoint",
        (DynamicEntries(name, _list_content, _find_content, False),),
    )
    run = Directory(
        "<run_id>", "a training run", (DynamicEntries(kind, _list_kinds, find_kind, False),)
    )
    runs = DynamicEntries(run, entities.list_runs, entities.find_run, False)
    return Directory(".content", doc, (runs, *others))


_CONTENT = _content(
    "content that is built on request, reached through the symlinks; its names are not listed",
    DynamicEntries(weights_nodes.VERSION, _list_version, _find_version, False),
    _find_kind,
    session_views.TRACES,
)
_ADAPTERS = views.adapters(
    _content(
        "the targets of the links; not listed",
        DynamicEntries(weights_nodes.ADAPTER, _list_adapter_version, _find_adapter_version, False),
        _find_kind,
    )
)

_TINKERFS = Directory(
    ".tinkerfs",
    "the mount's own control files",
    (
        *mount_files.SPECS,
        trash.trash_directory(_TRASHED_SPECS),
    ),
)

ROOT = Directory(
    "",
    "the account",
    (
        GeneratedFile("README.md", "a guide to the mount", lambda _node, _ctx: readme.TEXT),
        Directory(
            "runs",
            "every training run of the account",
            (DynamicEntries(_RUN, entities.list_runs, entities.find_run),),
            entities.newest_run_ns,
        ),
        views.CHECKPOINTS,
        views.PUBLISHED,
        views.EXPIRING,
        views.MODELS,
        team_views.SHARED,
        team_views.PROJECTS,
        _ADAPTERS,
        session_views.SESSIONS,
        session_views.SAMPLERS,
        _CONTENT,
        _TINKERFS,
    ),
)


def render_layout_docs() -> str:
    """Return the text of `docs/layout.md`."""
    lines = [
        "# Layout",
        "",
        "Generated from the table in `tinkerfs/vfs/layout.py` by `scripts/docs`; do not edit.",
        "",
        "| path | kind | mode | description |",
        "|---|---|---|---|",
        *_layout_lines(ROOT, ""),
        "",
        "The permissions of a symlink are those of its target."
        " A read-only mount has no write permissions.",
        "",
    ]
    return "\n".join(lines)


_KINDS: dict[type, str] = {
    GeneratedFile: "file",
    ContentFile: "weights file",
    ControlFile: "control file",
    Symlink: "symlink",
    Directory: "directory",
}


def _layout_lines(directory: Directory, path: str) -> Iterator[str]:
    for child in directory.specs:
        spec = child.spec if isinstance(child, DynamicEntries) else child
        if spec is None:  # directories of the same kind as this one
            continue
        child_path = f"{path}/{spec.name}"
        if isinstance(spec, Directory):
            mode = "0755"
        else:
            mode = "-" if isinstance(spec, Symlink) else f"{spec.mode:04o}"
        yield f"| `{child_path}` | {_KINDS[type(spec)]} | {mode} | {spec.doc} |"
        if isinstance(spec, Directory):
            yield from _layout_lines(spec, child_path)
