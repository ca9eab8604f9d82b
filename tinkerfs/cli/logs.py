"""Logging setup: the destination of the log, and redaction of secrets in it."""

import logging
import os
from typing import Final, TextIO

from tinkerfs.cli.json_log import JsonFormatter
from tinkerfs.errors import StartupError
from tinkerfs.printable import escape_control_chars, redacted_lines

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: Maximum length of a line of a record.
_MAX_LINE_CHARS: Final = 2000

#: Libraries that log every request with its signed URL; only their warnings are logged.
_VERBOSE_LOGGERS: Final = ("httpx", "httpcore", "urllib3", "fuse")


class _Redacting(logging.Formatter):
    """Formats messages on one line, and redacts secrets in them and in tracebacks.

    A message cannot contain line ends, so text from outside cannot forge a line of the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_control_chars(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return redacted_lines(super().format(record), limit=_MAX_LINE_CHARS)


class _OwnStream(logging.StreamHandler[TextIO]):
    """A stream handler that owns its stream and closes it."""

    def close(self) -> None:
        super().close()
        self.stream.close()


def set_up(level: str, log_file: str | None, *, to_stderr: bool, log_format: str = "text") -> None:
    """Configure logging; replace an earlier configuration.

    Args:
        level: The minimum severity to log.
        log_file: A file to append to, created with mode 0600; None for no file.
        to_stderr: Without a file, log to a duplicate of the current standard error.
        log_format: One of `LOG_FORMATS`.

    Raises:
        StartupError: The file cannot be opened for writing.
    """
    handler: logging.Handler
    if log_file is not None:
        handler = _OwnStream(_open(log_file))
    elif to_stderr:
        # A duplicate, because descriptor 2 is redirected while libfuse mounts.
        stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        handler = _OwnStream(stream)
    else:
        handler = logging.NullHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else _Redacting(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Set the minimum severity to log."""
    logging.getLogger().setLevel(level.upper())


def reload(level: str, log_file: str | None) -> None:
    """Set the level, and open the log file again, because logrotate(8) may have renamed it.

    Raises:
        StartupError: The file cannot be opened for writing; the log goes on as before.
    """
    set_level(level)
    if log_file is not None:
        stream = _open(log_file)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _OwnStream):
                # Not `set_up`: another thread may just use the handler, which must stay open.
                previous = handler.setStream(stream)
                if previous is not None:
                    previous.close()


def _open(log_file: str) -> TextIO:
    """Open a log file for appending.

    Raises:
        StartupError: The file cannot be opened for writing.
    """
    try:
        # Opening a FIFO without a reader fails. If its reader stalls, records are lost, but the
        # mount does not block.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(os.path.expanduser(log_file), flags, 0o600)
    except OSError as error:
        raise StartupError(
            f"the log file {log_file} cannot be written: {error.strerror}"
            " (hint: choose another with --log-file)"
        ) from None
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")
