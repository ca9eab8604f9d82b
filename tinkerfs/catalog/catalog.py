"""Catalogue: a read-through model of the account.

The tree asks it for training runs and checkpoints and never sees the cache or the client. Values
are immutable; every method is thread-safe and waits only through the `Call` it is given. Failures
are `ApiError`s, or the `OSError`s of a wait that ended early.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from tinkerfs import errors
from tinkerfs.api import models, raw_json
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.result_stream import ResultStream
from tinkerfs.cache.store import MetadataStore
from tinkerfs.catalog.amending import run_with_listed_last
from tinkerfs.catalog.incarnations import Incarnations
from tinkerfs.catalog.listings import (
    AccountListing,
    Checkpoint,
    CheckpointListing,
    RunListing,
    checkpoints_of,
    reuse_known_record,
)
from tinkerfs.catalog.policies import CachePolicies
from tinkerfs.catalog.prefetcher import Traversal, TraversalPrefetcher
from tinkerfs.catalog.trash import Trash
from tinkerfs.catalog.warm_start import ListingSnapshots
from tinkerfs.catalog.weights_info import MAX_WEIGHTS_INFO_ENTRIES, WeightsInfoCache
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_concurrently
from tinkerfs.context import BACKGROUND_CONTEXT, Priority, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.tinker_path import KINDS, TinkerPath

log = logging.getLogger(__name__)

#: What a server says of the checkpoints of somebody else's run that it does not list.
_NO_LISTING = (errors.NotFound, errors.BadRequest, errors.Unauthorized, errors.UnsupportedEndpoint)

T = TypeVar("T")

#: A listing that is fresh for less than this, seconds, is not asked for ahead of a walk: it might
#: have to be asked for again once the walk comes to it.
MIN_TTL_FOR_PREFETCH_S = 10.0
#: How many steps of a walk that need no call are passed over at a time.
_MAX_SKIPPED = 64


class Catalog:
    """The account behind one key at one server."""

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        store: MetadataStore,
        telemetry: Telemetry,
        clock: Clock,
        freshness: CachePolicies,
        warm: ListingSnapshots,
        trash: Trash,
        concurrency: int,
    ) -> None:
        self._client = client
        self._cache = cache
        self._infos = WeightsInfoCache(
            MetadataCache(telemetry, clock, MAX_WEIGHTS_INFO_ENTRIES),
            store,
            client.base_url,
            freshness,
            self._load_weights_info,
        )
        self.incarnations = Incarnations(store, client.base_url)
        self._telemetry = telemetry
        self._clock = clock
        self._freshness = freshness
        self._warm = warm
        self._trash = trash
        self._concurrency = concurrency
        self._walks = TraversalPrefetcher(2 * concurrency, clock)
        self._supports_run_listing: bool | None = (
            None  # learnt once; who comes second learns the same
        )

    # What is there.

    @property
    def epoch(self) -> int:
        """A number that becomes another one whenever anything that is known does."""
        return self._cache.generation + self._trash.epoch

    @property
    def amendments(self) -> int:
        """As `MetadataCache.amendments`: of changes that are made through this mount."""
        return self._cache.local_mutations + self._trash.epoch

    def runs(self, ctx: RequestContext) -> RunListing:
        """Return the user's training runs; ceil(runs / page) calls when not fresh."""
        return self._cache.get(
            ("runs",), self._load_runs, self._freshness.listing, ctx, self._warm.runs
        )

    def iter_runs(self, ctx: RequestContext) -> Iterator[models.TrainingRun]:
        """Yield the user's training runs; of a first listing that takes a while, as they come.

        Raises:
            ApiError, OSError: as `runs`; also between two runs.
        """
        found = self._cache.get_or_stream(
            ("runs",), self._load_runs, self._freshness.listing, ctx, self._warm.runs
        )
        return found.iterate(ctx) if isinstance(found, ResultStream) else iter(found.by_id.values())

    def cached_runs(self) -> RunListing | None:
        """Return the training runs as last listed, without a call."""
        return self._cache.peek(("runs",))  # type: ignore[no-any-return]

    def run(self, run_id: str, ctx: RequestContext) -> models.TrainingRun:
        """Return one training run: of the listing as far as it has come, else asked for by itself.

        Raises:
            ApiError: NotFound or BadRequest where there is no such run.
        """
        return self._with_visible_last(self._run(run_id, ctx), ctx)

    def _run(self, run_id: str, ctx: RequestContext) -> models.TrainingRun:
        run: models.TrainingRun | None = self._peek_partial(("runs",), run_id, ctx)
        if run is None and self.cached_runs() is not None:
            run = self.runs(ctx).by_id.get(run_id)
        if run is not None:
            return run
        return self._cache.get(
            ("run", run_id), partial(self._load_run, run_id), self._freshness.by_name, ctx
        )

    def _with_visible_last(
        self, run: models.TrainingRun, ctx: RequestContext
    ) -> models.TrainingRun:
        """Return a run whose last checkpoints are not in the trash; one call if one may be."""
        if not self._trash.has_run(run.run_id):
            return run
        lasts = [each for each in (run.last_checkpoint, run.last_sampler_checkpoint) if each]
        if not any(self._trash.record(Checkpoint.from_record(run.run_id, each)) for each in lasts):
            return run
        try:
            return run_with_listed_last(run, self.checkpoints(run.run_id, ctx))
        except errors.ApiError:
            ctx.mark_uncacheable()
            return run

    # Checkpoints. `MetadataCache` has the listings as the server sent them; all that is returned
    # is without what is in the trash, unless a method says otherwise.

    def checkpoints(
        self, run_id: str, ctx: RequestContext, *, require_fresh: bool = False
    ) -> CheckpointListing:
        """Return the checkpoints of a run; one call when not fresh.

        Who looks into one run after the other has those of the next ones asked for behind it. With
        `is_from_now` what an earlier mount kept will not do.
        """
        return self._trash.visible(run_id, self.listed(run_id, ctx, require_fresh=require_fresh))

    def listed(
        self, run_id: str, ctx: RequestContext, *, require_fresh: bool = False
    ) -> CheckpointListing:
        """Return the checkpoints of a run as `checkpoints` does, with what is in the trash."""
        self._expire_changed()
        if self._walks.is_ahead(run_id):
            self._come_to_run(run_id)
        # What an earlier mount kept may be from before a removal.
        kept = partial(self._warm.checkpoints, run_id)
        return self._cache.get(
            ("checkpoints", run_id),
            partial(self._load_checkpoints, run_id),
            self._freshness.listing,
            ctx,
            None if require_fresh or self._trash.has_run(run_id) else kept,
        )

    def find_in_run(
        self, run_id: str, find: Callable[[CheckpointListing], T | None], ctx: RequestContext
    ) -> T | None:
        """Return what `find` finds in the listing of a run's checkpoints.

        That something is not there is never said on the word of an earlier mount.
        """
        found = find(self.checkpoints(run_id, ctx))
        if found is None and self._cache.is_warm(("checkpoints", run_id)):
            found = find(self.checkpoints(run_id, ctx, require_fresh=True))
        return found

    def cached_checkpoints(self, run_id: str) -> CheckpointListing | None:
        """Return a run's checkpoints as last listed, without a call."""
        listing = self.known_listing(run_id)
        return None if listing is None else self._trash.visible(run_id, listing)

    def known_listing(self, run_id: str) -> CheckpointListing | None:
        """Return a run's checkpoints as last listed, with what is in the trash, without a call."""
        return self._cache.peek(("checkpoints", run_id))  # type: ignore[no-any-return]

    def checkpoint(
        self, run_id: str, kind: str, name: str, ctx: RequestContext, *, with_trashed: bool = False
    ) -> Checkpoint | None:
        """Return a checkpoint of a run's listing, else one that is known by its tinker path only.

        The user's own runs are listed whole: nothing is asked for what those lack. What is in the
        trash is returned `with_trashed` only.
        """
        own = self.cached_runs()
        is_own = own is not None and run_id in own.by_id
        try:
            found = self.find_in_run(run_id, lambda listing: listing.get(kind, name), ctx)
            if found is None and self._trash.has_run(run_id):
                trashed = self.listed(run_id, ctx).get(kind, name)
                if trashed is not None and self._trash.is_trashed(trashed):
                    return trashed if with_trashed else None
        except _NO_LISTING:
            if is_own:
                raise
            found = None
        if found is not None or is_own or kind not in KINDS:
            return found
        path = TinkerPath(run_id, kind, name)
        load = partial(self._load_unlisted, path)
        key = ("checkpoint", run_id, kind, name)
        return self._cache.get(key, load, self._freshness.by_name, ctx)

    def user_checkpoints(self, ctx: RequestContext) -> AccountListing:
        """Return the checkpoints of all the user's runs; ceil(checkpoints / page) calls.

        Of a server that does not list them it is made of the listings of the runs.
        """
        self._expire_changed()
        listing = self._cache.get(
            ("user",), self._load_user, self._freshness.listing, ctx, self._warm_user()
        )
        return self._trash.visible_of_user(listing)

    def iter_account_checkpoints(self, ctx: RequestContext) -> Iterator[Checkpoint]:
        """Yield the checkpoints of all the user's runs; as they come where `each_run` would."""
        self._expire_changed()
        found = self._cache.get_or_stream(
            ("user",), self._load_user, self._freshness.listing, ctx, self._warm_user()
        )
        if isinstance(found, ResultStream):
            return (c for c in found.iterate(ctx) if not self._trash.is_trashed(c))
        return iter(self._trash.visible_of_user(found).by_key.values())

    def user_checkpoint(self, key: tuple[str, str, str], ctx: RequestContext) -> Checkpoint | None:
        """Return one of the checkpoints of all the user's runs; not there as in `find`."""
        coming: Checkpoint | None = self._peek_partial(("user",), key, ctx)
        if coming is not None:
            return None if self._trash.is_trashed(coming) else coming
        found = self.user_checkpoints(ctx).by_key.get(key)
        if found is None and self._cache.is_warm(("user",)):
            listing = self._cache.get(("user",), self._load_user, self._freshness.listing, ctx)
            found = self._trash.visible_of_user(listing).by_key.get(key)
        return found

    def cached_account_checkpoints(self) -> AccountListing | None:
        """Return the checkpoints of all runs as last listed, without a call."""
        listing: AccountListing | None = self._cache.peek(("user",))
        return None if listing is None else self._trash.visible_of_user(listing)

    def _warm_user(self) -> Callable[[], AccountListing | None] | None:
        return None if self._trash.has_any else self._warm.user

    def _expire_changed(self) -> None:
        """Have listed again what other processes have moved to the trash or restored."""
        changed = self._trash.take_changed_runs()
        for run_id in changed:
            self._warm.invalidate_run(run_id)
            self._cache.expire(("checkpoints", run_id))
        if changed:
            self._cache.expire(("user",))

    @property
    def may_list_ahead(self) -> bool:
        """Whether a listing stays fresh for long enough to be asked for ahead of its reader."""
        return self._freshness.listing.ttl_s >= MIN_TTL_FOR_PREFETCH_S

    def find_own_runs(self, ctx: RequestContext) -> None:
        """Find out which runs are the account's if another key put checkpoints in the trash."""
        if self._trash.unknown_run_ids():
            self._trash.add_own_runs(self.runs(ctx).by_id)

    def _peek_partial(self, key: Hashable, part: Hashable, ctx: RequestContext) -> Any:
        found = self._cache.peek_partial(key, part)
        if found is not None:
            ctx.mark_uncacheable()
        return found

    # When a listing was seen to change, nanoseconds since 1970; None where it never was.

    def runs_last_changed_ns(self) -> int | None:
        """Return when the user's runs were seen to change."""
        return self._changed_ns(("runs",))

    def checkpoints_changed_ns(self, run_id: str) -> int | None:
        """Return when the checkpoints of a run were seen to change."""
        changed_ns = self._changed_ns(("checkpoints", run_id))
        return _latest(changed_ns, self._trash.changed_at_ns(run_id))

    def user_changed_ns(self) -> int | None:
        """Return when the checkpoints of all runs were seen to change."""
        return _latest(self._changed_ns(("user",)), self._trash.changed_at_ns())

    def _changed_ns(self, key: Hashable) -> int | None:
        changed_at = self._cache.last_changed(key)
        return None if changed_at is None else int(changed_at * 1e9)

    def weights_info(self, checkpoint: Checkpoint, ctx: RequestContext) -> bytes:
        """Return a checkpoint's weights info as JSON; asked for once ever, kept across mounts.

        Who asks for one after the other has the next ones asked for behind it.
        """
        if self._walks.is_ahead(checkpoint.key):
            self._come_to_info(checkpoint)
        return self._infos.get(checkpoint, ctx)

    def checkpoints_afresh(self, run_id: str) -> CheckpointListing:
        """Return the checkpoints of a run as the server lists them now; one call, always.

        What is in the trash is among them.

        Raises:
            ApiError: the request fails.
        """
        load = partial(self._load_checkpoints, run_id)
        key = ("checkpoints", run_id)
        return self._cache.reload(key, load, self._freshness.listing, BACKGROUND_CONTEXT)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Use nothing that is cached of a deleted checkpoint for what is saved under its name."""
        self.incarnations.begin(checkpoint.key)
        self._infos.forget(checkpoint)
        self._cache.drop(("checkpoint", *checkpoint.key))

    def refresh(self) -> None:
        """Drop every entry; what is immutable stays on disk."""
        self._client.reset()
        self._walks.clear()
        self._warm.clear()
        self._cache.clear()
        self._infos.clear()

    # Loading; each is told whether somebody waits for it.

    def _load_runs(self, priority: Priority) -> RunListing:
        listing = RunListing.from_runs(
            self._client.with_priority(priority).all_training_runs(
                lambda runs: priority.on_partial((run.run_id, run) for run in runs)
            )
        )
        self._walks.on_runs_reloaded()
        self._warm.save_runs(listing)
        return listing

    def _load_run(self, run_id: str, priority: Priority) -> models.TrainingRun:
        try:
            return self._client.with_priority(priority).training_run(run_id)
        except (errors.NotFound, errors.UnsupportedEndpoint):
            if self._has_run_records():
                raise
        # Of such a server a run is what has a listing of checkpoints.
        listing = self.checkpoints(run_id, BACKGROUND_CONTEXT)
        times = (c.record.time_ns for c in listing.all)
        return models.TrainingRun(
            run_id=run_id,
            last_request_time_ns=max((t for t in times if t is not None), default=None),
            raw=raw_json.with_fields(b"{}", training_run_id=run_id),
        )

    def _has_run_records(self) -> bool:
        """Tell whether the server knows runs by themselves: hatchery has neither list nor record.

        Asked of it at most once, and only where nothing was listed before.
        """
        if self._supports_run_listing is None and self.cached_runs() is None:
            try:
                self._client.list_training_runs(limit=1)
                self._supports_run_listing = True
            except errors.UnsupportedEndpoint:
                self._supports_run_listing = False
            except errors.ApiError:
                pass  # for now: what was said of the run stands
        return self._supports_run_listing is not False

    def _load_checkpoints(self, run_id: str, priority: Priority) -> CheckpointListing:
        if priority.is_demand:
            self._come_to_run(run_id)
        client = self._client.with_priority(priority)
        with self._walks.stop_on_outage(run_id, priority):
            records = client.list_checkpoints(run_id)
        listing = CheckpointListing.of(run_id, records, known=self.cached_account_checkpoints())
        self._reconcile_trash(run_id, listing)
        for walk in self._walks.listed(run_id, self._trash.visible(run_id, listing)):
            self._issue_prefetches(walk)
        self._warm.save_checkpoints(run_id, listing)
        return listing

    def _reconcile_trash(self, run_id: str, listing: CheckpointListing) -> None:
        self._trash.refresh()
        if not self._trash.has_run(run_id):
            return
        try:
            self.find_own_runs(BACKGROUND_CONTEXT)
        except errors.ApiError as error:
            log.info("not known whether %s is this account's: %s", run_id, error)
        self._trash.reconcile(run_id, listing)

    def _load_user(self, priority: Priority) -> AccountListing:
        def on_page(records: Sequence[models.Checkpoint]) -> None:
            checkpoints = [c for c in checkpoints_of(records) if c is not None]
            self._trash.add_own_runs(c.run_id for c in checkpoints)
            priority.on_partial((c.key, c) for c in checkpoints)

        try:
            records = self._client.with_priority(priority).all_user_checkpoints(
                lambda record: reuse_known_record(record, self.cached_checkpoints),
                on_page,
            )
        except errors.UnsupportedEndpoint:
            return self._merge_run_listings()
        listing = AccountListing.of_records(records)
        if listing.without_run_count:
            log.warning(
                "%d checkpoints without a tinker path are left out", listing.without_run_count
            )
        self._warm.save_account(listing)
        return listing

    def _merge_run_listings(self) -> AccountListing:
        run_ids = list(self.runs(BACKGROUND_CONTEXT).by_id)
        outcomes = run_concurrently(
            [partial(self._checkpoints_or_empty, run_id) for run_id in run_ids],
            self._concurrency,
            "checkpoints",
        )
        listings = [outcome.result() for outcome in outcomes]
        return AccountListing.of(c for listing in listings for c in listing.all)

    def _checkpoints_or_empty(self, run_id: str) -> CheckpointListing:
        try:
            return self.listed(run_id, BACKGROUND_CONTEXT)
        except errors.NotFound:  # deleted since the runs were listed
            return CheckpointListing(())

    def _load_unlisted(self, path: TinkerPath, priority: Priority) -> Checkpoint:
        info = self._client.with_priority(priority).weights_info(str(path))
        checkpoint = Checkpoint.unlisted(path)
        self._infos.keep(checkpoint, info.raw)
        return checkpoint

    def _load_weights_info(self, checkpoint: Checkpoint, priority: Priority) -> bytes:
        if priority.is_demand:
            self._come_to_info(checkpoint)
        client = self._client.with_priority(priority)
        with self._walks.stop_on_outage(checkpoint.key, priority):
            return client.weights_info(checkpoint.tinker_path, is_known=True).raw

    # Asking ahead of walks.

    def _come_to_run(self, run_id: str) -> None:
        self._issue_prefetches(self._walks.on_run_access(run_id, self._runs_ahead()))

    def _come_to_info(self, checkpoint: Checkpoint) -> None:
        siblings = self.cached_checkpoints(checkpoint.run_id)
        self._issue_prefetches(self._walks.on_info_access(checkpoint, siblings, self._runs_ahead()))

    def _runs_ahead(self) -> RunListing | None:
        """Return the runs that may be asked ahead."""
        return self.cached_runs() if self.may_list_ahead else None

    def _issue_prefetches(self, walk: Traversal | None) -> None:
        """Ask for what a walk, if any, asks for next, as far as it has shown that it goes on."""
        if walk is None:
            return
        for _ in range(_MAX_SKIPPED):
            step = self._walks.next(walk)
            if step is None:
                return
            if isinstance(step, Checkpoint):
                is_asked = self._infos.ask(step)
            else:
                is_asked = self.ask_listing(step)
                known = None if is_asked else self.cached_checkpoints(step)
                if known is not None:
                    self._walks.listed(step, known)
            if not is_asked:
                self._walks.drop(walk, step)

    def ask_listing(self, run_id: str) -> bool:
        """Start to list a run that no caller waits for yet, if needed; return whether it was."""
        load = partial(self._load_checkpoints, run_id)
        return self._cache.prefetch(("checkpoints", run_id), load, self._freshness.listing)


def _latest(*times_ns: int | None) -> int | None:
    return max((each for each in times_ns if each is not None), default=None)
