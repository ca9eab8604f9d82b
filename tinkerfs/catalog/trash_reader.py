"""What is in the trash now, as the server lists it. Thread-safe."""

from collections.abc import Iterator
from itertools import islice

from tinkerfs import errors
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.listings import Checkpoint
from tinkerfs.catalog.trash import Trash
from tinkerfs.context import RequestContext


class TrashReader:
    """Finds the checkpoints in the trash in the listings of their runs.

    Args:
        catalogue: has the listings.
        trash: has the records.
        concurrency: how many runs are listed ahead of the caller.
    """

    def __init__(self, catalogue: Catalog, trash: Trash, concurrency: int) -> None:
        self._catalogue = catalogue
        self._trash = trash
        self._concurrency = concurrency

    def checkpoints(self, ctx: RequestContext) -> Iterator[Checkpoint]:
        """Yield what is in the trash; one call for each run with any, some at once.

        Raises:
            ApiError, OSError: a run cannot be listed; also between two checkpoints.
        """
        self._catalogue.find_own_runs(ctx)
        run_ids = self._trash.run_ids()
        ahead = iter(run_ids if self._catalogue.may_list_ahead else ())
        for first in islice(ahead, self._concurrency):
            self._catalogue.ask_listing(first)
        for run_id in run_ids:
            for another in islice(ahead, 1):
                self._catalogue.ask_listing(another)
            try:
                listing = self._catalogue.listed(run_id, ctx)
            except errors.NOT_FOUND_ERRORS:  # the run is gone
                continue
            yield from self._trash.of_run(run_id, listing)

    def checkpoint(self, key: tuple[str, str, str], ctx: RequestContext) -> Checkpoint | None:
        """Return a checkpoint that is in the trash, None for no such; one call when not fresh.

        Args:
            key: as `Checkpoint.key`.
            ctx: how to wait.

        Raises:
            ApiError, OSError: its run cannot be listed.
        """
        run_id, kind, name = key
        if not self._trash.has_run(run_id):
            return None
        self._catalogue.find_own_runs(ctx)
        try:
            found = self._catalogue.listed(run_id, ctx).get(kind, name)
        except errors.NOT_FOUND_ERRORS:
            return None
        return found if found is not None and self._trash.is_trashed(found) else None

    def changed_ns(self) -> int | None:
        """Return when something was seen to enter or leave the trash."""
        return self._trash.changed_at_ns()
