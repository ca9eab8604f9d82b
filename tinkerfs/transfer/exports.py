"""Export checkpoints for the time of a transfer."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Self

from tinkerfs import errors
from tinkerfs.catalog.listings import ListedCheckpoint
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.vfs.weights_nodes import WeightsRef
from tinkerfs.weights.exports import Exports

#: Time until the server deletes an export, seconds: the shortest that it accepts.
TTL_S: Final = 3600


class TemporaryExports:
    """Exports of checkpoints that a transfer reads. Use it as a context manager; thread-safe.

    The expiries are set again while the transfer goes on. After it the exports are deleted, those
    of a failed one only by their expiry, so that the same command can resume.

    Args:
        check_current: raises ApiError if the server has another version of a checkpoint.
        announce: tells the user what is about to start.
        recipients: age recipients for which the files are encrypted; empty for plain files.
        keeps: whether to keep the exports after the transfer.
    """

    def __init__(
        self,
        exports: Exports,
        check_current: Callable[[ListedCheckpoint], None],
        announce: Callable[[str], None],
        *,
        recipients: Sequence[str] = (),
        keeps: bool = False,
    ) -> None:
        self._exports = exports
        self._check_current = check_current
        self._announce = announce
        self._recipients = recipients
        self._keeps = keeps
        self._lock = threading.Lock()
        self._refs: list[WeightsRef] = []  # guarded by _lock
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Return the exports themselves."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop setting the expiries."""
        self._ended.set()

    def export(self, ref: WeightsRef) -> None:
        """Export a checkpoint, and wait until that is done.

        Raises:
            ApiError: the server refused or failed; Conflict if the checkpoint was saved again.
        """
        path = ref.checkpoint.tinker_path
        self._announce(
            f"exporting {path}: the server has no archive of it; this starts a training session on"
            " its base model, takes minutes, needs capacity and may cost"
        )
        record = self._exports.export(
            ref.version,
            TTL_S,
            path,
            BACKGROUND_CONTEXT,
            self._recipients,
            check_current=partial(self._check_current, ref.checkpoint),
            keeps_expiry=True,
        )
        self._exports.renewal.add_use(ref.version, lambda: not self._ended.is_set())
        if self._exports.is_own(record):  # else another process wants it too
            with self._lock:
                self._refs.append(ref)

    def delete_all(self) -> None:
        """Delete the exports after a complete transfer, unless they are to be kept."""
        with self._lock:
            refs, self._refs = self._refs, []
        for ref in () if self._keeps else refs:
            path = ref.checkpoint.tinker_path
            try:
                self._exports.delete(ref.version, path, BACKGROUND_CONTEXT)
            except (errors.ApiError, OSError) as error:
                self._announce(f"the export of {path} was not deleted and expires: {error}")
