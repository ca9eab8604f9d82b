"""Set the expiry of exports again while their files are read.

An export expires after the duration that the user has given. A reader may need it for longer: a
serving engine maps a file and reads parts of it hours later. So the duration begins again when half
of it has passed and a file of the export is open, or bytes are requested. What the user has set on
the server stays.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import msgspec

from tinkerfs import errors
from tinkerfs.api.client import Client
from tinkerfs.clock import Clock
from tinkerfs.concurrency import SingleFlight
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.export_records import (
    ExportRecord,
    ExportRecords,
    ExportState,
    find_saved,
)

#: Time between two checks of the exports with open files, seconds. A check sends no request unless
#: an expiry is due. It is short compared with half of the shortest duration, 1800 s.
CHECK_S: Final = 60.0


class ExportRenewal:
    """Sets the expiry of exports again while they are used. Thread-safe.

    Each use of an export is a function that returns whether it continues. One thread checks all
    uses, and ends when there are none.

    Args:
        telemetry: counts renewals, and records a failure once for each export.
        is_enabled: False for a mount that must not change anything.

    Attributes:
        is_enabled: see above.
    """

    def __init__(
        self,
        client: Client,
        records: ExportRecords,
        telemetry: Telemetry,
        clock: Clock,
        *,
        is_enabled: bool = True,
    ) -> None:
        self._client = client
        self._records = records
        self._telemetry = telemetry
        self._clock = clock
        self.is_enabled = is_enabled
        self._flights: SingleFlight[str, Future[None]] = SingleFlight()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        # All guarded by _lock.
        self._uses: dict[str, tuple[CheckpointVersion, list[Callable[[], bool]]]] = {}
        self._is_checking = False
        #: When to try again after a failure, seconds since 1970.
        self._retry_at: dict[str, float] = {}

    def close(self) -> None:
        """Stop setting expiries."""
        self._closed.set()

    def add_use(self, checkpoint: CheckpointVersion, is_in_use: Callable[[], bool]) -> None:
        """Renew the export of a checkpoint from now on, as long as `is_in_use` returns True."""
        if not self.is_enabled:
            return
        with self._lock:
            uses = self._uses.setdefault(checkpoint.cache_key, (checkpoint, []))[1]
            uses.append(is_in_use)
            if self._is_checking:
                return
            self._is_checking = True
        threading.Thread(target=self._check_until_unused, name="renew exports", daemon=True).start()

    def on_read(self, checkpoint: CheckpointVersion) -> None:
        """Renew the export of a checkpoint in the background if that is due."""
        key = checkpoint.cache_key
        if self.is_enabled and self._due_record(key) is not None:
            self._flights.run(key, lambda: self._renew(checkpoint), "renew export", Future())

    def renew_due(self) -> None:
        """Renew the exports that are used and due."""
        for checkpoint in self._used():
            self._renew(checkpoint)

    def _check_until_unused(self) -> None:
        while not self._closed.wait(CHECK_S):
            self.renew_due()
            with self._lock:
                if not self._uses:
                    self._is_checking = False
                    return

    def _used(self) -> list[CheckpointVersion]:
        """Return the checkpoints with uses that continue; forget the others."""
        with self._lock:
            uses = list(self._uses.items())
        used = []
        for key, (checkpoint, functions) in uses:
            ended = [is_in_use for is_in_use in list(functions) if not is_in_use()]
            with self._lock:
                for each in ended:
                    functions.remove(each)
                if not functions:
                    del self._uses[key]
                else:
                    used.append(checkpoint)
        return used

    def _due_record(self, key: str) -> ExportRecord | None:
        """Return the record of an export if its expiry is to be set again now."""
        record = self._records.get(key)
        if record is None or record.state is not ExportState.DONE or not record.ttl_s:
            return None
        now_s = self._clock.now()
        with self._lock:
            is_early = now_s < self._retry_at.get(key, now_s)
        is_due = not is_early and 0 < record.left_s(now_s) <= record.ttl_s / 2
        return record if is_due else None

    def _renew(self, checkpoint: CheckpointVersion) -> None:
        key = checkpoint.cache_key
        if self._due_record(key) is None:
            return
        lock = self._records.lock(key)
        if lock is None:  # another process renews or deletes it
            return
        with lock:
            record = self._due_record(key)
            if record is None:
                return
            try:
                renewed = self._set_again(record)
            except errors.ApiError as error:
                self._on_failure(checkpoint, record, error)
                return
            if renewed is None:
                self._records.delete(key)
            else:
                self._records.put(key, renewed)
            with self._lock:
                self._retry_at.pop(key, None)

    def _set_again(self, record: ExportRecord) -> ExportRecord | None:
        """Set the expiry again unless another client has set it; None without an export.

        A difference of less than a quarter of the duration counts as none, because the clocks of
        the server and of this host may differ. It is too small for the new expiry to be earlier.

        Raises:
            ApiError: a request failed.
        """
        found = find_saved(self._client, record)
        if found is None:
            return None
        now_s = self._clock.now()
        if not abs(found.left_s(now_s) - record.left_s(now_s)) < record.ttl_s / 4:
            return msgspec.structs.replace(found, ttl_s=0)
        self._client.set_ttl(record.ref, record.ttl_s)
        self._telemetry.count("exports_renewed")
        return msgspec.structs.replace(found, expires_at_s=now_s + record.ttl_s)

    def _on_failure(
        self, checkpoint: CheckpointVersion, record: ExportRecord, error: errors.ApiError
    ) -> None:
        """Record the first failure, and try again when half of the time left has passed."""
        key, now_s = checkpoint.cache_key, self._clock.now()
        with self._lock:
            is_first = key not in self._retry_at
            self._retry_at[key] = now_s + record.left_s(now_s) / 2
        if is_first:
            os_error = errors.os_error_from_api(error, checkpoint.path)
            self._telemetry.record_error(checkpoint.path, "renew the export", os_error)
