"""Audit log: a line before and after each change, with its process, user, paths and outcome.

A line goes to the system's log, as a datagram to /dev/log, or to a file. journald reads the same
socket, so it needs no protocol of its own. No change fails because of the log, and none waits for
a log daemon. Thread-safe.
"""

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from typing import Final

from tinkerfs import errors
from tinkerfs.clock import Clock
from tinkerfs.config import SYSLOG
from tinkerfs.errors import StartupError
from tinkerfs.printable import without_secrets_up_to
from tinkerfs.safe_open import open_regular
from tinkerfs.telemetry import MutationRecord, rfc3339

#: The socket of the system's log, which syslog(3) uses.
_SYSLOG_SOCKET: Final = "/dev/log"

#: Facility authpriv, a log that only some users can read, and severity info (RFC 3164, 4.1.1).
_PRIORITY: Final = 10 << 3 | 6

#: Maximum length of a value; a line fits into a datagram.
_MAX_VALUE_CHARS: Final = 1000


class AuditLog:
    """Writes a line when a change is requested, and one when it has ended.

    Args:
        destination: "syslog", the path of a datagram socket, or a file to append to.
        record_error: records a failure to write, with the path and the operation.

    Raises:
        StartupError: the destination cannot be written.
    """

    def __init__(
        self,
        destination: str,
        clock: Clock,
        record_error: Callable[[str, str, OSError], None],
    ) -> None:
        self._path = _SYSLOG_SOCKET if destination == SYSLOG else destination
        self._clock = clock
        self._record_error = record_error
        self._lock = threading.Lock()
        self._is_failing = False  # guarded by _lock
        try:
            # Decided once: a file in the place of a lost socket would keep the log daemon out.
            self._is_socket = destination == SYSLOG or _is_socket(destination)
            self._write(b"")
        except OSError as error:
            raise StartupError(
                f"the audit log {self._path} cannot be written: {error.strerror}"
                " (hint: choose a file or another socket with --audit)"
            ) from None

    def record(self, change: MutationRecord) -> None:
        """Write the line of a change; report the first failure in a row."""
        line = format_change(change)
        try:
            self._write(line.encode("ascii"))
            failure = None
        except OSError as error:
            failure = errors.not_audited(self._path, error)
        with self._lock:
            is_new, self._is_failing = not self._is_failing, failure is not None
        if failure is not None and is_new:
            self._record_error(self._path, "audit", failure)

    def _write(self, line: bytes) -> None:
        """Write a line; without one, check that the destination can be opened.

        It is opened for each line, so that a rotated file and a restarted log daemon need nothing.
        """
        if self._is_socket:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
                datagrams.setblocking(False)  # a log daemon that hangs must not delay the change
                datagrams.connect(self._path)
                if line:
                    datagrams.send(self._syslog_header() + line)
            return
        fd = open_regular(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if line:
                stamp = rfc3339(self._clock.now()).encode()
                content = b"%s tinkerfs[%d]: %s\n" % (stamp, os.getpid(), line)
                if os.write(fd, content) != len(content):  # the file system became full
                    raise errors.no_space(self._path, "no space for the whole line")
        finally:
            os.close(fd)

    def _syslog_header(self) -> bytes:
        """Return what syslog(3) writes before a message."""
        # The names of months are English, because Python does not set the locale of times.
        stamp = time.strftime("%b %e %H:%M:%S", time.localtime(self._clock.now()))
        return f"<{_PRIORITY}>{stamp} tinkerfs[{os.getpid()}]: ".encode()


def format_change(change: MutationRecord) -> str:
    """Return a change as ASCII text of `name=value` pairs; texts are JSON strings."""
    # The paths are last, because some log daemons truncate a long line.
    values = {
        "action": _quoted(change.action),
        "requested": _quoted(rfc3339(change.time)),
        "uid": str(change.caller.uid),
        "pid": str(change.caller.pid),
        "command": _quoted(change.command),
        "outcome": _quoted(change.outcome),
        "tinker_path": _quoted(change.tinker_path),
        "path": _quoted(change.path),
    }
    return " ".join(f"{name}={value}" for name, value in values.items())


def _quoted(text: str) -> str:
    """Return a text as a JSON string of printable ASCII, without secrets."""
    # JSON does not require the escape of DEL.
    text = without_secrets_up_to(text, _MAX_VALUE_CHARS)
    return json.dumps(text).replace("\x7f", r"\u007f")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
