"""Where the log goes, and what never gets into it."""

import logging
import os
from typing import Final, TextIO

from tinkerfs import errors
from tinkerfs.errors import StartupError
from tinkerfs.printable import printable

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: They tell of every request, in words that hold signed URLs.
_CHATTY: Final = ("httpx", "httpcore", "urllib3", "stamina", "fuse")


class _Redacting(logging.Formatter):
    """Every record passes `errors.redact`, its traceback too.

    A message is one line, so that a line of the log is never of another's making.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        # Not splitlines, to which some characters within a line are line ends.
        return "\n".join(_redacted(line) for line in super().format(record).split("\n"))


class _OwnStream(logging.StreamHandler[TextIO]):
    """A handler whose stream is closed with it."""

    def close(self) -> None:
        super().close()
        self.stream.close()


def _redacted(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]  # a traceback reads badly without
    return indent + errors.redact(line, limit=2000)


def set_up(level: str, log_file: str | None, *, to_stderr: bool) -> None:
    """Start logging, or start anew elsewhere.

    Args:
        level: the least severe that is written.
        log_file: a file, made 0600, appended to; None for none.
        to_stderr: write to the standard error that there is now, where there is no file.

    Raises:
        SetupError: the file cannot be written.
    """
    handler: logging.Handler
    if log_file is not None:
        try:
            # A FIFO without a reader fails; one whose reader stalls loses records, not the mount.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(os.path.expanduser(log_file), flags, 0o600)
        except OSError as error:
            raise StartupError(
                f"the log {log_file} cannot be written ({error.strerror}):"
                " choose another with --log-file"
            ) from None
        stream = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")
        handler = _OwnStream(stream)
    elif to_stderr:
        # A descriptor of its own: descriptor 2 is lent out while libfuse mounts.
        stream = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        handler = _OwnStream(stream)
    else:
        handler = logging.NullHandler()
    handler.setFormatter(_Redacting(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
