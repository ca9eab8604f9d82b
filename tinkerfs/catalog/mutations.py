"""Mutate checkpoints: publish, expire, remove, and restore from the trash.

Each mutation runs on its own thread, so that it completes even if its caller is interrupted.
Afterwards the cached listings are updated, and the outcome is recorded for the file `changes`.
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
from tinkerfs.catalog.account_listing import AccountListing
from tinkerfs.catalog.catalog import Catalog
from tinkerfs.catalog.listings import CheckpointListing, ListedCheckpoint
from tinkerfs.catalog.trash import Trash, TrashState
from tinkerfs.clock import Clock
from tinkerfs.concurrency import run_in_thread
from tinkerfs.context import RequestContext
from tinkerfs.telemetry import Telemetry, rfc3339

L = TypeVar("L", CheckpointListing, AccountListing)

#: Errors of a mutation after which the cached listings may differ from the server's state.
_UNCERTAIN_OUTCOME: tuple[type[errors.ApiError], ...] = (
    *errors.UNAVAILABLE_ERRORS,
    errors.NotFound,
    errors.Conflict,
    errors.ResourceNotReady,
)

#: Outcome of a mutation that needed no request.
_UNCHANGED = "no change needed"


class Mutations:
    """Executes the mutations of one account. Thread-safe.

    Failed requests raise `ApiError`; a cancelled or timed-out wait raises `OSError`.

    Args:
        client: sends the requests.
        telemetry: records each mutation and its outcome.
        clock: wall-clock time for expiries.
        catalog: lists the current checkpoints; its listings are updated after a mutation.
        trash: records of removed checkpoints.
        trash_s: how long a removed checkpoint stays in the trash, seconds; None to delete it.
    """

    def __init__(
        self,
        client: Client,
        telemetry: Telemetry,
        clock: Clock,
        catalog: Catalog,
        trash: Trash,
        trash_s: float | None,
    ) -> None:
        self._client = client
        self._telemetry = telemetry
        self._clock = clock
        self._catalog = catalog
        self._trash = trash
        self._trash_s = trash_s

    def set_published(
        self, expected: ListedCheckpoint, is_public: bool, path: str, ctx: RequestContext
    ) -> None:
        """Publish or unpublish a checkpoint; no request if that is already its state."""

        def is_done(current: ListedCheckpoint | None) -> bool:
            return current is not None and current.record.is_public == is_public

        def act(checkpoint: ListedCheckpoint) -> str | None:
            if checkpoint.record.is_public == is_public:
                return _UNCHANGED
            request = self._client.publish if is_public else self._client.unpublish
            request(checkpoint.ref, self._recheck(checkpoint, is_done))
            raw = raw_json.with_fields(checkpoint.record.raw, public=is_public)
            record = replace(checkpoint.record, is_public=is_public).with_raw(raw)
            self._update_cached_listings(checkpoint, record)
            return None

        self._run_mutation(expected, "publish" if is_public else "unpublish", act, path, ctx)

    def set_ttl(
        self, expected: ListedCheckpoint, ttl_s: int | None, path: str, ctx: RequestContext
    ) -> None:
        """Let a checkpoint expire `ttl_s` seconds from now, or never if None."""

        def act(checkpoint: ListedCheckpoint) -> None:
            former_removal = self._trash.record(checkpoint)
            if former_removal is not None:  # restored by another client
                self._trash.discard(former_removal)
            # The expiry that results from the TTL is unknown, so a retry always sends it again.
            recheck = self._recheck(checkpoint, lambda _current: False)
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
            # Servers round the expiry, so the next access revalidates the listings.
            record = self._expiring_in(checkpoint, ttl_s)
            self._update_cached_listings(checkpoint, record, is_authoritative=False)

        action = "never expire" if ttl_s is None else f"expire in {ttl_s} s"
        self._run_mutation(expected, action, act, path, ctx)

    def remove(self, expected: ListedCheckpoint, path: str, ctx: RequestContext) -> None:
        """Delete a checkpoint, or with `--trash` let it expire and hide it until then.

        Raises:
            ApiError: UnsupportedEndpoint if the server has no expiries; nothing was removed.
            OSError: EIO if the trash record could not be written; nothing was removed.
        """
        if self._trash_s is None:
            self._run_mutation(expected, "delete", self._delete, path, ctx)
        else:
            trash = partial(self._move_to_trash, ttl_s=int(self._trash_s))
            self._run_mutation(expected, "move to the trash", trash, path, ctx)

    def undelete(self, expected: ListedCheckpoint, path: str, ctx: RequestContext) -> None:
        """Restore a checkpoint from the trash, with the expiry before its removal."""
        self._run_mutation(
            expected, "restore from the trash", self._restore, path, ctx, in_trash=True
        )

    def check_current(self, expected: ListedCheckpoint) -> None:
        """Request the checkpoints of the run, and compare the version of one.

        A record without a time is not compared. It identifies no version, and that of another
        account's checkpoint may be in no listing.

        Raises:
            ApiError: the request failed; Conflict if the checkpoint was saved again; NotFound if it
                was removed.
        """
        if expected.has_time:
            self._refetch_expected(expected, in_trash=False)

    def _delete(self, checkpoint: ListedCheckpoint) -> None:
        recheck = self._recheck(checkpoint, lambda current: current is None)
        try:
            self._client.delete(checkpoint.ref, recheck)
        except _UNCERTAIN_OUTCOME:
            if not checkpoint.has_time:  # a successor may have an identical record
                self._catalog.invalidate(checkpoint)
            raise
        self._catalog.invalidate(checkpoint)
        self._update_cached_listings(checkpoint, None)

    def _move_to_trash(self, checkpoint: ListedCheckpoint, ttl_s: int) -> str:
        # The record is written before the request: see the docstring of the `trash` module.
        record = self._trash.plan(checkpoint, ttl_s)
        if record.state is TrashState.LISTED:
            return "done; the earlier expiry stays"
        recheck = self._recheck(checkpoint, self._is_trashed)
        try:
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
        except errors.UNAVAILABLE_ERRORS:
            raise  # the request may have succeeded: the record must stay
        except errors.UnsupportedEndpoint as error:
            self._trash.discard(record)
            consequence = "--trash needs a server with expiries; nothing was removed"
            raise error.with_consequence(consequence) from error
        except errors.ApiError:
            self._trash.discard(record)
            raise
        self._trash.mark_set(record)
        if not checkpoint.has_time:  # a successor may have an identical record
            self._catalog.invalidate(checkpoint)
        self._update_cached_listings(checkpoint, self._expiring_in(checkpoint, ttl_s))
        return f"done; expires in {ttl_s} s"

    def _restore(self, checkpoint: ListedCheckpoint) -> str | None:
        record = self._trash.record(checkpoint)
        if record is None or not record.is_in_effect(checkpoint.record.expires_at_ns):
            return _UNCHANGED
        if checkpoint.record.expires_at_ns == record.former_expires_at_ns:
            restored = checkpoint.record  # the removal left an earlier expiry in place
        else:
            ttl_s = record.former_ttl_s(self._clock.now())
            recheck = self._recheck(
                checkpoint, lambda current: current is not None and not self._is_trashed(current)
            )
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
            restored = self._expiring_in(checkpoint, ttl_s)
        self._trash.discard(record)
        self._update_cached_listings(checkpoint, restored, is_authoritative=False)
        return None

    def _is_trashed(self, current: ListedCheckpoint | None) -> bool:
        return current is not None and self._trash.is_trashed(current)

    def _expiring_in(self, checkpoint: ListedCheckpoint, ttl_s: int | None) -> models.Checkpoint:
        """Return a checkpoint's record with the expiry of a TTL that was just set."""
        expires_at_s = None if ttl_s is None else math.floor(self._clock.now()) + ttl_s
        raw = raw_json.with_fields(
            checkpoint.record.raw,
            expires_at=None if expires_at_s is None else rfc3339(expires_at_s),
        )
        expires_at_ns = None if expires_at_s is None else expires_at_s * 1_000_000_000
        return replace(checkpoint.record, expires_at_ns=expires_at_ns).with_raw(raw)

    def _run_mutation(
        self,
        expected: ListedCheckpoint,
        action: str,
        act: Callable[[ListedCheckpoint], str | None],
        path: str,
        ctx: RequestContext,
        *,
        in_trash: bool = False,
    ) -> None:
        """List the checkpoint again, then call `act` with it on another thread.

        Args:
            expected: the checkpoint as the caller last saw it.
            action: description of the mutation for `changes`.
            act: sends the mutation; returns its outcome for `changes`, None for "done".
            path: path of the checkpoint in the mount.
            ctx: the context of the operation, by which this method waits for the thread.
            in_trash: whether a checkpoint in the trash is acceptable.
        """
        mutation = self._telemetry.begin_mutation(path, action, ctx.caller(), expected.tinker_path)

        def work() -> None:
            try:
                checkpoint = self._refetch_expected(expected, in_trash=in_trash)
                try:
                    outcome = act(checkpoint)
                except _UNCERTAIN_OUTCOME:
                    self._expire(expected.run_id)
                    raise
            except Exception as error:
                self._telemetry.end_mutation(mutation, f"failed: {error}")
                raise
            self._telemetry.end_mutation(mutation, outcome or "done")

        future = run_in_thread(work, f"{action} {path}")
        try:
            ctx.wait_for(future)
        except OSError as error:
            if not future.done():
                mutation.abandoned_with = errors.errno_name(error)
            raise

    def _refetch_expected(self, expected: ListedCheckpoint, *, in_trash: bool) -> ListedCheckpoint:
        """Return the current checkpoint if it is still the expected version."""
        current = self._fetch(expected)
        if current is None:
            raise errors.NotFound("the checkpoint no longer exists")
        if not current.may_be(expected):
            raise errors.Conflict("the checkpoint was saved again in the meantime")
        if not in_trash and self._trash.is_trashed(current):
            raise errors.NotFound("the checkpoint is already in the trash")
        return current

    def _fetch(self, expected: ListedCheckpoint) -> ListedCheckpoint | None:
        listing = self._catalog.checkpoints_with_trash(expected.run_id).reload()
        return listing.get(expected.kind, expected.name)

    def _recheck(
        self, sent: ListedCheckpoint, is_done: Callable[[ListedCheckpoint | None], bool]
    ) -> Recheck:
        """Return a function that decides whether a mutation of `sent` may be retried.

        The first attempt may have succeeded although its response was an error or was lost. Another
        checkpoint may have been saved under the name since then.

        Args:
            sent: the checkpoint that the mutation applies to, as last listed.
            is_done: returns whether the mutation has taken effect, given the current checkpoint or
                None if it is gone.
        """

        def recheck(failure: errors.ApiError, may_have_succeeded: bool) -> bool:
            try:
                current = self._fetch(sent)
            except errors.ApiError as error:
                raise failure from error  # the current state is unknown
            if current is not None and not current.may_be(sent):
                raise errors.Conflict(
                    "the checkpoint was saved again under its name during this change; "
                    f"the new one was left alone (first attempt: {failure})"
                )
            if is_done(current) and (may_have_succeeded or current is not None):
                return True
            if current is None:
                raise errors.NotFound("the checkpoint no longer exists")
            if may_have_succeeded and not current.has_time:
                raise failure  # a successor would have an identical record
            return False

        return recheck

    def _expire(self, run_id: str) -> None:
        """Expire a run's listings after a failed mutation that may have taken effect."""
        self._catalog.expire_run(run_id)

    def _update_cached_listings(
        self,
        checkpoint: ListedCheckpoint,
        record: models.Checkpoint | None,
        *,
        is_authoritative: bool = True,
    ) -> None:
        """Apply a mutation that the server has executed to every cached listing.

        Args:
            checkpoint: the checkpoint before the mutation.
            record: its record after the mutation; None if it was deleted.
            is_authoritative: whether the server would return the same record. If not, the next
                access revalidates the listings.
        """

        def update(listing: L) -> L:
            return listing.with_record(checkpoint, record)

        of_run = self._catalog.checkpoints_with_trash(checkpoint.run_id)
        of_run.update(update, is_authoritative=is_authoritative)
        self._catalog.account_with_trash.update(update, is_authoritative=is_authoritative)
        self._catalog.update_last_checkpoints(checkpoint.run_id)
