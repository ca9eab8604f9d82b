"""THE TABLE: which names exist where.

To add a file: write a pure function in `render.py` (or one that asks the model), add a row here,
run `scripts/docs`. Listing, lookup, attributes and `docs/layout.md` follow from the row. What
cannot be removed stands first and last in its folder, so that a tool that removes everything meets
a refusal before it comes to a checkpoint, from whichever end it begins.
"""

from collections.abc import Callable, Iterable, Iterator

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.catalog.catalog import Catalogue
from tinkerfs.catalog.listings import Checkpoint, CheckpointListing
from tinkerfs.tinker_path import KINDS
from tinkerfs.vfs import controls, entities, readme, render, trash, views, weights_nodes
from tinkerfs.vfs.schema import Control, Each, File, Folder, Link, Removal, Row, Site

__all__ = ["ROOT", "documentation"]


# What the rows ask, in the order of the table.


def _latest(site: Site) -> str | None:
    return _latest_path(site.subject, site.subject.last_checkpoint)


def _latest_sampler(site: Site) -> str | None:
    return _latest_path(site.subject, site.subject.last_sampler_checkpoint)


def _latest_path(run: models.TrainingRun, record: models.Checkpoint | None) -> str | None:
    if record is None:
        return None
    # `<kind>/<name>` always resolves, so no listing has to tell how the server lists it.
    checkpoint = Checkpoint.of(run.run_id, record)
    return entities.checkpoint_path(checkpoint)


def _list_kinds(site: Site) -> Iterator[tuple[str, tuple[models.TrainingRun, str]]]:
    listing = site.model.catalogue.checkpoints(site.subject.run_id, site.call)
    for kind in listing.kinds:
        if listing.of_kind(kind):
            yield kind, (site.subject, kind)


def _find_kind(site: Site, kind: str) -> tuple[models.TrainingRun, str] | None:
    # The three kinds always resolve, so that `rmdir` finds the folder that it has just emptied.
    if kind in KINDS:
        return site.subject, kind

    def find(listing: CheckpointListing) -> tuple[models.TrainingRun, str] | None:
        return (site.subject, kind) if kind in listing.kinds else None

    return site.model.catalogue.find(site.subject.run_id, find, site.call)


def _list_bare(site: Site) -> Iterable[tuple[str, Checkpoint]]:
    return site.model.catalogue.checkpoints(site.subject.run_id, site.call).bare.items()


def _find_bare(site: Site, name: str) -> Checkpoint | None:
    run_id = site.subject.run_id
    return site.model.catalogue.find(run_id, lambda listing: listing.bare.get(name), site.call)


def _find_path_kind(site: Site, kind: str) -> tuple[models.TrainingRun, str] | None:
    run: models.TrainingRun = site.subject
    is_known = bool(_of_path(site, run, kind))
    return (run, kind) if is_known else None


def _list_of_path(site: Site) -> Iterable[tuple[str, Checkpoint]]:
    return _of_path(site, *site.subject).items()


def _find_of_path(site: Site, name: str) -> Checkpoint | None:
    return _of_path(site, *site.subject).get(name)


def _of_path(site: Site, run: models.TrainingRun, kind: str) -> dict[str, Checkpoint]:
    def find(listing: CheckpointListing) -> dict[str, Checkpoint] | None:
        return listing.of_path(kind) or None

    return site.model.catalogue.find(run.run_id, find, site.call) or {}


def _list_of_kind(site: Site) -> Iterator[tuple[str, Checkpoint]]:
    run, kind = site.subject
    for checkpoint in site.model.catalogue.checkpoints(run.run_id, site.call).of_kind(kind):
        yield checkpoint.name, checkpoint


def _find_of_kind(site: Site, name: str) -> Checkpoint | None:
    run, kind = site.subject
    return site.model.catalogue.checkpoint(run.run_id, kind, name, site.call)


# What costs something to read is found in the trash too: its links there lead to it.


def _list_content(site: Site) -> Iterator[tuple[str, Checkpoint]]:
    run, wanted = site.subject
    for checkpoint in site.model.catalogue.listed(run.run_id, site.call).all:
        if checkpoint.kind == wanted:
            yield checkpoint.name, checkpoint


def _find_content(site: Site, name: str) -> Checkpoint | None:
    run, kind = site.subject
    return site.model.catalogue.checkpoint(run.run_id, kind, name, site.call, with_trashed=True)


