"""The mount's own files in `/.tinkerfs`: statistics, journals and the control `refresh`."""

from collections.abc import Callable
from typing import Any, Final

from tinkerfs.catalog.catalog import Catalog
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.journal import Journal
from tinkerfs.vfs import controls, render
from tinkerfs.vfs.schema import ControlFile, DynamicEntries, GeneratedFile, Node, NodeSpec


def _stats(node: Node, _ctx: RequestContext) -> bytes:
    backend = node.backend
    paths = backend.cache_paths
    settings = {
        "base_url": backend.settings.base_url,
        "cache_dir": backend.settings.cache_dir,
        "metadata_dir": None if paths is None else str(paths.metadata),
        "is_cache_shared": paths is not None and paths.is_shared,
        "cache_size_bytes": backend.settings.cache_size_bytes,
        "weights_memory_bytes": backend.weights.memory.max_bytes,
        "base_models": backend.settings.base_models,
        "moe_layout": backend.settings.moe_layout,
        "log_file": backend.settings.log_file,
        "account": _account_totals(backend.catalog),
    }
    return render.json_values({**settings, **backend.telemetry.snapshot()})


def _account_totals(catalog: Catalog) -> dict[str, int]:
    """Return totals of the cached listings; empty before the first listing."""
    runs = catalog.runs.peek(BACKGROUND_CONTEXT)
    if runs is None:
        return {}
    listings = [catalog.checkpoints(run_id).peek(BACKGROUND_CONTEXT) for run_id in runs.by_id]
    checkpoints = [c for listing in listings if listing for c in listing.all]
    return {
        "runs": len(runs.by_id),
        "runs_listed": sum(listing is not None for listing in listings),
        "checkpoints": len(checkpoints),
        "size_bytes": sum(c.record.size_bytes or 0 for c in checkpoints),
    }


def _now_ns(node: Node, _ctx: RequestContext) -> int:
    return int(node.backend.clock.now() * 1e9)


def _journal_file(
    name: str, doc: str, journal: Callable[[Node], Journal[Any]], *, waits: bool = False
) -> GeneratedFile:
    return GeneratedFile(
        name,
        doc,
        lambda node, _ctx: journal(node).text(),
        mode=0o600,
        journal=journal,
        waits=waits,
        is_volatile=True,
        mtime_ns=_now_ns,
    )


_ACCESS_LOG = _journal_file(
    "access_log",
    "a line per file operation while it is read; a read waits for the next line; not listed",
    lambda node: node.backend.telemetry.access_log,
    waits=True,
)

SPECS: Final[tuple[NodeSpec, ...]] = (
    GeneratedFile(
        "stats.json",
        "counters: API requests by endpoint and status, cache hits, errors, uptime",
        _stats,
        is_volatile=True,
        mtime_ns=_now_ns,
    ),
    _journal_file(
        "errors",
        "the last 100 failures, newest last",
        lambda node: node.backend.telemetry.errors,
    ),
    _journal_file(
        "changes",
        "the last 100 changes requested through this mount, newest last",
        lambda node: node.backend.telemetry.changes,
    ),
    DynamicEntries(
        _ACCESS_LOG,
        lambda _node, _ctx: (),  # needed only for truncated names, which do not occur here
        lambda _node, name, _ctx: name if name == _ACCESS_LOG.name else None,
        False,  # a program that reads every file would wait for ever
    ),
    ControlFile(
        "refresh",
        "write anything to invalidate all cached metadata",
        lambda _node, _ctx: b"",
        controls.write_refresh,
    ),
)
