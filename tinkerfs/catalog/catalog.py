"""Read-through cache of the account's training runs and checkpoints.

The `vfs` package reads them here and never uses the metadata cache or the API client itself. Values
are immutable. Every method is thread-safe and waits only through its `RequestContext`. Failed
requests raise `ApiError`; a cancelled or timed-out wait raises `OSError`.
"""

import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice

from tinkerfs import errors
from tinkerfs.api import endpoints, models, raw_json
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.account_listing import AccountListing, AccountRecords
from tinkerfs.catalog.cached_listing import CachedListing, VisibleListing
from tinkerfs.catalog.incarnations import Incarnations
from tinkerfs.catalog.listings import (
    CheckpointListing,
    ListedCheckpoint,
    RunListing,
    SharedRunListing,
    apply_to_run,
    apply_to_runs,
    with_listed_last,
)
from tinkerfs.catalog.order_index import Order
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.catalog.prefetcher import SequencePrefetcher, following_checkpoint
from tinkerfs.catalog.trash import Trash
from tinkerfs.catalog.weights_info import MAX_WEIGHTS_INFO_ENTRIES, WeightsInfoCache
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_concurrently
from tinkerfs.context import BACKGROUND_CONTEXT, Priority, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.tinker_path import KINDS, TinkerPath

log = logging.getLogger(__name__)

#: Errors by which servers refuse to list the checkpoints of another user's run.
_NO_LISTING = (errors.NotFound, errors.BadRequest, errors.Unauthorized, errors.UnsupportedEndpoint)

#: Minimum TTL of listings for prefetching, seconds. With a shorter TTL a prefetched listing could
#: expire before the traversal reads it.
MIN_TTL_FOR_PREFETCH_S = 10.0


