"""Lists the checkpoints that are in the trash. Thread-safe."""

from collections.abc import Iterator
from itertools import islice

from tinkerfs import errors
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.catalog.trash import Trash
from tinkerfs.context import RequestContext


class TrashReader:
    """Finds trashed checkpoints by matching trash records with run listings.

    Args:
        catalog: provides the listings.
        trash: provides the records.
        concurrency: number of run listings to prefetch.
    """

    def __init__(self, catalog: Catalog, trash: Trash, concurrency: int) -> None:
        self._catalog = catalog
        self._trash = trash
        self._concurrency = concurrency

    def checkpoints(self, ctx: RequestContext) -> Iterator[Checkpoint]:
        """Yield the checkpoints in the trash; one request per run with trash records.

        Raises:
            ApiError, OSError: a listing failed, possibly after some checkpoints were yielded.
        """
        self._catalog.find_own_runs(ctx)
        run_ids = self._trash.run_ids()
        prefetches = iter(run_ids if self._catalog.may_prefetch_listings() else ())
        for first in islice(prefetches, self._concurrency):
            self._catalog.prefetch_listing(first)
        for run_id in run_ids:
            for another in islice(prefetches, 1):
                self._catalog.prefetch_listing(another)
            try:
                listing = self._catalog.checkpoints_with_trash(run_id).get(ctx)
            except errors.NOT_FOUND_ERRORS:  # the run is gone
                continue
            yield from self._trash.of_run(run_id, listing)

    def checkpoint(self, key: tuple[str, str, str], ctx: RequestContext) -> Checkpoint | None:
        """Return the trashed checkpoint with a `Checkpoint.key`, or None if absent."""
        run_id, kind, name = key
        if not self._trash.has_run(run_id):
            return None
        self._catalog.find_own_runs(ctx)
        try:
            found = self._catalog.checkpoints_with_trash(run_id).get(ctx).get(kind, name)
        except errors.NOT_FOUND_ERRORS:
            return None
        return found if found is not None and self._trash.is_trashed(found) else None

    def last_changed_ns(self) -> int | None:
        """Return when the trash last changed, in Unix nanoseconds; None for never."""
        return self._trash.changed_at_ns()
