"""Catalogue: a read-through model of the account, and every change beside what it invalidates.

The tree asks it for training runs and checkpoints and never sees the cache or the client. Values
are immutable; every method is thread-safe and waits only through the `Call` it is given. Failures
are `ApiError`s, or the `OSError`s of a wait that ended early.
"""

import threading
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from tinkerfs import errors
from tinkerfs.api import models
from tinkerfs.api.client import Client
from tinkerfs.cache.flight import in_thread, side_by_side
from tinkerfs.cache.metadata import MetadataCache, Policy
from tinkerfs.cache.store import Store
from tinkerfs.call import IN_PROCESS, Call
from tinkerfs.catalogue.listings import Checkpoint, CheckpointListing, RunListing, kind_and_name
from tinkerfs.clock import Clock
from tinkerfs.telemetry import Telemetry, rfc3339

__all__ = ["Catalogue"]

#: Absence is remembered this long at most, seconds; never longer than the TTL.
NEGATIVE_TTL_S = 5.0
#: A server that refuses the weights info of a checkpoint is not asked again for this long, seconds.
REFUSED_INFO_TTL_S = 600.0
#: A second checkpoint of a run asked for within this time makes a walk of it, seconds.
WALK_WINDOW_S = 10.0
#: Weights infos asked for at once.
CONCURRENCY = 8

_REFUSALS = (errors.NotFound, errors.EndpointMissing, errors.BadRequest, errors.Rejected)