def _group_ns(site: Site) -> int:
    run, kind = site.subject
    try:
        known = site.model.catalogue.checkpoints(run.run_id, site.call)
    except errors.ApiError:  # somebody else's, who does not let them be listed
        known = None
    newest_ns = run.last_request_time_ns
    if known is not None and known.of_kind(kind):
        newest_ns = known.newest_ns[kind]
    changed_ns = site.model.catalogue.checkpoints_changed_ns(run.run_id)
    return entities.newest_ns(site, changed_ns, newest_ns)


def _checkpoints_ns(site: Site) -> int:
    run: models.TrainingRun = site.subject
    changed_ns = site.model.catalogue.checkpoints_changed_ns(run.run_id)
    return entities.newest_ns(site, changed_ns, run.last_request_time_ns)


def _checkpoint_info(site: Site) -> bytes:
    try:
        info = site.model.catalogue.weights_info(site.subject, site.call)
    except errors.ApiError as error:
        # It costs this checkpoint its weights info and nothing else; `errors` tells why.
        if not error.is_remembered:
            site.model.telemetry.failed(
                site.path, "weights info", errors.from_api(error, site.path)
            )
        site.call.is_momentary()
        info = None
    return render.checkpoint_info(site.subject.record, info)


def _published(site: Site) -> bytes:
    return render.line("1" if site.subject.record.is_public else "0")


def _expires_at(site: Site) -> bytes:
    expires_at_ns = site.subject.record.expires_at_ns
    return render.line("never" if expires_at_ns is None else render.rfc3339_ns(expires_at_ns))


def _list_version(site: Site) -> Iterable[tuple[str, Checkpoint]]:
    return ((site.subject.version, site.subject),)


def _find_version(site: Site, version: str) -> Checkpoint | None:
    checkpoint: Checkpoint = site.subject
    return checkpoint if version == checkpoint.version else None


def _stats(site: Site) -> bytes:
    model = site.model
    facts = {
        "base_url": model.settings.base_url,
        "cache_dir": model.settings.cache_dir,
        "cache_size_bytes": model.settings.cache_size_bytes,
        "account": _known(model.catalogue),
    }
    return render.json_values({**facts, **model.telemetry.snapshot()})


def _known(catalogue: Catalogue) -> dict[str, int]:
    """Return what the listings so far add up to, without a call; empty before the first."""
    runs = catalogue.known_runs()
    if runs is None:
        return {}
    listings = [catalogue.known_checkpoints(run_id) for run_id in runs.by_id]
    checkpoints = [c for known in listings if known for c in known.all]
    return {
        "runs": len(runs.by_id),
        "runs_listed": sum(known is not None for known in listings),
        "checkpoints": len(checkpoints),
        "size_bytes": sum(c.record.size_bytes or 0 for c in checkpoints),
    }


def _control_file_ns(site: Site) -> int:
    return int(site.model.clock.now() * 1e9)


# The table.

_CHECKPOINT_ROWS: tuple[Row, ...] = (
    File(
        "info.json",
        "weights info, merged with the listing's record",
        _checkpoint_info,
        mode=0o644,
        is_costly=True,
    ),
    weights_nodes.LINKS["archive_url"],
    Control(
        "published",
        '"1" or "0"; written to publish or unpublish',
        _published,
        controls.store_published,
    ),
    Control(
        "expires_at",
        'RFC 3339 time or "never"; written to set or clear the expiry',
        _expires_at,
        controls.store_expires_at,
    ),
    File(
        "tinker_path",
        "the tinker:// path and a newline",
        lambda site: render.line(site.subject.tinker_path),
        mode=0o644,
    ),
    weights_nodes.LINKS["files"],
    weights_nodes.LINKS["archive.tar"],
    weights_nodes.LINKS["tensors.json"],
)


_CHECKPOINT = Folder(
    "<name>",
    "a checkpoint",
    _CHECKPOINT_ROWS,
    entities.checkpoint_ns,
    entities.stored_bytes,
    Removal.CHECKPOINT,
    entities.checkpoint_xattrs,
)

#: In the trash nothing is published, and `expires_at` restores.
_TRASHED_ROWS = tuple(row for row in _CHECKPOINT_ROWS if not isinstance(row, Control))

_ALIAS = Link(
    "<name>",
    "the checkpoint of that name, where the server's ids have no kind; not listed",
    lambda site: entities.checkpoint_path(site.subject),
    mtime_ns=entities.checkpoint_ns,
)