class Catalog:
    """The runs and checkpoints of one account on one server.

    Attributes:
        runs: the user's training runs.
        account: the checkpoints of all runs, without those in the trash. If the server has no such
            listing, the listings of all runs are merged.
        account_with_trash: the same and those in the trash.
        incarnations: how often each checkpoint name was deleted.
    """

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        store: MetadataStore,
        telemetry: Telemetry,
        clock: Clock,
        policies: CachePolicies,
        trash: Trash,
        concurrency: int,
    ) -> None:
        self._client = client
        self._cache = cache
        infos = MetadataCache(telemetry, clock, MAX_WEIGHTS_INFO_ENTRIES)
        self._weights_infos = WeightsInfoCache(
            infos, store, client.base_url, policies, self._load_weights_info
        )
        self.incarnations = Incarnations(store, client.base_url)
        self._policies = policies
        self._trash = trash
        self._concurrency = concurrency
        self.runs = CachedListing(cache, ("runs",), self._load_runs, policies.listing)
        self.shared = CachedListing(cache, ("shared",), self._load_shared, policies.listing)
        self.account_with_trash = CachedListing(
            cache, ("user",), self._load_account, policies.listing, self._expire_changed
        )
        self.account = VisibleListing(self.account_with_trash, trash, trash.visible_in_account)
        self._run_prefetcher = SequencePrefetcher(
            self._following_run,
            self._prefetch_listing,
            self._may_prefetch_listings,
            2 * concurrency,
            clock,
        )
        # Each weights info is requested only once ever, and its siblings are likely to follow.
        self._info_prefetcher = SequencePrefetcher(
            self._following_checkpoint,
            self._prefetch_info,
            lambda: not client.is_failing(endpoints.WEIGHTS_INFO),
            2 * concurrency,
            clock,
            group=lambda key: key[0],
        )
        self._supports_run_listing: bool | None = None  # unknown until the first request

    @property
    def generation(self) -> int:
        """A number that changes whenever any cached value changes."""
        return self._cache.generation + self._trash.generation

    @property
    def local_mutation_count(self) -> int:
        """A number that changes with every mutation that is made through this mount."""
        return self._cache.local_mutation_count + self._trash.generation

    def wait_idle(self, ctx: RequestContext) -> None:
        """Wait until no load is in flight, prefetches and background revalidations included.

        Raises:
            OSError: EINTR or ETIMEDOUT if the wait ended before that.
        """
        self._cache.wait_idle(ctx)
        self._weights_infos.wait_idle(ctx)

    def run(self, run_id: str, ctx: RequestContext) -> models.TrainingRun:
        """Return one training run, from a (partial) listing or by its own request.

        Raises:
            ApiError: NotFound or BadRequest if the run does not exist.
        """
        return self._with_visible_last(self._run(run_id, ctx), ctx)

    def _run(self, run_id: str, ctx: RequestContext) -> models.TrainingRun:
        run: models.TrainingRun | None = self.runs.peek_partial(run_id, ctx)
        if run is None and self.runs.peek(ctx) is not None:
            run = self.runs.get(ctx).by_id.get(run_id)
        if run is None:
            shared = self.shared.peek(ctx)
            if shared is not None and run_id in shared.by_id:
                run = self.shared.get(ctx).by_id.get(run_id)
        if run is not None:
            return run
        load = partial(self._load_run, run_id)
        return self._cache.get(("run", run_id), load, self._policies.by_name, ctx)

    def _with_visible_last(
        self, run: models.TrainingRun, ctx: RequestContext
    ) -> models.TrainingRun:
        """Replace a run's last checkpoints that are in the trash; at most one request."""
        if not self._trash.has_run(run.run_id):
            return run
        lasts = [each for each in (run.last_checkpoint, run.last_sampler_checkpoint) if each]
        if not any(
            self._trash.record(ListedCheckpoint.from_record(run.run_id, each)) for each in lasts
        ):
            return run
        try:
            return with_listed_last(run, self.checkpoints(run.run_id).get(ctx))
        except errors.ApiError:
            ctx.mark_uncacheable()
            return run

    def checkpoints(self, run_id: str) -> VisibleListing[CheckpointListing]:
        """Return the listing of a run's checkpoints, without those in the trash.

        A caller that reads one run after another triggers prefetches of the next runs.
        """
        visible = partial(self._trash.visible, run_id)
        return VisibleListing(self.checkpoints_with_trash(run_id), self._trash, visible, run_id)

    def checkpoints_with_trash(self, run_id: str) -> CachedListing[CheckpointListing]:
        """Return the listing of a run's checkpoints, as `checkpoints` does, and of its trash."""
        return CachedListing(
            self._cache,
            ("checkpoints", run_id),
            partial(self._load_checkpoints, run_id),
            self._policies.listing,
            partial(self._on_read, run_id),
        )

    def _on_read(self, run_id: str) -> None:
        self._expire_changed()
        self._run_prefetcher.on_read(run_id)

    def checkpoint(
        self,
        run_id: str,
        kind: str,
        name: str,
        ctx: RequestContext,
        *,
        include_trashed: bool = False,
    ) -> ListedCheckpoint | None:
        """Return a checkpoint of a run, or None if it does not exist.

        A checkpoint that the run's listing lacks is looked up by its tinker path. The user's own
        runs are exempt, because their listings are complete.
        """
        own = self.runs.peek(ctx)
        is_own = own is not None and run_id in own.by_id
        try:
            found = self.checkpoints(run_id).get(ctx).get(kind, name)
            if found is None and self._trash.has_run(run_id):
                trashed = self.checkpoints_with_trash(run_id).get(ctx).get(kind, name)
                if trashed is not None and self._trash.is_trashed(trashed):
                    return trashed if include_trashed else None
        except _NO_LISTING:
            if is_own:
                raise
            found = None
        if found is not None or is_own or kind not in KINDS:
            return found
        path = TinkerPath(run_id, kind, name)
        load = partial(self._load_unlisted, path)
        key = ("checkpoint", run_id, kind, name)
        return self._cache.get(key, load, self._policies.by_name, ctx)

    def account_checkpoint(
        self, key: tuple[str, str, str], ctx: RequestContext
    ) -> ListedCheckpoint | None:
        """Return one checkpoint of the account's listing, or None if it does not exist."""
        partial_result: ListedCheckpoint | None = self.account_with_trash.peek_partial(key, ctx)
        if partial_result is not None:
            return None if self._trash.is_trashed(partial_result) else partial_result
        return self.account.get(ctx).get(key)

    def _expire_changed(self) -> None:
        """Expire the listings of runs that another process trashed or restored."""
        changed = self._trash.take_changed_runs()
        for run_id in changed:
            self.expire_run(run_id)

    def expire_run(self, run_id: str) -> None:
        """Request a run's checkpoints again, because they were changed elsewhere."""
        self.checkpoints_with_trash(run_id).expire()
        self.account_with_trash.expire()

    def on_change_elsewhere(self, run_id: str | None) -> None:
        """Expire what another host has changed: a run, or anything if None."""
        if run_id is None:
            self._cache.expire_all()
            return
        self.expire_run(run_id)
        self._cache.expire(("run", run_id))
        runs = self.runs.peek(BACKGROUND_CONTEXT)
        if runs is not None and run_id not in runs.by_id:  # an export is a run of its own
            self.runs.expire()

    # The trash.

    def trashed_checkpoints(self, ctx: RequestContext) -> Iterator[ListedCheckpoint]:
        """Yield the checkpoints in the trash; one request per run with trash records.

        A request may fail after some checkpoints have been yielded.
        """
        self._refresh_own_runs(ctx)
        run_ids = self._trash.run_ids()
        prefetches = iter(run_ids if self._may_prefetch_listings() else ())
        for first in islice(prefetches, self._concurrency):
            self._prefetch_listing(first)
        for run_id in run_ids:
            for another in islice(prefetches, 1):
                self._prefetch_listing(another)
            try:
                listing = self.checkpoints_with_trash(run_id).get(ctx)
            except errors.NOT_FOUND_ERRORS:  # the run is gone
                continue
            yield from self._trash.of_run(run_id, listing)

    def trashed_checkpoint(
        self, key: tuple[str, str, str], ctx: RequestContext
    ) -> ListedCheckpoint | None:
        """Return the trashed checkpoint with a `Checkpoint.key`, or None if absent."""
        run_id, kind, name = key
        if not self._trash.has_run(run_id):
            return None
        self._refresh_own_runs(ctx)
        try:
            found = self.checkpoints_with_trash(run_id).get(ctx).get(kind, name)
        except errors.NOT_FOUND_ERRORS:
            return None
        return found if found is not None and self._trash.is_trashed(found) else None

    def trash_last_changed_ns(self) -> int | None:
        """Return when the trash last changed, in Unix nanoseconds; None for never."""
        return self._trash.changed_at_ns()

    def _refresh_own_runs(self, ctx: RequestContext) -> None:
        """List the runs if another key's trash records may belong to this account."""
        if self._trash.unknown_run_ids():
            self._trash.add_own_runs(self.runs.get(ctx).by_id)

    def weights_info(self, checkpoint: ListedCheckpoint, ctx: RequestContext) -> bytes:
        """Return a checkpoint's weights info as JSON; one request if it is not cached.

        A caller that reads one checkpoint after another triggers prefetches of the next ones.
        """
        self._info_prefetcher.on_read(checkpoint.key)
        return self._weights_infos.get(checkpoint, ctx)

    def update_last_checkpoints(self, run_id: str) -> None:
        """Update the last checkpoints in the cached records of a run from its cached listing."""
        listing = self.checkpoints_with_trash(run_id).peek(BACKGROUND_CONTEXT)
        if listing is None:
            return
        self._cache.update(
            ("run", run_id), lambda run: apply_to_run(run, listing), is_authoritative=True
        )
        self.runs.update(lambda runs: apply_to_runs(runs, run_id, listing), is_authoritative=True)

    def invalidate(self, checkpoint: ListedCheckpoint) -> None:
        """Discard the cached data of a deleted checkpoint; its name may be used again."""
        self.incarnations.begin(checkpoint.key)
        self._weights_infos.invalidate(checkpoint)
        self._cache.drop(("checkpoint", *checkpoint.key))

    def refresh(self) -> None:
        """Discard every cached value, except immutable ones on disk."""
        self._client.reset()
        self._run_prefetcher.clear()
        self._info_prefetcher.clear()
        self._cache.clear()
        self._weights_infos.clear()

    # Loaders of the metadata cache.

    def _load_runs(self, priority: Priority) -> RunListing:
        return RunListing.from_runs(
            self._client.with_priority(priority).all_training_runs(priority.on_partial)
        )

    def _load_shared(self, priority: Priority) -> SharedRunListing:
        own = self.runs.get(BACKGROUND_CONTEXT).by_id
        runs = self._client.with_priority(priority).all_accessible_runs()
        return SharedRunListing.from_accessible(runs, own)

    def _load_run(self, run_id: str, priority: Priority) -> models.TrainingRun:
        try:
            return self._client.with_priority(priority).training_run(run_id)
        except (errors.NotFound, errors.UnsupportedEndpoint):
            if self._detect_run_records():
                raise
        # On such a server a run exists if its checkpoints can be listed.
        listing = self.checkpoints(run_id).get(BACKGROUND_CONTEXT)
        times = (c.record.time_ns for c in listing.all)
        return models.TrainingRun(
            run_id=run_id,
            last_request_time_ns=max((t for t in times if t is not None), default=None),
            raw=raw_json.with_fields(b"{}", training_run_id=run_id),
        )

    def _detect_run_records(self) -> bool:
        """Return whether the server has run records, which hatchery has not.

        Sends at most one successful request, and none if the runs have been listed.
        """
        if self._supports_run_listing is None and self.runs.peek(BACKGROUND_CONTEXT) is None:
            try:
                self._client.list_training_runs(limit=1)
                self._supports_run_listing = True
            except errors.UnsupportedEndpoint:
                self._supports_run_listing = False
            except errors.ApiError:
                pass  # still unknown: the error of the run's own request is reported
        return self._supports_run_listing is not False

    def _load_checkpoints(self, run_id: str, priority: Priority) -> CheckpointListing:
        if priority.is_demand:
            self._run_prefetcher.on_access(run_id)
        records = self._client.with_priority(priority).list_checkpoints(run_id)
        listing = CheckpointListing.from_records(run_id, records)
        self._reconcile_trash(run_id, listing)
        return listing

    def _reconcile_trash(self, run_id: str, listing: CheckpointListing) -> None:
        self._trash.refresh()
        if not self._trash.has_run(run_id):
            return
        try:
            self._refresh_own_runs(BACKGROUND_CONTEXT)
        except errors.ApiError as error:
            log.info("could not determine the owner of run %s: %s", run_id, error)
        self._trash.reconcile(run_id, listing)

    def _load_account(self, priority: Priority) -> AccountListing:
        shown = 0

        def on_page(arrived: AccountRecords) -> None:
            nonlocal shown
            table = arrived.table
            self._trash.add_own_runs(table[row].run_id for row in range(shown, len(table)))
            shown = len(table)
            priority.on_partial(table)

        client = self._client.with_priority(priority)
        try:
            records = client.all_user_checkpoints(AccountRecords, on_page)
        except errors.UnsupportedEndpoint:
            return self._merge_run_listings()
        listing = AccountListing.from_records(records)
        if listing.without_run_count:
            log.warning("skipped %d checkpoints without a tinker path", listing.without_run_count)
        return listing

    def _merge_run_listings(self) -> AccountListing:
        run_ids = list(self.runs.get(BACKGROUND_CONTEXT).by_id)
        loads = [partial(self._checkpoints_or_empty, run_id) for run_id in run_ids]
        outcomes = run_concurrently(loads, self._concurrency, "checkpoints")
        listings = [outcome.result() for outcome in outcomes]
        return AccountListing.from_checkpoints(c for listing in listings for c in listing.all)

    def _checkpoints_or_empty(self, run_id: str) -> CheckpointListing:
        try:
            return self.checkpoints_with_trash(run_id).get(BACKGROUND_CONTEXT)
        except errors.NotFound:  # the run was deleted after the runs were listed
            return CheckpointListing(())

    def _load_unlisted(self, path: TinkerPath, priority: Priority) -> ListedCheckpoint:
        info = self._client.with_priority(priority).weights_info(str(path))
        checkpoint = ListedCheckpoint.unlisted(path)
        self._weights_infos.put(checkpoint, info.raw)
        return checkpoint

    def _load_weights_info(self, checkpoint: ListedCheckpoint, priority: Priority) -> bytes:
        if priority.is_demand:
            self._info_prefetcher.on_access(checkpoint.key)
        client = self._client.with_priority(priority)
        version = "/".join(map(str, checkpoint.fingerprint)) if checkpoint.has_time else ""
        return client.weights_info(checkpoint.tinker_path, exists=True, version=version).raw

    # Prefetching for traversals.

    def _following_run(self, run_id: str, order: Order) -> str | None:
        runs = self.runs.peek(BACKGROUND_CONTEXT)
        return None if runs is None else runs.order.next(run_id, order)

    def _following_checkpoint(
        self, key: tuple[str, str, str], order: Order
    ) -> tuple[str, str, str] | None:
        runs = self.runs.peek(BACKGROUND_CONTEXT)
        return following_checkpoint(key, order, runs, self._peek_checkpoints)

    def _may_prefetch_listings(self) -> bool:
        """Return whether prefetched listings are likely to arrive, and to be fresh when read."""
        is_long_enough = self._policies.listing.ttl_s >= MIN_TTL_FOR_PREFETCH_S
        return is_long_enough and not self._client.is_failing(endpoints.RUN_CHECKPOINTS)

    def _prefetch_listing(self, run_id: str) -> bool:
        return self.checkpoints_with_trash(run_id).prefetch()

    def _peek_checkpoints(self, run_id: str) -> CheckpointListing | None:
        return self.checkpoints(run_id).peek(BACKGROUND_CONTEXT)

    def _prefetch_info(self, key: tuple[str, str, str]) -> bool:
        run_id, kind, name = key
        listing = self._peek_checkpoints(run_id)
        checkpoint = None if listing is None else listing.get(kind, name)
        return checkpoint is not None and self._weights_infos.prefetch(checkpoint)
