"""Formatter of the JSON log: an object per record, on one line (JSON Lines)."""

import json
import logging
from datetime import UTC, datetime
from typing import Final

from tinkerfs.printable import valid_unicode, without_secrets_up_to

#: Maximum length of a string, and of a line of a traceback.
_MAX_CHARS: Final = 4000


class JsonFormatter(logging.Formatter):
    """Formats a record as an object, without secrets.

    Every record has `time`, `level`, `logger` and `message`. Those of an operation also have what
    the logger passed as `extra={"fields": ...}`. Secrets are removed before the strings are
    quoted, because quoting could hide them.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, in ASCII."""
        time = datetime.fromtimestamp(record.created, UTC)
        values: dict[str, object] = {
            "time": time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: _without_secrets(value) for name, value in values.items()})


def _without_secrets(value: object) -> object:
    if isinstance(value, str):
        # Bytes that are not UTF-8 are lone surrogates, which strict parsers of JSON reject.
        text = valid_unicode(value)
        return "\n".join(without_secrets_up_to(line, _MAX_CHARS) for line in text.split("\n"))
    if isinstance(value, list | tuple):
        return [_without_secrets(each) for each in value]
    return value
