"""Exports of training checkpoints, by checkpoint and version.

A newer service has no archives. It lets a training checkpoint be exported as external weights,
which takes minutes and uses the account's capacity. So nothing but an explicit request starts an
export, and each version of a checkpoint has one at a time, on all mounts of this host.

A record in the store says which export belongs to which version. It is written before the export
begins and when it ends. A killed process leaves a record of an export that began. The next request
for the weights looks for what it may have saved. Thread-safe.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from typing import Final, Self, TypeVar

import msgspec

from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.exports import Export, ExportProgress, ExportRequest, ExportStopped
from tinkerfs.cache.store import MetadataStore
from tinkerfs.clock import Clock
from tinkerfs.concurrency import SingleFlight, run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.processes import ProcessId
from tinkerfs.telemetry import MutationRecord, Telemetry, rfc3339
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.validity import Expiry
from tinkerfs.weights.checkpoint_version import CheckpointVersion

T = TypeVar("T")

#: An export is not used within this time of its expiry, seconds: a URL may take some to be used.
EXPIRY_MARGIN_S: Final = 60.0
#: Between looks at an export of another process, seconds.
_LOOK_S: Final = 1.0
#: Time for a stopped export to finish its session, seconds.
_STOPPING_S: Final = 3.0

#: How long a description may lack a change by another process, seconds: a check costs as much as
#: the rest of a directory entry.
_DESCRIPTION_AGE_S: Final = 0.5

_NAMESPACE: Final = "exports 1"
_NAME: Final = "tinkerfs"
_NS: Final = 1_000_000_000


class ExportState(Enum):
    """Progress of an export."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The export of one version of a checkpoint.

    Attributes:
        process: the process that exports.
        began_at_s: seconds since 1970.
        run_id: the run that the export creates; empty before its session exists.
        path: tinker path of the external weights, once they are saved.
        expires_at_s: when the server deletes them, seconds since 1970.
        size_bytes: total size of the files, None if the server does not tell.
        failure: the server's message.
    """

    state: ExportState
    process: str
    began_at_s: float
    run_id: str = ""
    path: str = ""
    expires_at_s: float = 0.0
    size_bytes: int | None = None
    failure: str = ""

    @property
    def ref(self) -> CheckpointRef:
        """The external weights, for requests."""
        path = TinkerPath.parse(self.path)
        checkpoint_id = f"{path.kind}/{path.name}"
        return CheckpointRef(path.run_id, checkpoint_id, checkpoint_id)


class Exports:
    """Starts, finds and deletes exports. Use it as a context manager, which stops running ones.

    Args:
        store: keeps the records across mounts.
        telemetry: records each export and its outcome, and shows the running ones.
        timeout_s: time for one export, seconds.
    """

    def __init__(
        self,
        client: Client,
        store: MetadataStore,
        telemetry: Telemetry,
        clock: Clock,
        *,
        timeout_s: float,
    ) -> None:
        self._client = client
        self._store = store
        self._telemetry = telemetry
        self._clock = clock
        self._timeout_s = timeout_s
        #: Called with a checkpoint before its new export is used.
        self.on_exported: Callable[[CheckpointVersion], None] = lambda _checkpoint: None
        self._flights: SingleFlight[str, Future[ExportRecord]] = SingleFlight()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._running: dict[str, tuple[Export, ExportProgress]] = {}
        self._records: dict[str, ExportRecord] = {}
        self._data_version: int | None = None
        self._checked_at = -math.inf
        #: Of all descriptions; replaced when a record changes.
        self._expiry = Expiry(math.inf)

    def __enter__(self) -> Self:
        """Return the exports themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop running exports and let them finish their sessions."""
        with self._lock:
            running = list(self._running.values())
        for export, _progress in running:
            export.stop()
        deadline = time.monotonic() + _STOPPING_S
        for future in self._flights.in_flight():
            with suppress(Exception):
                future.exception(timeout=max(deadline - time.monotonic(), 0.0))

    def find(self, checkpoint: CheckpointVersion) -> ExportRecord | None:
        """Return the export of a checkpoint that can be read; send no request."""
        record = self._record(checkpoint.cache_key)
        is_usable = (
            record is not None
            and record.state is ExportState.DONE
            and record.expires_at_s - EXPIRY_MARGIN_S > self._clock.now()
        )
        return record if is_usable else None

    def recover(self, checkpoint: CheckpointVersion) -> ExportRecord | None:
        """Return the export of a checkpoint that can be read, also that of a killed process.

        Raises:
            ApiError: the request for what a killed process has saved failed.
        """
        record = self._record(checkpoint.cache_key)
        if record is None or not self._is_abandoned(checkpoint.cache_key, record):
            return self.find(checkpoint)
        path = f"tinker://{record.run_id}/external_weights/{_NAME}"
        found = self._saved(record, path, expires_at_s=0.0) if record.run_id else None
        if found is None:
            self._forget(checkpoint.cache_key)
        else:
            self._keep(checkpoint.cache_key, found)
        return found

    def is_idle(self, ctx: RequestContext) -> bool:
        """Return whether there are no exports at all, as is usual; send no request.

        The validity of the result is added to `ctx`.
        """
        ctx.depends_on(self._expiry)
        self._reload_records(_DESCRIPTION_AGE_S)
        return not self._records

    def describe(
        self, checkpoint: CheckpointVersion, ctx: RequestContext = BACKGROUND_CONTEXT
    ) -> str:
        """Return one line about the export of a checkpoint; send no request.

        The validity of the line is added to `ctx`.
        """
        key = checkpoint.cache_key
        ctx.depends_on(self._expiry)
        record = self._record(key, _DESCRIPTION_AGE_S)
        if record is None:
            return "none"
        if record.state is ExportState.FAILED:
            return f"failed: {record.failure}"
        if record.state is ExportState.BEGUN:
            ctx.mark_uncacheable()
            if self._is_abandoned(key, record):
                return "failed: the process that exported was killed"
            with self._lock:
                running = self._running.get(key)
            state = str(running[1]) if running else f"by process {record.process.partition(':')[0]}"
            return f"exporting: {state}, {max(self._clock.now() - record.began_at_s, 0.0):.0f} s"
        left_s = record.expires_at_s - EXPIRY_MARGIN_S - self._clock.now()
        if left_s <= 0:
            return "none"
        ctx.depends_on(Expiry(self._clock.monotonic() + left_s))
        size = "" if record.size_bytes is None else f", {record.size_bytes} bytes"
        return f"{record.path}, until {rfc3339(record.expires_at_s)}{size}"

    def export(
        self,
        checkpoint: CheckpointVersion,
        ttl_s: int,
        path: str,
        ctx: RequestContext,
        recipients: Sequence[str] = (),
        *,
        check_current: Callable[[], object] = lambda: None,
    ) -> ExportRecord:
        """Export a checkpoint, and wait until that is done; join an export in flight.

        An export that can be read already is not repeated; its expiry is set again. An interrupted
        caller leaves the export running.

        Args:
            ttl_s: time until the server deletes the export, seconds, 3600 to 315360000.
            path: the file that was written, for messages.
            recipients: age recipients for which the files are encrypted; empty for plain files.
            check_current: raises ApiError if the server has another version of the checkpoint. It
                is called before the export and after it, because the server exports by name.

        Raises:
            ApiError: the server refused or failed; RequestTimeout after `timeout_s`.
            OSError: EINTR if the caller was interrupted or the export was stopped.
        """
        mutation = self._telemetry.begin_mutation(path, f"export for {ttl_s} s", ctx.caller())
        future = self._flights.run(
            checkpoint.cache_key,
            lambda: self._export(checkpoint, ttl_s, recipients, check_current),
            f"export {path}",
            Future[ExportRecord](),
        )
        return self._wait(future, mutation, ctx)

    def delete(self, checkpoint: CheckpointVersion, path: str, ctx: RequestContext) -> None:
        """Delete the export of a checkpoint, or stop one in flight; succeed if there is none.

        Raises:
            ApiError: the request failed; Conflict if another process exports the checkpoint.
            OSError: EINTR if the caller was interrupted.
        """
        key = checkpoint.cache_key
        mutation = self._telemetry.begin_mutation(path, "delete the export", ctx.caller())

        def delete() -> None:
            with self._lock:
                running = self._running.get(key)
            flight = self._flights.get(key)
            if running is not None:
                running[0].stop()
            if flight is not None:
                with suppress(Exception):
                    flight.exception(timeout=self._timeout_s)
            record = self._record(key)
            if record is not None and self._is_elsewhere(key, record):
                raise errors.Conflict(f"process {record.process} exports the checkpoint")
            record = self.recover(checkpoint)
            if record is not None:
                with suppress(errors.NotFound):
                    self._client.delete(record.ref)
            self._forget(key)

        self._wait(run_in_thread(delete, f"delete the export of {path}"), mutation, ctx)

    def forget(self, checkpoint: CheckpointVersion) -> None:
        """Forget an export that the server no longer has."""
        self._forget(checkpoint.cache_key)

    def renew(self, checkpoint: CheckpointVersion, ttl_s: int) -> None:
        """Set the expiry of an export again, because a reader needs it.

        Raises:
            ApiError: the request failed.
        """
        record = self.find(checkpoint)
        if record is not None:
            self._renew(checkpoint.cache_key, record, ttl_s)

    def _export(
        self,
        checkpoint: CheckpointVersion,
        ttl_s: int,
        recipients: Sequence[str],
        check_current: Callable[[], object],
    ) -> ExportRecord:
        key = checkpoint.cache_key
        self._wait_for_other_process(key)
        check_current()
        record = self.recover(checkpoint)
        if record is not None:
            return self._renew(key, record, ttl_s)
        record = ExportRecord(
            state=ExportState.BEGUN,
            process=str(ProcessId.current()),
            began_at_s=self._clock.now(),
        )
        self._keep(key, record)
        export = Export(
            self._client,
            ExportRequest(
                source=checkpoint.about, name=_NAME, ttl_s=ttl_s, recipients=tuple(recipients)
            ),
            self._clock,
            timeout_s=self._timeout_s,
            on_session=lambda session_id: self._on_session(key, record, session_id),
            on_progress=lambda progress: self._on_progress(key, export, progress),
        )
        self._on_progress(key, export, ExportProgress("starting"))
        self._telemetry.count("exports_started")
        try:
            with self._telemetry.track_pending(
                lambda: f"export of {checkpoint.about}: {self._progress(key)}"
            ):
                path = export.run()
            expires_at_s = self._clock.now() + ttl_s
            done = self._saved(record, path, expires_at_s=expires_at_s) or msgspec.structs.replace(
                record, state=ExportState.DONE, path=path, expires_at_s=expires_at_s
            )
            self._check_exported(done, check_current)
        except ExportStopped:
            self._forget(key)
            raise errors.interrupted() from None
        except errors.ApiError as error:
            self._telemetry.count("exports_failed")
            failure = errors.redact(error.message)
            self._keep(
                key, msgspec.structs.replace(record, state=ExportState.FAILED, failure=failure)
            )
            raise
        except Exception:
            self._forget(key)
            raise
        finally:
            with self._lock:
                self._running.pop(key, None)
        self.on_exported(checkpoint)
        self._keep(key, done)
        return done

    def _check_exported(self, done: ExportRecord, check_current: Callable[[], object]) -> None:
        """Delete the export again if the checkpoint was saved again meanwhile.

        Raises:
            ApiError: as `check_current`.
        """
        try:
            check_current()
        except errors.ApiError:
            with suppress(errors.ApiError):  # it expires anyway
                self._client.delete(done.ref)
            raise

    def _on_session(self, key: str, record: ExportRecord, session_id: str) -> None:
        self._keep(key, msgspec.structs.replace(record, run_id=f"{session_id}:train:0"))

    def _on_progress(self, key: str, export: Export, progress: ExportProgress) -> None:
        with self._lock:
            self._running[key] = (export, progress)

    def _progress(self, key: str) -> str:
        with self._lock:
            running = self._running.get(key)
        return str(running[1]) if running else ""

    def _wait_for_other_process(self, key: str) -> None:
        """Wait until no other process of this host exports the checkpoint.

        Raises:
            ApiError: RequestTimeout after `timeout_s`.
        """
        deadline = self._clock.monotonic() + self._timeout_s
        while (record := self._record(key)) is not None and self._is_elsewhere(key, record):
            if self._clock.monotonic() > deadline:
                raise errors.RequestTimeout(
                    f"process {record.process} did not export it within {self._timeout_s:g} s"
                )
            time.sleep(_LOOK_S)

    def _is_elsewhere(self, key: str, record: ExportRecord) -> bool:
        """Return whether another process exports the checkpoint."""
        if record.state is not ExportState.BEGUN or self._is_abandoned(key, record):
            return False
        with self._lock:
            return key not in self._running

    def _is_abandoned(self, key: str, record: ExportRecord) -> bool:
        """Return whether the process of an unfinished export has ended."""
        if record.state is not ExportState.BEGUN:
            return False
        with self._lock:
            if key in self._running:
                return False
        return not ProcessId.parse(record.process).is_running()

    def _saved(
        self, record: ExportRecord, path: str, *, expires_at_s: float
    ) -> ExportRecord | None:
        """Return the record of the weights saved at `path`, None if the server has none."""
        run_id = TinkerPath.parse(path).run_id
        try:
            listed = self._client.list_checkpoints(run_id)
        except errors.NotFound:
            return None
        for each in listed:
            if each.tinker_path == path:
                listed_s = None if each.expires_at_ns is None else each.expires_at_ns / _NS
                return msgspec.structs.replace(
                    record,
                    state=ExportState.DONE,
                    path=path,
                    expires_at_s=listed_s or expires_at_s,
                    size_bytes=each.size_bytes,
                )
        return None

    def _renew(self, key: str, record: ExportRecord, ttl_s: int) -> ExportRecord:
        self._client.set_ttl(record.ref, ttl_s)
        renewed = msgspec.structs.replace(record, expires_at_s=self._clock.now() + ttl_s)
        self._keep(key, renewed)
        return renewed

    def _wait(self, future: "Future[T]", mutation: MutationRecord, ctx: RequestContext) -> T:
        """Return the result of a future, and record its outcome for the file `changes`."""

        def record_outcome(done: "Future[T]") -> None:
            error = done.exception()
            outcome = "done" if error is None else f"failed: {error}"
            self._telemetry.end_mutation(mutation, outcome)

        future.add_done_callback(record_outcome)
        try:
            return ctx.wait_for(future)
        except OSError as error:
            if not future.done():
                mutation.abandoned_with = errors.errno_name(error)
            raise

    # Records

    def _record(self, key: str, max_age_s: float = 0.0) -> ExportRecord | None:
        """Return the record of a checkpoint, at most `max_age_s` after a change of it."""
        self._reload_records(max_age_s)
        return self._records.get(key)

    def _reload_records(self, max_age_s: float) -> None:
        """Read the store if another process has changed it."""
        now = self._clock.monotonic()
        if now < self._checked_at + max_age_s:
            return
        version = self._store.data_version()
        with self._lock:
            self._checked_at = now
            if version is not None and version != self._data_version:
                self._data_version = version
                records = _decode(self._store.durable(_NAMESPACE))
                if records != self._records:
                    self._records = records
                    self._expire_descriptions()

    def _keep(self, key: str, record: ExportRecord) -> None:
        with self._lock:
            self._records[key] = record
            self._expire_descriptions()
        with suppress(OSError):  # without a cache directory it is known to this mount alone
            self._store.put_durable(_NAMESPACE, key, msgspec.json.encode(record))

    def _forget(self, key: str) -> None:
        with self._lock:
            self._records.pop(key, None)
            self._expire_descriptions()
        with suppress(OSError):
            self._store.delete_durable(_NAMESPACE, key)

    def _expire_descriptions(self) -> None:
        """Invalidate all that `describe` has returned; the caller holds the lock."""
        self._expiry.fresh_until = -math.inf
        self._expiry = Expiry(math.inf)


def _decode(values: dict[str, bytes]) -> dict[str, ExportRecord]:
    """Return the records that can be read; a damaged one is worth no more than none."""
    records: dict[str, ExportRecord] = {}
    for key, value in values.items():
        with suppress(msgspec.MsgspecError):
            records[key] = msgspec.json.decode(value, type=ExportRecord)
    return records
