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
from tinkerfs.api import models
from tinkerfs.api.client import Client
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.cache.result_stream import Parts
from tinkerfs.cache.store import Store
from tinkerfs.catalog.amending import run_with_listed_last
from tinkerfs.catalog.incarnations import Incarnations
from tinkerfs.catalog.listings import (
    Checkpoint,
    CheckpointListing,
    RunListing,
    UserListing,
    checkpoints_of,
    kept_record,
)
from tinkerfs.catalog.policies import Freshness
from tinkerfs.catalog.prefetcher import Walk, Walks
from tinkerfs.catalog.trash import Trash
from tinkerfs.catalog.warm_start import Warm
from tinkerfs.catalog.weights_info import MAX_INFOS, Infos
from tinkerfs.clock import Clock
from tinkerfs.concurrency import side_by_side
from tinkerfs.context import IN_PROCESS, Call, Interest
from tinkerfs.telemetry import Telemetry
from tinkerfs.tinker_path import KINDS, TinkerPath

__all__ = ["Catalogue"]

log = logging.getLogger(__name__)

#: What a server says of the checkpoints of somebody else's run that it does not list.
_NO_LISTING = (errors.NotFound, errors.BadRequest, errors.Unauthorized, errors.EndpointMissing)

T = TypeVar("T")

#: A listing that is fresh for less than this, seconds, is not asked for ahead of a walk: it might
#: have to be asked for again once the walk comes to it.
LEAST_TTL_AHEAD_S = 10.0
#: How many steps of a walk that need no call are passed over at a time.
_MOST_PASSED = 64


