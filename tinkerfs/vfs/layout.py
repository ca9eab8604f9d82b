"""THE TABLE: which names exist where.

To add a file: write a pure function in `render.py` (or one that asks the model), add a row here,
run `scripts/docs`. Listing, lookup, attributes and `docs/layout.md` follow from the row. What
cannot be removed stands first and last in its folder, so that a tool that removes everything meets
a refusal before it comes to a checkpoint, from whichever end it begins.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.listings import Checkpoint, CheckpointListing
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs import controls, entities, readme, render, trash, views, weights_nodes
from tinkerfs.vfs.schema import (
    ControlFile,
    Directory,
    DynamicEntries,
    GeneratedFile,
    NodeContext,
    NodeSpec,
    RemovalPolicy,
    Symlink,
)

# What the rows ask, in the order of the table.


def _latest(site: NodeContext) -> str | None:
    return _latest_path(site.entity, site.entity.last_checkpoint)


def _latest_sampler(site: NodeContext) -> str | None:
    return _latest_path(site.entity, site.entity.last_sampler_checkpoint)


def _latest_path(run: models.TrainingRun, record: models.Checkpoint | None) -> str | None:
    if record is None:
        return None
    # `<kind>/<name>` always resolves, so no listing has to tell how the server lists it.
    checkpoint = Checkpoint.from_record(run.run_id, record)
    return entities.checkpoint_path(checkpoint)


def _list_kinds(site: NodeContext) -> Iterator[tuple[str, tuple[models.TrainingRun, str]]]:
    listing = site.model.catalogue.checkpoints(site.entity.run_id, site.call)
    for kind in listing.kinds:
        if listing.of_kind(kind):
            yield kind, (site.entity, kind)


def _find_kind(site: NodeContext, kind: str) -> tuple[models.TrainingRun, str] | None:
    # The three kinds always resolve, so that `rmdir` finds the folder that it has just emptied.
    if kind in KINDS:
        return site.entity, kind

    def find(listing: CheckpointListing) -> tuple[models.TrainingRun, str] | None:
        return (site.entity, kind) if kind in listing.kinds else None

    return site.model.catalogue.find_in_run(site.entity.run_id, find, site.call)


def _list_bare(site: NodeContext) -> Iterable[tuple[str, Checkpoint]]:
    return site.model.catalogue.checkpoints(site.entity.run_id, site.call).bare.items()


def _find_bare(site: NodeContext, name: str) -> Checkpoint | None:
    run_id = site.entity.run_id
    return site.model.catalogue.find_in_run(
        run_id, lambda listing: listing.bare.get(name), site.call
    )


def _find_path_kind(site: NodeContext, kind: str) -> tuple[models.TrainingRun, str] | None:
    run: models.TrainingRun = site.entity
    is_known = bool(_of_path(site, run, kind))
    return (run, kind) if is_known else None


def _list_of_path(site: NodeContext) -> Iterable[tuple[str, Checkpoint]]:
    return _of_path(site, *site.entity).items()


def _find_of_path(site: NodeContext, name: str) -> Checkpoint | None:
    return _of_path(site, *site.entity).get(name)


def _of_path(site: NodeContext, run: models.TrainingRun, kind: str) -> dict[str, Checkpoint]:
    def find(listing: CheckpointListing) -> dict[str, Checkpoint] | None:
        return listing.of_path(kind) or None

    return site.model.catalogue.find_in_run(run.run_id, find, site.call) or {}


def _list_of_kind(site: NodeContext) -> Iterator[tuple[str, Checkpoint]]:
    run, kind = site.entity
    for checkpoint in site.model.catalogue.checkpoints(run.run_id, site.call).of_kind(kind):
        yield checkpoint.name, checkpoint


def _find_of_kind(site: NodeContext, name: str) -> Checkpoint | None:
    run, kind = site.entity
    return site.model.catalogue.checkpoint(run.run_id, kind, name, site.call)


# What costs something to read is found in the trash too: its links there lead to it.


def _list_content(site: NodeContext) -> Iterator[tuple[str, Checkpoint]]:
    run, wanted = site.entity
    for checkpoint in site.model.catalogue.listed(run.run_id, site.call).all:
        if checkpoint.kind == wanted:
            yield checkpoint.name, checkpoint


def _find_content(site: NodeContext, name: str) -> Checkpoint | None:
    run, kind = site.entity
    return site.model.catalogue.checkpoint(run.run_id, kind, name, site.call, with_trashed=True)


def _group_ns(site: NodeContext) -> int:
    run, kind = site.entity
    try:
        known = site.model.catalogue.checkpoints(run.run_id, site.call)
    except errors.ApiError:  # somebody else's, who does not let them be listed
        known = None
    newest_ns = run.last_request_time_ns
    if known is not None and known.of_kind(kind):
        newest_ns = known.newest_ns[kind]
    changed_ns = site.model.catalogue.checkpoints_changed_ns(run.run_id)
    return entities.newest_ns(site, changed_ns, newest_ns)


def _checkpoints_ns(site: NodeContext) -> int:
    run: models.TrainingRun = site.entity
    changed_ns = site.model.catalogue.checkpoints_changed_ns(run.run_id)
    return entities.newest_ns(site, changed_ns, run.last_request_time_ns)


def _checkpoint_info(site: NodeContext) -> bytes:
    try:
        info = site.model.catalogue.weights_info(site.entity, site.call)
    except errors.ApiError as error:
        # It costs this checkpoint its weights info and nothing else; `errors` tells why.
        if not error.is_local:
            site.model.telemetry.record_error(
                site.path, "weights info", errors.os_error_from_api(error, site.path)
            )
        site.call.mark_uncacheable()
        info = None
    return render.checkpoint_info(site.entity.record, info)


def _published(site: NodeContext) -> bytes:
    return render.line("1" if site.entity.record.is_public else "0")


def _expires_at(site: NodeContext) -> bytes:
    expires_at_ns = site.entity.record.expires_at_ns
    return render.line("never" if expires_at_ns is None else render.rfc3339_ns(expires_at_ns))


def _list_version(site: NodeContext) -> Iterable[tuple[str, Checkpoint]]:
    return ((site.entity.version, site.entity),)


def _find_version(site: NodeContext, version: str) -> Checkpoint | None:
    checkpoint: Checkpoint = site.entity
    return checkpoint if version == checkpoint.version else None


def _stats(site: NodeContext) -> bytes:
    model = site.model
    facts = {
        "base_url": model.settings.base_url,
        "cache_dir": model.settings.cache_dir,
        "cache_size_bytes": model.settings.cache_size_bytes,
        "account": _known(model.catalogue),
    }
    return render.json_values({**facts, **model.telemetry.snapshot()})


def _known(catalogue: Catalog) -> dict[str, int]:
    """Return what the listings so far add up to, without a call; empty before the first."""
    runs = catalogue.cached_runs()
    if runs is None:
        return {}
    listings = [catalogue.cached_checkpoints(run_id) for run_id in runs.by_id]
    checkpoints = [c for known in listings if known for c in known.all]
    return {
        "runs": len(runs.by_id),
        "runs_listed": sum(known is not None for known in listings),
        "checkpoints": len(checkpoints),
        "size_bytes": sum(c.record.size_bytes or 0 for c in checkpoints),
    }


def _control_file_ns(site: NodeContext) -> int:
    return int(site.model.clock.now() * 1e9)


# The table.

_CHECKPOINT_ROWS: tuple[NodeSpec, ...] = (
    GeneratedFile(
        "info.json",
        "weights info, merged with the listing's record",
        _checkpoint_info,
        mode=0o644,
        is_expensive=True,
    ),
    weights_nodes.LINKS["archive_url"],
    ControlFile(
        "published",
        '"1" or "0"; written to publish or unpublish',
        _published,
        controls.store_published,
    ),
    ControlFile(
        "expires_at",
        'RFC 3339 time or "never"; written to set or clear the expiry',
        _expires_at,
        controls.store_expires_at,
    ),
    GeneratedFile(
        "tinker_path",
        "the tinker:// path and a newline",
        lambda site: render.line(site.entity.tinker_path),
        mode=0o644,
    ),
    weights_nodes.LINKS["files"],
    weights_nodes.LINKS["archive.tar"],
    weights_nodes.LINKS["tensors.json"],
)


_CHECKPOINT = Directory(
    "<name>",
    "a checkpoint",
    _CHECKPOINT_ROWS,
    entities.checkpoint_ns,
    entities.stored_bytes,
    RemovalPolicy.CHECKPOINT,
    entities.checkpoint_xattrs,
)

#: In the trash nothing is published, and `expires_at` restores.
_TRASHED_ROWS = tuple(row for row in _CHECKPOINT_ROWS if not isinstance(row, ControlFile))

_ALIAS = Symlink(
    "<name>",
    "the checkpoint of that name, where the server's ids have no kind; not listed",
    lambda site: entities.checkpoint_path(site.entity),
    mtime_ns=entities.checkpoint_ns,
)

_CHECKPOINTS = Directory(
    "checkpoints",
    "the run's checkpoints by kind and name, whatever form the server's ids have",
    (
        DynamicEntries(
            Directory(
                "<kind>",
                "those of one kind: weights, sampler_weights, external_weights",
                (DynamicEntries(_CHECKPOINT, _list_of_kind, _find_of_kind),),
                _group_ns,
                removal=RemovalPolicy.CONTAINER,
            ),
            _list_kinds,
            _find_kind,
        ),
        # A link, so that a checkpoint has one directory, and removing another name removes nothing.
        DynamicEntries(_ALIAS, _list_bare, _find_bare, False),
        DynamicEntries(
            Directory(
                "<part>",
                "what a tinker path has in place of a kind; not listed",
                (DynamicEntries(_ALIAS, _list_of_path, _find_of_path, False),),
            ),
            lambda _site: (),  # none is so long that its file name is cut
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
            "info.json", "the training run's record", lambda site: render.run_info(site.entity)
        ),
        _CHECKPOINTS,
        Symlink("latest", "the newest training checkpoint, when the run has one", _latest, True),
        Symlink(
            "latest_sampler",
            "the newest sampler checkpoint, when there is one",
            _latest_sampler,
            True,
        ),
    ),
    entities.run_ns,
    xattrs=entities.run_xattrs,
)


def _content(
    doc: str,
    version: Directory,
    find_kind: Callable[[NodeContext, str], tuple[models.TrainingRun, str] | None],
) -> Directory:
    """Return a directory of what costs something to read, by version of a checkpoint.

    Nothing in it is listed, so that a walk does not reach it.
    """
    name = Directory(
        "<name>", "of a checkpoint", (DynamicEntries(version, _list_version, _find_version, False),)
    )
    kind = Directory(
        "<kind>", "of a kind", (DynamicEntries(name, _list_content, _find_content, False),)
    )
    run = Directory(
        "<run_id>", "of a training run", (DynamicEntries(kind, _list_kinds, find_kind, False),)
    )
    each_run = DynamicEntries(run, entities.list_runs, entities.find_run, False)
    return Directory(".content", doc, (each_run,))


def _find_served_kind(site: NodeContext, kind: str) -> tuple[models.TrainingRun, str] | None:
    return _find_kind(site, kind) if kind in views.SERVED_KINDS else None


_CONTENT = _content(
    "what costs something to read, reached through the symlinks; lists nothing",
    weights_nodes.VERSION,
    _find_kind,
)
_ADAPTERS = views.adapters(
    _content("what the links lead to; not listed", weights_nodes.ADAPTER, _find_served_kind)
)

_TINKERFS = Directory(
    ".tinkerfs",
    "the mount's own control files",
    (
        GeneratedFile(
            "stats.json",
            "counters: API calls by endpoint and status, cache hits, errors, uptime",
            _stats,
            is_volatile=True,
            mtime_ns=_control_file_ns,
        ),
        GeneratedFile(
            "errors",
            "the last 100 failures, newest last",
            lambda site: site.model.telemetry.errors.text(),
            mode=0o600,
            journal=lambda site: site.model.telemetry.errors,
            is_volatile=True,
            mtime_ns=_control_file_ns,
        ),
        GeneratedFile(
            "changes",
            "the last 100 changes asked for through this mount, newest last",
            lambda site: site.model.telemetry.changes.text(),
            mode=0o600,
            journal=lambda site: site.model.telemetry.changes,
            is_volatile=True,
            mtime_ns=_control_file_ns,
        ),
        ControlFile(
            "refresh",
            "written (anything) to drop every cached entry now",
            lambda _site: b"",
            controls.store_refresh,
        ),
        trash.trash_directory(_TRASHED_ROWS),
    ),
)

ROOT = Directory(
    "",
    "the account",
    (
        GeneratedFile("README.md", "what is here and how to use it", lambda _site: readme.TEXT),
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
        _ADAPTERS,
        views.SESSIONS,
        views.SAMPLERS,
        _CONTENT,
        _TINKERFS,
    ),
)


def render_layout_docs() -> str:
    """Return `docs/layout.md`, made from the table."""
    lines = [
        "# Layout",
        "",
        "Made from the table in `tinkerfs/vfs/layout.py` by `scripts/docs`; do not edit.",
        "",
        "| path | kind | mode | what |",
        "|---|---|---|---|",
        *(_documented(ROOT, "")),
        "",
        "A link's permissions are its target's. On a read-only mount nothing shows a write bit.",
        "",
    ]
    return "\n".join(lines)


def _documented(folder: Directory, path: str) -> Iterator[str]:
    for row in folder.rows:
        node = row.node if isinstance(row, DynamicEntries) else row
        if node is None:  # the same again
            continue
        where = f"{path}/{node.name}"
        kind = type(node).__name__.lower()
        mode = {"folder": "0755", "link": "-"}.get(kind) or f"{node.mode:04o}"  # type: ignore[union-attr]
        yield f"| `{where}` | {kind} | {mode} | {node.doc} |"
        if isinstance(node, Directory):
            yield from _documented(node, where)
