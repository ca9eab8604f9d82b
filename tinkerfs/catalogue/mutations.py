"""Changes of checkpoints: publish, expire, delete, each beside the cached listings that it touches.

Each change runs on a thread of its own, so that it is not cancelled when its caller leaves;
`changes` reports how it ended.
"""

from collections.abc import Callable
from typing import TypeVar

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.api.client import Client
from tinkerfs.api.transport import Recheck
from tinkerfs.cache.flight import in_thread
from tinkerfs.cache.metadata import MetadataCache
from tinkerfs.call import Call
from tinkerfs.catalogue.amending import run_amended, runs_amended
from tinkerfs.catalogue.listings import Checkpoint, CheckpointListing, UserListing
from tinkerfs.catalogue.runs import Catalogue
from tinkerfs.catalogue.warm import Warm
from tinkerfs.clock import Clock
from tinkerfs.telemetry import Telemetry, rfc3339

__all__ = ["Mutations"]

L = TypeVar("L", CheckpointListing, UserListing)

#: Failures of a change after which the server may have another state than was listed before.
_IN_DOUBT: tuple[type[errors.ApiError], ...] = (
    *errors.OUTAGES,
    errors.NotFound,
    errors.Conflict,
    errors.NotReady,
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
    """

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        warm: Warm,
        telemetry: Telemetry,
        clock: Clock,
        catalogue: Catalogue,
    ) -> None:
        self._client = client
        self._cache = cache
        self._warm = warm
        self._telemetry = telemetry
        self._clock = clock
        self._catalogue = catalogue

    def set_published(self, seen: Checkpoint, wanted: bool, path: str, call: Call) -> None:
        """Publish or unpublish; nothing is asked for that is so already."""

        def is_made(now: Checkpoint | None) -> bool:
            return now is not None and now.record.is_public == wanted

        def act(checkpoint: Checkpoint) -> str | None:
            if checkpoint.record.is_public == wanted:
                return "was so already"
            request = self._client.publish if wanted else self._client.unpublish
            request(checkpoint.ref, self._recheck(checkpoint, is_made))
            raw = models.with_fields(checkpoint.record.raw, public=wanted)
            record = replace(checkpoint.record, is_public=wanted).with_raw(raw)
            self._amend(checkpoint, record)
            return None

        self._change(seen, "publish" if wanted else "unpublish", act, path, call)

    def set_ttl(self, seen: Checkpoint, ttl_s: int | None, path: str, call: Call) -> None:
        """Let a checkpoint expire `ttl_s` seconds from now, or never."""

        def act(checkpoint: Checkpoint) -> None:
            # Which expiry the server made of the seconds is not known: it is set once more.
            recheck = self._recheck(checkpoint, lambda _now: False)
            self._client.set_ttl(checkpoint.ref, ttl_s, recheck)
            expires_at_s = None if ttl_s is None else self._clock.now() + ttl_s
            raw = models.with_fields(
                checkpoint.record.raw,
                expires_at=None if expires_at_s is None else rfc3339(expires_at_s),
            )
            expires_at_ns = None if expires_at_s is None else int(expires_at_s * 1e9)
            record = replace(checkpoint.record, expires_at_ns=expires_at_ns).with_raw(raw)
            # The server rounds as it likes: ours serves only until the next look asks it.
            self._amend(checkpoint, record, is_exact=False)

        what = "never expire" if ttl_s is None else f"expire in {ttl_s} s"
        self._change(seen, what, act, path, call)

    def delete(self, seen: Checkpoint, path: str, call: Call) -> None:
        """Delete a checkpoint for good."""

        def act(checkpoint: Checkpoint) -> None:
            recheck = self._recheck(checkpoint, lambda now: now is None)
            self._client.delete(checkpoint.ref, recheck)
            self._amend(checkpoint, None)

        self._change(seen, "delete", act, path, call)

    def _change(
        self,
        seen: Checkpoint,
        what: str,
        act: Callable[[Checkpoint], str | None],
        path: str,
        call: Call,
    ) -> None:
        """Ask the server afresh what is there, then act on it, under the eyes of `changes`."""
        change = self._telemetry.change_asked(path, what, call.caller())

        def work() -> None:
            try:
                checkpoint = self._afresh(seen)
                try:
                    outcome = act(checkpoint)
                except _IN_DOUBT:
                    self._expire(seen.run_id)
                    raise
            except Exception as error:
                self._telemetry.change_ended(change, f"failed: {error}")
                raise
            self._telemetry.change_ended(change, outcome or "done")

        try:
            call.wait(in_thread(work, f"{what} {path}"))
        except OSError as error:
            change.caller_left = errors.name_of(error)
            raise

    def _afresh(self, seen: Checkpoint) -> Checkpoint:
        """Return a checkpoint as the server tells of it now."""
        now = self._listed(seen)
        if now is None:
            raise errors.NotFound("the checkpoint is gone by now")
        if now.version != seen.version:
            raise errors.Conflict("the checkpoint was saved again since it was looked at")
        return now

    def _listed(self, seen: Checkpoint) -> Checkpoint | None:
        return self._catalogue.checkpoints_afresh(seen.run_id).get(seen.kind, seen.name)

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
            if now is not None and now.version != sent.version:
                raise errors.Conflict(
                    "the checkpoint was saved again under its name while this change was under "
                    f"way; the new one was left alone (the first try: {failure})"
                )
            if is_made(now) and (may_be_done or now is not None):
                return True
            if now is None:
                raise errors.NotFound("the checkpoint is gone by now")
            if may_be_done and now.record.time_ns is None:
                raise failure  # one that was saved since would look the same
            return False

        return recheck

    def _expire(self, run_id: str) -> None:
        """Have listings asked for again: a change that failed may have been made all the same."""
        self._warm.changed(run_id)
        for key in (("checkpoints", run_id), ("user",)):
            self._cache.expire(key)

    def _amend(
        self, checkpoint: Checkpoint, record: models.Checkpoint | None, *, is_exact: bool = True
    ) -> None:
        """Make every listing agree with a change that the server has made.

        Args:
            checkpoint: what was changed.
            record: as it is now; None where it was deleted.
            is_exact: the server would tell the same; else it is asked at the next look.
        """

        def change(listing: L) -> L:
            return listing.changed(checkpoint, record)

        run_id = checkpoint.run_id
        self._warm.changed(run_id)
        for key in (("checkpoints", run_id), ("user",)):
            self._cache.amend(key, change, is_exact=is_exact)
        listing = self._catalogue.known_checkpoints(run_id)
        if listing is None:
            return

        self._cache.amend(("run", run_id), lambda run: run_amended(run, listing), is_exact=True)
        self._cache.amend(
            ("runs",), lambda runs: runs_amended(runs, run_id, listing), is_exact=True
        )
