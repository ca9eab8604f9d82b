"""Changes of checkpoints: publish, expire, remove, each beside the cached listings that it touches.

Each change runs on a thread of its own, so that it is not cancelled when its caller leaves;
`changes` reports how it ended.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.api import models, raw_json
from tinkerfs.api.client import Client
from tinkerfs.api.transport import Recheck
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.catalog.amending import apply_to_run, apply_to_runs
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.listings import AccountListing, Checkpoint, CheckpointListing
from tinkerfs.catalog.trash import Trash, TrashState
from tinkerfs.catalog.warm_start import ListingSnapshots
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.telemetry import Telemetry, rfc3339

L = TypeVar("L", CheckpointListing, AccountListing)

#: Failures of a change after which the server may have another state than was listed before.
_IN_DOUBT: tuple[type[errors.ApiError], ...] = (
    *errors.UNAVAILABLE_ERRORS,
    errors.NotFound,
    errors.Conflict,
    errors.ResourceNotReady,
)


class Mutations:
    """Every change of the account. Thread-safe.

    Failures are `ApiError`s, or the `OSError`s of a wait that ended early.

    Args:
        client: sends the changes.
        cache: the catalogue's cached listings, which are amended after a change.
        warm: the listings on disk, likewise.
        telemetry: records what was asked for and how it ended.
        clock: `now` for expiries.
        catalogue: lists what exists.
        trash: the records of what was removed.
        trash_s: how long a removed checkpoint stays in the trash, seconds; None to delete it.
    """

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        warm: ListingSnapshots,
        telemetry: Telemetry,
        clock: Clock,
        catalogue: Catalog,
        trash: Trash,
        trash_s: float | None,
    ) -> None:
        self._client = client
        self._cache = cache
        self._warm = warm
        self._telemetry = telemetry
        self._clock = clock
        self._catalogue = catalogue
        self._trash = trash
        self._trash_s = trash_s

    def set_published(
        self, expected: Checkpoint, wanted: bool, path: str, ctx: RequestContext
    ) -> None:
        """Publish or unpublish; nothing is asked for that is so already."""

        def is_made(now: Checkpoint | None) -> bool:
            return now is not None and now.record.is_public == wanted

        def act(checkpoint: Checkpoint) -> str | None:
            if checkpoint.record.is_public == wanted:
                return "was so already"
            request = self._client.publish if wanted else self._client.unpublish
            request(checkpoint.ref, self._recheck(checkpoint, is_made))
            raw = raw_json.with_fields(checkpoint.record.raw, public=wanted)
            record = replace(checkpoint.record, is_public=wanted).with_raw(raw)
            self._update_cached_listings(checkpoint, record)
            return None

        self._run_mutation(expected, "publish" if wanted else "unpublish", act, path, ctx)

    def set_ttl(
        self, expected: Checkpoint, ttl_s: int | None, path: str, ctx: RequestContext
    ) -> None:
        """Let a checkpoint expire `ttl_s` seconds from now, or never."""

        def act(checkpoint: Checkpoint) -> None:
            removed = self._trash.record(checkpoint)
            if removed is not None:  # it was restored elsewhere; its new expiry is not the trash's
                self._trash.forget(removed)
            # Which expiry the server made of the seconds is not known: it is set once more.
            recheck = self._recheck(checkpoint, lambda _now: False)
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
            # The server rounds as it likes: ours serves only until the next look asks it.
            self._update_cached_listings(
                checkpoint, self._expiring_in(checkpoint, ttl_s), is_exact=False
            )

        what = "never expire" if ttl_s is None else f"expire in {ttl_s} s"
        self._run_mutation(expected, what, act, path, ctx)

    def remove(self, expected: Checkpoint, path: str, ctx: RequestContext) -> None:
        """Delete a checkpoint for good, or with `--trash` let it expire and hide it until then.

        Raises:
            ApiError: EndpointMissing if it cannot expire; it is not deleted then.
            OSError: EIO if the record for the trash cannot be written; nothing is changed then.
        """
        if self._trash_s is None:
            self._run_mutation(expected, "delete", self._delete, path, ctx)
        else:
            trash = partial(self._move_to_trash, ttl_s=int(self._trash_s))
            self._run_mutation(expected, "move to the trash", trash, path, ctx)

    def undelete(self, expected: Checkpoint, path: str, ctx: RequestContext) -> None:
        """Restore a checkpoint from the trash, with the expiry that it had before."""
        self._run_mutation(
            expected, "restore from the trash", self._restore, path, ctx, in_trash=True
        )

    def _delete(self, checkpoint: Checkpoint) -> None:
        recheck = self._recheck(checkpoint, lambda now: now is None)
        try:
            self._client.delete(checkpoint.ref, recheck)
        except _IN_DOUBT:
            if not checkpoint.is_dated:  # what is saved next could have the same record
                self._catalogue.forget(checkpoint)
            raise
        self._catalogue.forget(checkpoint)
        self._update_cached_listings(checkpoint, None)

    def _move_to_trash(self, checkpoint: Checkpoint, ttl_s: int) -> str:
        # The record comes first: `Trash` says why.
        record = self._trash.plan(checkpoint, ttl_s)
        if record.state is TrashState.LISTED:
            return "done; it expires sooner than in the trash, and that stays"
        recheck = self._recheck(checkpoint, self._is_trashed)
        try:
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
        except errors.UNAVAILABLE_ERRORS:
            raise  # it may be done
        except errors.UnsupportedEndpoint as error:
            self._trash.forget(record)
            consequence = "--trash needs a server with expiries; nothing was removed"
            raise error.explained(consequence) from error
        except errors.ApiError:
            self._trash.forget(record)
            raise
        self._trash.mark_set(record)
        if not checkpoint.is_dated:  # what is saved next could have the same record
            self._catalogue.forget(checkpoint)
        self._update_cached_listings(checkpoint, self._expiring_in(checkpoint, ttl_s))
        return f"done; expires in {ttl_s} s"

    def _restore(self, checkpoint: Checkpoint) -> str | None:
        record = self._trash.record(checkpoint)
        if record is None or not record.is_in_effect(checkpoint.record.expires_at_ns):
            return "was so already"
        if checkpoint.record.expires_at_ns == record.former_expires_at_ns:
            restored = checkpoint.record  # a nearer expiry stayed as it was
        else:
            ttl_s = record.former_ttl_s(self._clock.now())
            recheck = self._recheck(
                checkpoint, lambda now: now is not None and not self._is_trashed(now)
            )
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
            restored = self._expiring_in(checkpoint, ttl_s)
        self._trash.forget(record)
        self._update_cached_listings(checkpoint, restored, is_exact=False)
        return None

    def _is_trashed(self, now: Checkpoint | None) -> bool:
        return now is not None and self._trash.is_trashed(now)

    def _expiring_in(self, checkpoint: Checkpoint, ttl_s: int | None) -> models.Checkpoint:
        """Return a checkpoint's record with an expiry that has just been set."""
        expires_at_s = None if ttl_s is None else math.floor(self._clock.now()) + ttl_s
        raw = raw_json.with_fields(
            checkpoint.record.raw,
            expires_at=None if expires_at_s is None else rfc3339(expires_at_s),
        )
        expires_at_ns = None if expires_at_s is None else expires_at_s * 1_000_000_000
        return replace(checkpoint.record, expires_at_ns=expires_at_ns).with_raw(raw)

    def _run_mutation(
        self,
        expected: Checkpoint,
        what: str,
        act: Callable[[Checkpoint], str | None],
        path: str,
        ctx: RequestContext,
        *,
        in_trash: bool = False,
    ) -> None:
        """Ask the server afresh what is there, then act on it, under the eyes of `changes`."""
        change = self._telemetry.begin_mutation(path, what, ctx.caller())

        def work() -> None:
            try:
                checkpoint = self._refetch(expected, in_trash=in_trash)
                try:
                    outcome = act(checkpoint)
                except _IN_DOUBT:
                    self._expire(expected.run_id)
                    raise
            except Exception as error:
                self._telemetry.end_mutation(change, f"failed: {error}")
                raise
            self._telemetry.end_mutation(change, outcome or "done")

        future = run_in_thread(work, f"{what} {path}")
        try:
            ctx.wait_for(future)
        except OSError as error:
            if not future.done():
                change.abandoned_with = errors.errno_name(error)
            raise

    def _refetch(self, expected: Checkpoint, *, in_trash: bool) -> Checkpoint:
        """Return a checkpoint as the server tells of it now."""
        now = self._listed(expected)
        if now is None:
            raise errors.NotFound("the checkpoint is gone by now")
        if not now.may_be(expected):
            raise errors.Conflict("the checkpoint was saved again since it was looked at")
        if not in_trash and self._trash.is_trashed(now):
            raise errors.NotFound("the checkpoint is in the trash by now")
        return now

    def _listed(self, expected: Checkpoint) -> Checkpoint | None:
        return self._catalogue.checkpoints_afresh(expected.run_id).get(expected.kind, expected.name)

    def _recheck(self, sent: Checkpoint, is_made: Callable[[Checkpoint | None], bool]) -> Recheck:
        """Return what decides whether a change of `sent` may be sent again.

        An earlier try may have been done although its response was a failure or was lost, and
        another checkpoint may have been saved under the name since.

        Args:
            sent: the checkpoint that the change is about, as last listed.
            is_made: whether the change is made, from the checkpoint as listed now; None where
                it is gone.
        """

        def recheck(failure: errors.ApiError, may_be_done: bool) -> bool:
            try:
                now = self._listed(sent)
            except errors.ApiError as error:
                raise failure from error  # what there is now cannot be known
            if now is not None and not now.may_be(sent):
                raise errors.Conflict(
                    "the checkpoint was saved again under its name while this change was under "
                    f"way; the new one was left alone (the first try: {failure})"
                )
            if is_made(now) and (may_be_done or now is not None):
                return True
            if now is None:
                raise errors.NotFound("the checkpoint is gone by now")
            if may_be_done and not now.is_dated:
                raise failure  # one that was saved since would look the same
            return False

        return recheck

    def _expire(self, run_id: str) -> None:
        """Have listings asked for again: a change that failed may have been made all the same."""
        self._warm.invalidate_run(run_id)
        for key in (("checkpoints", run_id), ("user",)):
            self._cache.expire(key)

    def _update_cached_listings(
        self, checkpoint: Checkpoint, record: models.Checkpoint | None, *, is_exact: bool = True
    ) -> None:
        """Make every listing agree with a change that the server has made.

        Args:
            checkpoint: what was changed.
            record: as it is now; None where it was deleted.
            is_exact: the server would tell the same; else it is asked at the next look.
        """

        def change(listing: L) -> L:
            return listing.with_record(checkpoint, record)

        run_id = checkpoint.run_id
        self._warm.invalidate_run(run_id)
        for key in (("checkpoints", run_id), ("user",)):
            self._cache.update(key, change, is_authoritative=is_exact)
        listing = self._catalogue.known_listing(run_id)
        if listing is None:
            return

        self._cache.update(
            ("run", run_id), lambda run: apply_to_run(run, listing), is_authoritative=True
        )
        self._cache.update(
            ("runs",), lambda runs: apply_to_runs(runs, run_id, listing), is_authoritative=True
        )
