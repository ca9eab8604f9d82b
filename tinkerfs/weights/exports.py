"""Exports of training checkpoints, by checkpoint and version.

A newer service has no archives. It lets a training checkpoint be exported as external weights,
which takes minutes and uses the account's capacity. So nothing but an explicit request starts an
export, and each version of a checkpoint has one at a time, on all mounts of this host.

`export_records` has the records. One is written before the export begins and when it ends. A killed
process leaves a record of an export that began. The next request for the weights looks for what it
may have saved. Thread-safe.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final, Self, TypeVar

import msgspec

from tinkerfs import errors
from tinkerfs.api.client import Client
from tinkerfs.api.exports import Export, ExportProgress, ExportRequest, ExportStopped
from tinkerfs.cache.store import MetadataStore
from tinkerfs.clock import Clock
from tinkerfs.concurrency import SingleFlight, run_in_thread
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import MutationRecord, Telemetry, rfc3339
from tinkerfs.validity import Expiry
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.export_records import (
    EXPIRY_MARGIN_S,
    EXPORT_NAME,
    ExportLock,
    ExportRecord,
    ExportRecords,
    ExportState,
    find_saved,
)
from tinkerfs.weights.export_renewal import ExportRenewal

T = TypeVar("T")

#: Time for a stopped export to finish its session, seconds.
_STOPPING_S: Final = 3.0

#: Time for another process to end a change of an export, seconds.
_UNLOCK_S: Final = 5.0

#: How long a description may lack a change by another process, seconds: a check costs as much as
#: the rest of a directory entry.
_DESCRIPTION_AGE_S: Final = 0.5


class Exports:
    """Starts, finds and deletes exports. Use it as a context manager, which stops running ones.

    Args:
        store: keeps the records across mounts.
        telemetry: records each export and its outcome, and shows the running ones.
        timeout_s: time for one export, seconds.
        renews: whether the expiry of an export is set again while its files are read.

    Attributes:
        renewal: sets expiries again.
    """

    def __init__(
        self,
        client: Client,
        store: MetadataStore,
        telemetry: Telemetry,
        clock: Clock,
        *,
        timeout_s: float,
        renews: bool = True,
    ) -> None:
        self._client = client
        self._telemetry = telemetry
        self._clock = clock
        self._timeout_s = timeout_s
        #: Called with a checkpoint before its new export is used.
        self.on_exported: Callable[[CheckpointVersion], None] = lambda _checkpoint: None
        self._records = ExportRecords(store, clock)
        self.renewal = ExportRenewal(client, self._records, telemetry, clock, is_enabled=renews)
        self._flights: SingleFlight[str, Future[ExportRecord]] = SingleFlight()
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Export, ExportProgress]] = {}  # guarded by _lock
        telemetry.add_gauge("exports_running", lambda: len(self._running))
        for state in ExportState:
            telemetry.add_gauge(
                f"export_records_{state.value}", partial(self._records.count, state)
            )
        # A process id alone may be used again, and is not unique among PID namespaces.
        self._process = f"{os.getpid()}:{secrets.token_hex(8)}"

    def __enter__(self) -> Self:
        """Return the exports themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop running exports and let them finish their sessions."""
        self.renewal.close()
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
        record = self._records.get(checkpoint.cache_key)
        return record if record is not None and record.is_usable(self._clock.now()) else None

    def recover(self, checkpoint: CheckpointVersion) -> ExportRecord | None:
        """Return the export of a checkpoint that can be read, and look for it on the server.

        The process that exported may have been killed, and the user may have set the expiry of an
        export on the server.

        Raises:
            ApiError: the request failed.
        """
        key = checkpoint.cache_key
        record = self.find(checkpoint)
        if record is not None or self._records.get(key) is None:
            return record
        lock = self._records.lock(key)
        if lock is None:  # another process exports the checkpoint
            return None
        with lock:
            return self._recover(checkpoint)

    def _recover(self, checkpoint: CheckpointVersion) -> ExportRecord | None:
        """See `recover`; the caller holds the lock of the export."""
        key = checkpoint.cache_key
        record = self._records.get(key)
        if record is None or record.state is ExportState.FAILED:
            return None
        if record.is_usable(self._clock.now()):
            return record
        found = find_saved(self._client, record) if record.run_id else None
        if found is not None and record.state is ExportState.DONE:
            # Another client has set the expiry, so it is not set again.
            found = msgspec.structs.replace(found, ttl_s=0)
        elif found is not None and found.expires_at_s is None:  # the server does not list it
            expires_at_s = record.began_at_s + record.ttl_s
            found = msgspec.structs.replace(found, expires_at_s=expires_at_s)
        if found is None or not found.is_usable(self._clock.now()):
            self._records.delete(key)
            return None
        self._records.put(key, found)
        return found

    def is_idle(self, ctx: RequestContext) -> bool:
        """Return whether there are no exports at all, as is usual; send no request.

        The validity of the result is added to `ctx`.
        """
        ctx.depends_on(self._records.expiry)
        return self._records.is_empty(_DESCRIPTION_AGE_S)

    def describe(
        self, checkpoint: CheckpointVersion, ctx: RequestContext = BACKGROUND_CONTEXT
    ) -> str:
        """Return one line about the export of a checkpoint; send no request.

        The validity of the line is added to `ctx`.
        """
        ctx.depends_on(self._records.expiry)
        record = self._records.get(checkpoint.cache_key, _DESCRIPTION_AGE_S)
        if record is None:
            return "none"
        if record.state is ExportState.FAILED:
            return f"failed: {record.failure}"
        if record.state is ExportState.BEGUN:
            ctx.mark_uncacheable()
            return self._describe_unfinished(checkpoint.cache_key, record)
        left_s = record.left_s(self._clock.now()) - EXPIRY_MARGIN_S
        if left_s <= 0:
            return "none"
        ctx.depends_on(Expiry(self._clock.with_suspend() + left_s))
        until = "without expiry"
        if record.expires_at_s is not None:
            until = f"until {rfc3339(record.expires_at_s)}"
        size = "" if record.size_bytes is None else f", {record.size_bytes} bytes"
        return f"{record.path}, {until}{size}"

    def _describe_unfinished(self, key: str, record: ExportRecord) -> str:
        with self._lock:
            running = self._running.get(key)
        if running is None and not self._records.is_locked(key):
            current = self._records.get(key)  # it may have ended since `record` was read
            if current is not None and current.state is ExportState.BEGUN:
                return "failed: the process that exported was killed"
        state = str(running[1]) if running else f"by process {record.pid}"
        return f"exporting: {state}, {max(self._clock.now() - record.began_at_s, 0.0):.0f} s"

    def export(
        self,
        checkpoint: CheckpointVersion,
        ttl_s: int,
        path: str,
        ctx: RequestContext,
        recipients: Sequence[str] = (),
        *,
        check_current: Callable[[], object] = lambda: None,
        keeps_expiry: bool = False,
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
            keeps_expiry: leave the expiry of an export that can be read already.

        Raises:
            ApiError: the server refused or failed; RequestTimeout after `timeout_s`; Conflict if
                another process did not end its export in that time.
            OSError: EINTR if the caller was interrupted or the export was stopped.
        """
        mutation = self._telemetry.begin_mutation(
            path, f"export for {ttl_s} s", ctx.caller(), checkpoint.about
        )
        future = self._flights.run(
            checkpoint.cache_key,
            lambda: self._export(
                checkpoint, ttl_s, recipients, check_current, keeps_expiry=keeps_expiry
            ),
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
        mutation = self._telemetry.begin_mutation(
            path, "delete the export", ctx.caller(), checkpoint.about
        )

        def delete() -> None:
            with self._lock:
                running = self._running.get(key)
            flight = self._flights.get(key)
            if running is not None:
                running[0].stop()
            if flight is not None:
                with suppress(Exception):
                    flight.exception(timeout=self._timeout_s)
            with self._wait_for_lock(key, _UNLOCK_S):
                record = self._recover(checkpoint)
                if record is not None:
                    with suppress(errors.NotFound):
                        self._client.delete(record.ref)
                self._records.delete(key)

        self._wait(run_in_thread(delete, f"delete the export of {path}"), mutation, ctx)

    def is_own(self, record: ExportRecord) -> bool:
        """Return whether this object, and no other process, began an export."""
        return record.process == self._process

    def forget(self, checkpoint: CheckpointVersion) -> None:
        """Forget an export that the server no longer has."""
        self._records.delete(checkpoint.cache_key)

    def _export(
        self,
        checkpoint: CheckpointVersion,
        ttl_s: int,
        recipients: Sequence[str],
        check_current: Callable[[], object],
        *,
        keeps_expiry: bool,
    ) -> ExportRecord:
        key = checkpoint.cache_key
        with self._wait_for_lock(key, self._timeout_s):
            check_current()
            found = self._recover(checkpoint)
            if found is not None:
                if keeps_expiry:
                    return found
                self._client.set_ttl(found.ref, ttl_s)
                expires_at_s = self._clock.now() + ttl_s
                found = msgspec.structs.replace(found, expires_at_s=expires_at_s, ttl_s=ttl_s)
                self._records.put(key, found)
                return found
            done = self._start(checkpoint, ttl_s, recipients, check_current)
            self.on_exported(checkpoint)
            self._records.put(key, done)
            return done

    def _start(
        self,
        checkpoint: CheckpointVersion,
        ttl_s: int,
        recipients: Sequence[str],
        check_current: Callable[[], object],
    ) -> ExportRecord:
        """Export a checkpoint; the caller holds the lock of the export."""
        key = checkpoint.cache_key
        record = ExportRecord(
            state=ExportState.BEGUN,
            process=self._process,
            began_at_s=self._clock.now(),
            ttl_s=ttl_s,
        )
        self._records.put(key, record)

        def on_session(session_id: str) -> None:
            nonlocal record
            record = msgspec.structs.replace(record, run_id=f"{session_id}:train:0")
            self._records.put(key, record)

        export = Export(
            self._client,
            ExportRequest(
                source=checkpoint.about,
                name=EXPORT_NAME,
                ttl_s=ttl_s,
                recipients=tuple(recipients),
            ),
            self._clock,
            timeout_s=self._timeout_s,
            on_session=on_session,
            on_progress=lambda progress: self._on_progress(key, export, progress),
        )
        self._on_progress(key, export, ExportProgress("starting"))
        self._telemetry.count("exports_started")
        try:
            with self._telemetry.track_pending(
                lambda: f"export of {checkpoint.about}: {self._progress(key)}"
            ):
                path = export.run()
            done = record.saved_as(path, self._clock.now() + ttl_s)
            found = find_saved(self._client, done)
            if found is not None:
                expires_at_s = found.expires_at_s or done.expires_at_s
                done = msgspec.structs.replace(found, expires_at_s=expires_at_s)
            self._check_exported(done, check_current)
        except ExportStopped:
            self._records.delete(key)
            raise errors.interrupted() from None
        except errors.ApiError as error:
            self._telemetry.count("exports_failed")
            failure = errors.redact(error.message)
            failed = msgspec.structs.replace(record, state=ExportState.FAILED, failure=failure)
            self._records.put(key, failed)
            raise
        except Exception:
            self._records.delete(key)
            raise
        finally:
            with self._lock:
                self._running.pop(key, None)
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

    def _on_progress(self, key: str, export: Export, progress: ExportProgress) -> None:
        with self._lock:
            self._running[key] = (export, progress)

    def _progress(self, key: str) -> str:
        with self._lock:
            running = self._running.get(key)
        return str(running[1]) if running else ""

    def _wait_for_lock(self, key: str, timeout_s: float) -> ExportLock:
        """Lock an export as soon as no other process of this host does.

        Raises:
            ApiError: Conflict after `timeout_s`.
        """
        lock = self._records.lock(key, timeout_s)
        if lock is None:
            record = self._records.get(key)
            owner = "another process" if record is None else f"process {record.pid}"
            raise errors.Conflict(f"{owner} uses the export of the checkpoint")
        return lock

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