_CHECKPOINTS = Folder(
    "checkpoints",
    "the run's checkpoints by kind and name, whatever form the server's ids have",
    (
        Each(
            Folder(
                "<kind>",
                "those of one kind: weights, sampler_weights, external_weights",
                (Each(_CHECKPOINT, _list_of_kind, _find_of_kind),),
                _group_ns,
                removal=Removal.GROUPING,
            ),
            _list_kinds,
            _find_kind,
        ),
        # A link, so that a checkpoint has one directory, and removing another name removes nothing.
        Each(_ALIAS, _list_bare, _find_bare, False),
        Each(
            Folder(
                "<part>",
                "what a tinker path has in place of a kind; not listed",
                (Each(_ALIAS, _list_of_path, _find_of_path, False),),
            ),
            lambda _site: (),  # none is so long that its file name is cut
            _find_path_kind,
            False,
        ),
    ),
    _checkpoints_ns,
    removal=Removal.GROUPING,
)

_RUN = Folder(
    "<run_id>",
    "a training run",
    (
        File("info.json", "the training run's record", lambda site: render.run_info(site.subject)),
        _CHECKPOINTS,
        Link("latest", "the newest training checkpoint, when the run has one", _latest, True),
        Link(
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
    version: Folder,
    find_kind: Callable[[Site, str], tuple[models.TrainingRun, str] | None],
) -> Folder:
    """Return a directory of what costs something to read, by version of a checkpoint.

    Nothing in it is listed, so that a walk does not reach it.
    """
    name = Folder(
        "<name>", "of a checkpoint", (Each(version, _list_version, _find_version, False),)
    )
    kind = Folder("<kind>", "of a kind", (Each(name, _list_content, _find_content, False),))
    run = Folder("<run_id>", "of a training run", (Each(kind, _list_kinds, find_kind, False),))
    each_run = Each(run, entities.list_runs, entities.find_run, False)
    return Folder(".content", doc, (each_run,))


def _find_served_kind(site: Site, kind: str) -> tuple[models.TrainingRun, str] | None:
    return _find_kind(site, kind) if kind in views.SERVED_KINDS else None


_CONTENT = _content(
    "what costs something to read, reached through the symlinks; lists nothing",
    weights_nodes.VERSION,
    _find_kind,
)
_ADAPTERS = views.adapters(
    _content("what the links lead to; not listed", weights_nodes.ADAPTER, _find_served_kind)
)

_TINKERFS = Folder(
    ".tinkerfs",
    "the mount's own control files",
    (
        File(
            "stats.json",
            "counters: API calls by endpoint and status, cache hits, errors, uptime",
            _stats,
            is_momentary=True,
            mtime_ns=_control_file_ns,
        ),
        File(
            "errors",
            "the last 100 failures, newest last",
            lambda site: site.model.telemetry.errors.text(),
            mode=0o600,
            journal=lambda site: site.model.telemetry.errors,
            is_momentary=True,
            mtime_ns=_control_file_ns,
        ),
        File(
            "changes",
            "the last 100 changes asked for through this mount, newest last",
            lambda site: site.model.telemetry.changes.text(),
            mode=0o600,
            journal=lambda site: site.model.telemetry.changes,
            is_momentary=True,
            mtime_ns=_control_file_ns,
        ),
        Control(
            "refresh",
            "written (anything) to drop every cached entry now",
            lambda _site: b"",
            controls.store_refresh,
        ),
        trash.trash_directory(_TRASHED_ROWS),
    ),
)

ROOT = Folder(
    "",
    "the account",
    (
        File("README.md", "what is here and how to use it", lambda _site: readme.TEXT),
        Folder(
            "runs",
            "every training run of the account",
            (Each(_RUN, entities.list_runs, entities.find_run),),
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


def documentation() -> str:
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


def _documented(folder: Folder, path: str) -> Iterator[str]:
    for row in folder.rows:
        node = row.node if isinstance(row, Each) else row
        if node is None:  # the same again
            continue
        where = f"{path}/{node.name}"
        kind = type(node).__name__.lower()
        mode = {"folder": "0755", "link": "-"}.get(kind) or f"{node.mode:04o}"  # type: ignore[union-attr]
        yield f"| `{where}` | {kind} | {mode} | {node.doc} |"
        if isinstance(node, Folder):
            yield from _documented(node, where)