class Catalogue:
    """The account behind one key at one server."""

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        store: Store,
        telemetry: Telemetry,
        clock: Clock,
        freshness: Freshness,
        warm: Warm,
        trash: Trash,
        concurrency: int,
    ) -> None:
        self._client = client
        self._cache = cache
        self._infos = Infos(
            MetadataCache(telemetry, clock, MAX_INFOS),
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
        self._walks = Walks(2 * concurrency, clock)
        self._lists_runs: bool | None = None  # learnt once; who comes second learns the same

    # What is there.

    @property
    def epoch(self) -> int:
        """A number that becomes another one whenever anything that is known does."""
        return self._cache.epoch + self._trash.epoch

    @property
    def amendments(self) -> int:
        """As `MetadataCache.amendments`: of changes that are made through this mount."""
        return self._cache.amendments + self._trash.epoch

    def runs(self, call: Call) -> RunListing:
        """Return the user's training runs; ceil(runs / page) calls when not fresh."""
        return self._cache.get(
            ("runs",), self._load_runs, self._freshness.listing, call, self._warm.runs
        )

    def each_run(self, call: Call) -> Iterator[models.TrainingRun]:
        """Yield the user's training runs; of a first listing that takes a while, as they come.

        Raises:
            ApiError, OSError: as `runs`; also between two runs.
        """
        found = self._cache.get_or_parts(
            ("runs",), self._load_runs, self._freshness.listing, call, self._warm.runs
        )
        return found.each(call) if isinstance(found, Parts) else iter(found.by_id.values())

    def known_runs(self) -> RunListing | None:
        """Return the training runs as last listed, without a call."""
        return self._cache.peek(("runs",))  # type: ignore[no-any-return]

    def run(self, run_id: str, call: Call) -> models.TrainingRun:
        """Return one training run: of the listing as far as it has come, else asked for by itself.

        Raises:
            ApiError: NotFound or BadRequest where there is no such run.
        """
        return self._with_visible_last(self._run(run_id, call), call)

    def _run(self, run_id: str, call: Call) -> models.TrainingRun:
        run: models.TrainingRun | None = self._coming(("runs",), run_id, call)
        if run is None and self.known_runs() is not None:
            run = self.runs(call).by_id.get(run_id)
        if run is not None:
            return run
        return self._cache.get(
            ("run", run_id), partial(self._load_run, run_id), self._freshness.by_name, call
        )

    def _with_visible_last(self, run: models.TrainingRun, call: Call) -> models.TrainingRun:
        """Return a run whose last checkpoints are not in the trash; one call if one may be."""
        if not self._trash.has_run(run.run_id):
            return run
        lasts = [each for each in (run.last_checkpoint, run.last_sampler_checkpoint) if each]
        if not any(self._trash.record(Checkpoint.of(run.run_id, each)) for each in lasts):
            return run
        try:
            return run_with_listed_last(run, self.checkpoints(run.run_id, call))
        except errors.ApiError:
            call.is_momentary()
            return run

    # Checkpoints. `MetadataCache` has the listings as the server sent them; all that is returned
    # is without what is in the trash, unless a method says otherwise.

    def checkpoints(
        self, run_id: str, call: Call, *, is_from_now: bool = False
    ) -> CheckpointListing:
        """Return the checkpoints of a run; one call when not fresh.

        Who looks into one run after the other has those of the next ones asked for behind it. With
        `is_from_now` what an earlier mount kept will not do.
        """
        return self._trash.visible(run_id, self.listed(run_id, call, is_from_now=is_from_now))

    def listed(self, run_id: str, call: Call, *, is_from_now: bool = False) -> CheckpointListing:
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
            call,
            None if is_from_now or self._trash.has_run(run_id) else kept,
        )

    def find(
        self, run_id: str, find: Callable[[CheckpointListing], T | None], call: Call
    ) -> T | None:
        """Return what `find` finds in the listing of a run's checkpoints.

        That something is not there is never said on the word of an earlier mount.
        """
        found = find(self.checkpoints(run_id, call))
        if found is None and self._cache.is_warm(("checkpoints", run_id)):
            found = find(self.checkpoints(run_id, call, is_from_now=True))
        return found

    def known_checkpoints(self, run_id: str) -> CheckpointListing | None:
        """Return a run's checkpoints as last listed, without a call."""
        listing = self.known_listing(run_id)
        return None if listing is None else self._trash.visible(run_id, listing)

    def known_listing(self, run_id: str) -> CheckpointListing | None:
        """Return a run's checkpoints as last listed, with what is in the trash, without a call."""
        return self._cache.peek(("checkpoints", run_id))  # type: ignore[no-any-return]

    def checkpoint(
        self, run_id: str, kind: str, name: str, call: Call, *, with_trashed: bool = False
    ) -> Checkpoint | None:
        """Return a checkpoint of a run's listing, else one that is known by its tinker path only.

        The user's own runs are listed whole: nothing is asked for what those lack. What is in the
        trash is returned `with_trashed` only.
        """
        own = self.known_runs()
        is_own = own is not None and run_id in own.by_id
        try:
            found = self.find(run_id, lambda listing: listing.get(kind, name), call)
            if found is None and self._trash.has_run(run_id):
                trashed = self.listed(run_id, call).get(kind, name)
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
        return self._cache.get(key, load, self._freshness.by_name, call)

    def user_checkpoints(self, call: Call) -> UserListing:
        """Return the checkpoints of all the user's runs; ceil(checkpoints / page) calls.

        Of a server that does not list them it is made of the listings of the runs.
        """
        self._expire_changed()
        listing = self._cache.get(
            ("user",), self._load_user, self._freshness.listing, call, self._warm_user()
        )
        return self._trash.visible_of_user(listing)

    def each_user_checkpoint(self, call: Call) -> Iterator[Checkpoint]:
        """Yield the checkpoints of all the user's runs; as they come where `each_run` would."""
        self._expire_changed()
        found = self._cache.get_or_parts(
            ("user",), self._load_user, self._freshness.listing, call, self._warm_user()
        )
        if isinstance(found, Parts):
            return (c for c in found.each(call) if not self._trash.is_trashed(c))
        return iter(self._trash.visible_of_user(found).by_key.values())

    def user_checkpoint(self, key: tuple[str, str, str], call: Call) -> Checkpoint | None:
        """Return one of the checkpoints of all the user's runs; not there as in `find`."""
        coming: Checkpoint | None = self._coming(("user",), key, call)
        if coming is not None:
            return None if self._trash.is_trashed(coming) else coming
        found = self.user_checkpoints(call).by_key.get(key)
        if found is None and self._cache.is_warm(("user",)):
            listing = self._cache.get(("user",), self._load_user, self._freshness.listing, call)
            found = self._trash.visible_of_user(listing).by_key.get(key)
        return found

    def known_user_checkpoints(self) -> UserListing | None:
        """Return the checkpoints of all runs as last listed, without a call."""
        listing: UserListing | None = self._cache.peek(("user",))
        return None if listing is None else self._trash.visible_of_user(listing)

    def _warm_user(self) -> Callable[[], UserListing | None] | None:
        return None if self._trash.has_any else self._warm.user

    def _expire_changed(self) -> None:
        """Have listed again what other processes have moved to the trash or restored."""
        changed = self._trash.take_changed_runs()
        for run_id in changed:
            self._warm.changed(run_id)
            self._cache.expire(("checkpoints", run_id))
        if changed:
            self._cache.expire(("user",))

    @property
    def may_list_ahead(self) -> bool:
        """Whether a listing stays fresh for long enough to be asked for ahead of its reader."""
        return self._freshness.listing.ttl_s >= LEAST_TTL_AHEAD_S

    def find_own_runs(self, call: Call) -> None:
        """Find out which runs are the account's if another key put checkpoints in the trash."""
        if self._trash.unknown_run_ids():
            self._trash.add_own_runs(self.runs(call).by_id)

    def _coming(self, key: Hashable, part: Hashable, call: Call) -> Any:
        found = self._cache.coming(key, part)
        if found is not None:
            call.is_momentary()
        return found

    # When a listing was seen to change, nanoseconds since 1970; None where it never was.

    def runs_changed_ns(self) -> int | None:
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
        changed_at = self._cache.changed_at(key)
        return None if changed_at is None else int(changed_at * 1e9)

    def weights_info(self, checkpoint: Checkpoint, call: Call) -> bytes:
        """Return a checkpoint's weights info as JSON; asked for once ever, kept across mounts.

        Who asks for one after the other has the next ones asked for behind it.
        """
        if self._walks.is_ahead(checkpoint.key):
            self._come_to_info(checkpoint)
        return self._infos.get(checkpoint, call)

    def checkpoints_afresh(self, run_id: str) -> CheckpointListing:
        """Return the checkpoints of a run as the server lists them now; one call, always.

        What is in the trash is among them.

        Raises:
            ApiError: the request fails.
        """
        load = partial(self._load_checkpoints, run_id)
        key = ("checkpoints", run_id)
        return self._cache.reload(key, load, self._freshness.listing, IN_PROCESS)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Use nothing that is cached of a deleted checkpoint for what is saved under its name."""
        self.incarnations.begin(checkpoint.key)
        self._infos.forget(checkpoint)
        self._cache.drop(("checkpoint", *checkpoint.key))

    def refresh(self) -> None:
        """Drop every entry; what is immutable stays on disk."""
        self._client.forget()
        self._walks.clear()
        self._warm.forget()
        self._cache.clear()
        self._infos.clear()

    # Loading; each is told whether somebody waits for it.

    def _load_runs(self, interest: Interest) -> RunListing:
        listing = RunListing.of(
            self._client.on_behalf(interest).all_training_runs(
                lambda runs: interest.came((run.run_id, run) for run in runs)
            )
        )
        self._walks.relisted()
        self._warm.keep_runs(listing)
        return listing

    def _load_run(self, run_id: str, interest: Interest) -> models.TrainingRun:
        try:
            return self._client.on_behalf(interest).training_run(run_id)
        except (errors.NotFound, errors.EndpointMissing):
            if self._has_run_records():
                raise
        # Of such a server a run is what has a listing of checkpoints.
        listing = self.checkpoints(run_id, IN_PROCESS)
        times = (c.record.time_ns for c in listing.all)
        return models.TrainingRun(
            run_id=run_id,
            last_request_time_ns=max((t for t in times if t is not None), default=None),
            raw=models.with_fields(b"{}", training_run_id=run_id),
        )

    def _has_run_records(self) -> bool:
        """Tell whether the server knows runs by themselves: hatchery has neither list nor record.

        Asked of it at most once, and only where nothing was listed before.
        """
        if self._lists_runs is None and self.known_runs() is None:
            try:
                self._client.list_training_runs(limit=1)
                self._lists_runs = True
            except errors.EndpointMissing:
                self._lists_runs = False
            except errors.ApiError:
                pass  # for now: what was said of the run stands
        return self._lists_runs is not False

    def _load_checkpoints(self, run_id: str, interest: Interest) -> CheckpointListing:
        if interest.is_awaited:
            self._come_to_run(run_id)
        client = self._client.on_behalf(interest)
        with self._walks.asking(run_id, interest):
            records = client.list_checkpoints(run_id)
        listing = CheckpointListing.of(run_id, records, known=self.known_user_checkpoints())
        self._reconcile_trash(run_id, listing)
        for walk in self._walks.listed(run_id, self._trash.visible(run_id, listing)):
            self._go_ahead(walk)
        self._warm.keep_checkpoints(run_id, listing)
        return listing

    def _reconcile_trash(self, run_id: str, listing: CheckpointListing) -> None:
        self._trash.refresh()
        if not self._trash.has_run(run_id):
            return
        try:
            self.find_own_runs(IN_PROCESS)
        except errors.ApiError as error:
            log.info("not known whether %s is this account's: %s", run_id, error)
        self._trash.reconcile(run_id, listing)

    def _load_user(self, interest: Interest) -> UserListing:
        def on_page(records: Sequence[models.Checkpoint]) -> None:
            checkpoints = [c for c in checkpoints_of(records) if c is not None]
            self._trash.add_own_runs(c.run_id for c in checkpoints)
            interest.came((c.key, c) for c in checkpoints)

        try:
            records = self._client.on_behalf(interest).all_user_checkpoints(
                lambda record: kept_record(record, self.known_checkpoints),
                on_page,
            )
        except errors.EndpointMissing:
            return self._user_of_runs()
        listing = UserListing.of_records(records)
        if listing.nameless:
            log.warning("%d checkpoints without a tinker path are left out", listing.nameless)
        self._warm.keep_user(listing)
        return listing

    def _user_of_runs(self) -> UserListing:
        run_ids = list(self.runs(IN_PROCESS).by_id)
        outcomes = side_by_side(
            [partial(self._if_there, run_id) for run_id in run_ids],
            self._concurrency,
            "checkpoints",
        )
        listings = [outcome.result() for outcome in outcomes]
        return UserListing.of(c for listing in listings for c in listing.all)

    def _if_there(self, run_id: str) -> CheckpointListing:
        try:
            return self.listed(run_id, IN_PROCESS)
        except errors.NotFound:  # deleted since the runs were listed
            return CheckpointListing(())

    def _load_unlisted(self, path: TinkerPath, interest: Interest) -> Checkpoint:
        info = self._client.on_behalf(interest).weights_info(str(path))
        checkpoint = Checkpoint.unlisted(path)
        self._infos.keep(checkpoint, info.raw)
        return checkpoint

    def _load_weights_info(self, checkpoint: Checkpoint, interest: Interest) -> bytes:
        if interest.is_awaited:
            self._come_to_info(checkpoint)
        client = self._client.on_behalf(interest)
        with self._walks.asking(checkpoint.key, interest):
            return client.weights_info(checkpoint.tinker_path, is_known=True).raw

    # Asking ahead of walks.

    def _come_to_run(self, run_id: str) -> None:
        self._go_ahead(self._walks.at_run(run_id, self._runs_ahead()))

    def _come_to_info(self, checkpoint: Checkpoint) -> None:
        siblings = self.known_checkpoints(checkpoint.run_id)
        self._go_ahead(self._walks.at_info(checkpoint, siblings, self._runs_ahead()))

    def _runs_ahead(self) -> RunListing | None:
        """Return the runs that may be asked ahead."""
        return self.known_runs() if self.may_list_ahead else None

    def _go_ahead(self, walk: Walk | None) -> None:
        """Ask for what a walk, if any, asks for next, as far as it has shown that it goes on."""
        if walk is None:
            return
        for _ in range(_MOST_PASSED):
            step = self._walks.next(walk)
            if step is None:
                return
            if isinstance(step, Checkpoint):
                is_asked = self._infos.ask(step)
            else:
                is_asked = self.ask_listing(step)
                known = None if is_asked else self.known_checkpoints(step)
                if known is not None:
                    self._walks.listed(step, known)
            if not is_asked:
                self._walks.drop(walk, step)

    def ask_listing(self, run_id: str) -> bool:
        """Start to list a run that no caller waits for yet, if needed; return whether it was."""
        load = partial(self._load_checkpoints, run_id)
        return self._cache.ask(("checkpoints", run_id), load, self._freshness.listing)


def _latest(*times_ns: int | None) -> int | None:
    return max((each for each in times_ns if each is not None), default=None)
