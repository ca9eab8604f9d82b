"""A mount as a service of systemd: its state, keep-alives and reloads."""

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tinkerfs.cli.service_notifier import ServiceNotifier
from tinkerfs.fuse import mount_table

if TYPE_CHECKING:
    from tinkerfs.app import App

log = logging.getLogger(__name__)

#: Interval of status messages, seconds.
_STATUS_INTERVAL_S: Final = 30.0

#: Pause after a failed check, seconds. The next check should precede the service manager's timeout.
_RETRY_S: Final = 1.0


class MountService:
    """Reports the state of a mount to the service manager, from `on_ready` to `on_stopping`.

    A keep-alive is sent only after the mount replied to statfs(2), which the kernel never serves
    from a cache. So keep-alives stop when the workers of the session are stuck. The request
    comes from a child process. A thread of this process that waited for itself could not be killed,
    and would keep the session's descriptor open.

    Args:
        describe: returns the status in one line, without blocking.
    """

    def __init__(
        self, notifier: ServiceNotifier, mountpoint: str, describe: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._mountpoint = mountpoint
        self._describe = describe
        self._stopped = threading.Event()

    def on_ready(self) -> None:
        """Report that the mount is ready, and start keep-alives and status messages."""
        self._send("READY=1")
        if self._notifier.is_enabled:
            threading.Thread(target=self._run, name="service", daemon=True).start()

    def on_stopping(self) -> None:
        """Report that the mount goes down; keep-alives stop."""
        self._stopped.set()
        self._notifier.send("STOPPING=1", "STATUS=unmounting")

    def on_reload(self, reload: Callable[[], None]) -> None:
        """Call `reload`, and report its start and end; its failure does not end the mount."""
        self._notifier.send_reloading()
        try:
            reload()
        except Exception:
            log.exception("the reload failed")
        self._send("READY=1")

    def _run(self) -> None:
        watchdog_s = self._notifier.watchdog_s
        interval_s = min(_STATUS_INTERVAL_S, (watchdog_s or _STATUS_INTERVAL_S * 2) / 2)
        wait_s = interval_s
        while not self._stopped.wait(wait_s):
            wait_s = interval_s
            if watchdog_s is None:
                self._send()
            elif mount_table.check_health(self._mountpoint, timeout_s=interval_s) == "responsive":
                self._send("WATCHDOG=1")
            else:
                log.warning("%s: not responsive, no keep-alive was sent", self._mountpoint)
                wait_s = min(_RETRY_S, interval_s)

    def _send(self, *lines: str) -> None:
        if not self._stopped.is_set():
            self._notifier.send(*lines, f"STATUS={self._describe()}")


def describe_mount(app: "App") -> str:
    """Return the status of a mount in one line; sends no request and does not block."""
    from tinkerfs.context import BACKGROUND_CONTEXT  # lazy: for `tinkerfs --help`

    runs = app.catalog.runs.peek(BACKGROUND_CONTEXT)
    listed = "runs not listed yet" if runs is None else f"{len(runs.by_id)} runs"
    pending = len(app.telemetry.pending())
    return f"{listed}; {pending} pending; key: {app.credentials.describe_state()}"
