"""The protocol by which a service reports its state to systemd (sd_notify(3)).

A message is one datagram of NAME=VALUE lines to the socket in NOTIFY_SOCKET. Without that variable
nothing is sent. See systemd.service(5) for `Type=notify` and `WatchdogSec=`.
"""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping


class ServiceNotifier:
    """Sends the state of this process to the service manager. Thread-safe.

    It removes its variables from the environment, so that no child process inherits them.

    Attributes:
        watchdog_s: the service manager restarts the service after this time without a keep-alive,
            seconds; None if it expects none.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        # sd_notify(3): an absolute path, or a name in the abstract namespace after an `@`.
        self._address = address if address[:1] in ("/", "@") else ""
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", str(os.getpid()))
        is_watched = self.is_enabled and watchdog_us.isdigit() and pid == str(os.getpid())
        self.watchdog_s = int(watchdog_us) / 1e6 or None if is_watched else None

    @property
    def is_enabled(self) -> bool:
        """Whether a service manager receives the messages."""
        return bool(self._address)

    def send(self, *lines: str) -> None:
        """Send assignments such as "READY=1"; a failure is ignored, as by sd_notify(3)."""
        if not self._address:
            return
        address = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        message = "\n".join(line.replace("\n", " ") for line in lines).encode()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # The receiver may be slow or gone, and the mount must not depend on it.
            sock.settimeout(1.0)
            sock.sendto(message, address)

    def send_reloading(self) -> None:
        """Report the start of a reload; READY=1 ends it."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