class Catalogue:
    """The account behind one key at one server."""

    def __init__(
        self,
        client: Client,
        cache: MetadataCache,
        store: Store,
        telemetry: Telemetry,
        clock: Clock,
        *,
        ttl_s: float,
        stale_s: float,
    ) -> None:
        self._client = client
        self._cache = cache
        self._store = store
        self._telemetry = telemetry
        self._clock = clock
        self._listing = Policy(ttl_s, stale_s, min(NEGATIVE_TTL_S, ttl_s))
        self._immutable = Policy(float("inf"), float("inf"), REFUSED_INFO_TTL_S, _REFUSALS)
        self._lock = threading.Lock()
        self._last_asked: dict[str, tuple[tuple[str, str, str], float]] = {}  # guarded by _lock
        self._walked: set[str] = set()  # guarded by _lock
        self._lists_runs: bool | None = None  # learnt once; who comes second learns the same

    # What is there.

    def runs(self, call: Call) -> RunListing:
        """Return the user's training runs; ceil(runs / page) calls when not fresh."""
        return self._cache.get(("runs",), self._load_runs, self._listing, call)

    def known_runs(self) -> RunListing | None:
        """Return the training runs as last listed, without a call."""
        return self._cache.peek(("runs",))  # type: ignore[no-any-return]

    def run(self, run_id: str, call: Call) -> models.TrainingRun:
        """Return one training run: of the listing where there is one, else asked for by itself.

        Raises:
            ApiError: NotFound or BadRequest where there is no such run.
        """
        if self.known_runs() is not None:
            run = self.runs(call).by_id.get(run_id)
            if run is not None:
                return run
        return self._cache.get(
            ("run", run_id), partial(self._load_run, run_id), self._by_name, call
        )

    def checkpoints(self, run_id: str, call: Call) -> CheckpointListing:
        """Return the checkpoints of a run; one call when not fresh."""
        return self._cache.get(
            ("checkpoints", run_id), partial(self._load_checkpoints, run_id), self._listing, call
        )

    def known_checkpoints(self, run_id: str) -> CheckpointListing | None:
        """Return a run's checkpoints as last listed, without a call."""
        return self._cache.peek(("checkpoints", run_id))  # type: ignore[no-any-return]

    def known(self) -> dict[str, int]:
        """Return what the listings so far add up to, without a call; empty before the first."""
        runs = self.known_runs()
        if runs is None:
            return {}
        listings = [self.known_checkpoints(run_id) for run_id in runs.by_id]
        checkpoints = [c for known in listings if known for c in known.by_name.values()]
        return {
            "runs": len(runs.by_id),
            "runs_listed": sum(known is not None for known in listings),
            "checkpoints": len(checkpoints),
            "size_bytes": sum(c.record.size_bytes or 0 for c in checkpoints),
        }

    def weights_info(self, checkpoint: Checkpoint, call: Call) -> bytes:
        """Return a checkpoint's weights info as JSON; asked for once ever, kept across mounts.

        The second checkpoint of a run within a short while has the others' asked for behind it.
        """
        load = partial(self._load_weights_info, checkpoint)
        kept = self._cache.peek(_info_key(checkpoint)) or self._kept_info(checkpoint)
        if kept is not None:
            return kept
        self._notice_walk(checkpoint)
        return self._cache.get(_info_key(checkpoint), load, self._immutable, call)

    # Changes. Each runs on a thread of its own, so that it is not taken back when its caller goes;
    # `changes` tells how it ended.

    def set_published(self, seen: Checkpoint, wanted: bool, path: str, call: Call) -> None:
        """Publish or unpublish; nothing is asked for that is so already."""

        def act(checkpoint: Checkpoint) -> str | None:
            if checkpoint.record.is_public == wanted:
                return "was so already"
            if wanted:
                self._client.publish(checkpoint.ref)
            else:
                self._client.unpublish(checkpoint.ref)
            raw = models.with_fields(checkpoint.record.raw, public=wanted)
            record = replace(checkpoint.record, is_public=wanted, raw=raw)
            self._amend(checkpoint, lambda listing: listing.with_record(checkpoint, record))
            return None

        self._change(seen, "publish" if wanted else "unpublish", act, path, call)

    def set_ttl(self, seen: Checkpoint, ttl_s: int | None, path: str, call: Call) -> None:
        """Let a checkpoint expire `ttl_s` seconds from now, or never."""

        def act(checkpoint: Checkpoint) -> None:
            self._client.set_ttl(checkpoint.ref, ttl_s)
            expires_at_s = None if ttl_s is None else self._clock.now() + ttl_s
            record = replace(
                checkpoint.record,
                expires_at_ns=None if expires_at_s is None else int(expires_at_s * 1e9),
                raw=models.with_fields(
                    checkpoint.record.raw,
                    expires_at=None if expires_at_s is None else rfc3339(expires_at_s),
                ),
            )
            # The server rounds as it likes: ours serves only until the next look asks it.
            self._amend(
                checkpoint, lambda listing: listing.with_record(checkpoint, record), is_exact=False
            )

        what = "never expire" if ttl_s is None else f"expire in {ttl_s} s"
        self._change(seen, what, act, path, call)

    def delete(self, seen: Checkpoint, path: str, call: Call) -> None:
        """Delete a checkpoint for good."""

        def act(checkpoint: Checkpoint) -> None:
            self._client.delete(checkpoint.ref)
            self._amend(checkpoint, lambda listing: listing.without(checkpoint))

        self._change(seen, "delete", act, path, call)

    def refresh(self) -> None:
        """Drop every entry; what is immutable stays on disk."""
        self._cache.clear()

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
                outcome = act(self._afresh(seen))
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
        load = partial(self._load_checkpoints, seen.run_id)
        key = ("checkpoints", seen.run_id)
        listing = self._cache.reload(key, load, self._listing, IN_PROCESS)
        now = listing.by_name.get((seen.kind, seen.name))
        if now is None:
            raise errors.NotFound("the checkpoint is gone by now")
        if now.version != seen.version:
            raise errors.Conflict("the checkpoint was saved again since it was looked at")
        return now

    def _amend(
        self,
        checkpoint: Checkpoint,
        change: Callable[[CheckpointListing], CheckpointListing],
        *,
        is_exact: bool = True,
    ) -> None:
        """Make every listing agree with a change that the server has made."""
        run_id = checkpoint.run_id
        self._cache.amend(("checkpoints", run_id), change, is_exact=is_exact)
        listing = self.known_checkpoints(run_id)
        if listing is None:
            return

        def in_run(run: models.TrainingRun) -> models.TrainingRun:
            lasts = {
                "last_checkpoint": run.last_checkpoint,
                "last_sampler_checkpoint": run.last_sampler_checkpoint,
            }
            now = {name: _newest(listing, last) for name, last in lasts.items() if last is not None}
            fields = (
                b'"%s":%s' % (name.encode(), b"null" if last is None else last.raw)
                for name, last in now.items()
            )
            raw = models.merged(run.raw, b"{" + b",".join(fields) + b"}")
            return replace(run, raw=raw, **now)

        def in_runs(runs: RunListing) -> RunListing:
            run = runs.by_id.get(run_id)
            return runs if run is None else RunListing({**runs.by_id, run_id: in_run(run)})

        self._cache.amend(("run", run_id), in_run, is_exact=True)
        self._cache.amend(("runs",), in_runs, is_exact=True)

    # Loading.

    @property
    def _by_name(self) -> Policy:
        """A run that is asked for by name: 400 and 422 also say that there is none."""
        return Policy(
            self._listing.ttl_s,
            self._listing.stale_s,
            self._listing.negative_ttl_s,
            (*self._listing.negative, errors.BadRequest),
        )

    def _load_runs(self) -> RunListing:
        return RunListing({run.run_id: run for run in self._client.all_training_runs()})

    def _load_run(self, run_id: str) -> models.TrainingRun:
        try:
            return self._client.training_run(run_id)
        except (errors.NotFound, errors.EndpointMissing):
            if self._has_run_records():
                raise
        # Of such a server a run is what has a listing of checkpoints.
        listing = self.checkpoints(run_id, IN_PROCESS)
        times = (c.record.time_ns for c in listing.by_name.values())
        return models.TrainingRun(
            run_id=run_id,
            last_request_time_ns=max((t for t in times if t is not None), default=None),
            raw=models.with_fields(b"{}", training_run_id=run_id),
        )

    def _has_run_records(self) -> bool:
        """Tell whether the server knows runs by themselves: hatchery has neither list nor record.

        Asked of it at most once, and only where nothing was listed before.
        """
        if self._lists_runs is None:
            if self.known_runs() is not None:
                self._lists_runs = True
            else:
                try:
                    self._client.list_training_runs(limit=1)
                    self._lists_runs = True
                except errors.EndpointMissing:
                    self._lists_runs = False
                except errors.ApiError:
                    return True  # for now: what was said of the run stands
        return self._lists_runs

    def _load_checkpoints(self, run_id: str) -> CheckpointListing:
        return CheckpointListing.of(run_id, self._client.list_checkpoints(run_id))

    def _kept_info(self, checkpoint: Checkpoint) -> bytes | None:
        return self._store.get(self._space, f"{checkpoint.tinker_path}\n{checkpoint.version}")

    def _load_weights_info(self, checkpoint: Checkpoint) -> bytes:
        raw = self._kept_info(checkpoint)
        if raw is None:
            raw = self._client.weights_info(checkpoint.tinker_path).raw
            self._store.put(self._space, f"{checkpoint.tinker_path}\n{checkpoint.version}", raw)
        return raw

    @property
    def _space(self) -> str:
        return f"weights_info {self._client.base_url}"

    def _notice_walk(self, checkpoint: Checkpoint) -> None:
        """Ask for the siblings' weights info too, once somebody goes through them."""
        run_id, now = checkpoint.run_id, self._clock.monotonic()
        with self._lock:
            last = self._last_asked.get(run_id)
            self._last_asked[run_id] = (checkpoint.key, now)
            is_walk = (
                last is not None and last[0] != checkpoint.key and now - last[1] < WALK_WINDOW_S
            )
            if not is_walk or run_id in self._walked:
                return
            self._walked.add(run_id)
        listing = self.known_checkpoints(run_id)
        if listing is None:
            return

        def ask(sibling: Checkpoint) -> None:
            load = partial(self._load_weights_info, sibling)
            self._cache.get(_info_key(sibling), load, self._immutable, IN_PROCESS)

        def walk() -> None:
            works = [partial(ask, sibling) for sibling in listing.by_name.values()]
            side_by_side(works, CONCURRENCY, f"weights info of {run_id}")
            with self._lock:
                self._walked.discard(run_id)
                self._last_asked.pop(run_id, None)

        in_thread(walk, f"walk {run_id}")


def _info_key(checkpoint: Checkpoint) -> tuple[str, str, str]:
    return ("weights_info", checkpoint.tinker_path, checkpoint.version)


def _newest(listing: CheckpointListing, last: models.Checkpoint | None) -> models.Checkpoint | None:
    """Return a run's last checkpoint of the kind that `last` was of, as it is now."""
    if last is None:
        return None
    kind, name = kind_and_name(last)
    if (kind, name) in listing.by_name:
        return listing.by_name[kind, name].record
    of_kind = [c.record for c in listing.by_name.values() if c.kind == kind]
    return max(of_kind, key=lambda record: record.time_ns or 0, default=None)
